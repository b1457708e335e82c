"""How a weight matmul is cut for a GPU, and the rule that chooses.

A block computes ``bm x bn`` results with ``warps_m x warps_n`` warps; a step of its pipeline takes
``bk`` channels, and ``stages`` steps lie in shared memory. :func:`predicted` is the model behind
the rule, in cycles. A multiprocessor is as slow as the slowest of its tensor cores, its path to
shared memory, its share of the second-level cache's bandwidth and, for the epilogue, its
schedulers; but a lone block lasts as long as its dependent steps. Blocks run in rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CHOICES", "MOST_OUTPUTS", "MOST_REGISTERS", "REGISTERS", "SHARED", "SPARE",
           "WARPGROUP_CHOICES", "CudaTile", "default_tile", "predicted", "tiles",
           "warpgroup_tiles"]

MOST_OUTPUTS = 64
"""Results of a thread before a tail: each takes dozens of instructions, which must be fetched."""
SMS = 132
"""Multiprocessors of the device that the default rule is for."""
SHARED = 63 << 10
"""Bytes of shared memory that a block may have everywhere, with some to spare."""
SPARE = 8 << 10
REGISTERS, MOST_REGISTERS = 65536, 250
"""Registers of a multiprocessor; of a thread."""
_MMA, _LDMATRIX = 6.4, 4.0
"""Cycles of one ``mma`` on a tensor core, of one ``ldmatrix`` of 4 matrices on shared memory."""
_PRODUCTS, _SHARED_PATH = 0.9 * 4096, 128.0
"""Products of codes and bytes of shared memory that ``wgmma`` has in a cycle."""
_TURN, _LATENCY = 100.0, 900.0
"""Cycles from a step's barrier to its products; from a copy's start to its end."""
_CACHE, _CACHE_ALONE = 32.0, 48.0
"""Bytes a cycle from the second-level cache for each multiprocessor, if all ask and if few do."""
_EPILOGUE, _TAIL = 8.0, 44.0
"""Instructions of the epilogue of one result."""
_STEP, _FIXED, _JOIN = 60.0, 1500.0, 200.0
"""Cycles that a lone warp waits in a step of 32 channels; before the first and after the last; for
the sums of other warps."""


@dataclass(frozen=True)
class CudaTile:
    """One point of the design space.

    Parameters
    ----------
    bm, bn
        Rows and columns of a block; multiples of 16 and of 32 for each warp.
    bk
        Channels of a stage, a multiple of 64.
    warps_m, warps_n
        Warps of a block.
    stages
        Stages in shared memory, 2 to 6.
    warps_k
        Groups of warps that share the channels of a stage, 64 for each at least.
    wgmma
        Whether four warps multiply together (sm_90a; activations of 8 bits): ``warps_m`` is a
        multiple of 4, ``bk`` 64 or 128; a warp has at most 256 columns; three stages at least.
    """

    bm: int
    bn: int
    bk: int
    warps_m: int
    warps_n: int
    stages: int
    warps_k: int = 1
    wgmma: bool = False

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if (self.bm % (16 * self.warps_m) or self.bn % (32 * self.warps_n)
                or self.bk % (64 * self.warps_k) or not 2 <= self.stages <= 6):
            raise ValueError(f"{self} is no tile")
        if self.wgmma and (self.warps_m % 4 or self.bk > 128 or self.warps_k > 1
                           or self.groups > 8 or self.stages < 3):
            raise ValueError(f"{self} is no tile")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_m * self.warps_n * self.warps_k

    @property
    def mt(self) -> int:
        """Tiles of 16 rows of a warp."""
        return self.bm // self.warps_m // 16

    @property
    def groups(self) -> int:
        """Groups of 32 columns of a warp."""
        return self.bn // self.warps_n // 32

    def shared_bytes(self, itemsize: int) -> int:
        """Return the shared memory of a block, for activations of ``itemsize`` bytes."""
        others = 4 * (self.warps_k - 1) * self.bm * self.bn
        return self.stages * self.bk * (self.bm * itemsize + self.bn) + 12 * self.bn + others

    def registers(self, itemsize: int) -> int:
        """Return roughly the registers of a thread."""
        sums = 16 * self.mt * self.groups * itemsize
        if self.wgmma:
            return max(sums + 56, 112)  # there are no fragments; the rest is for the epilogue
        return sums + 2 * (4 * self.mt * itemsize + 8 * self.groups) + 40


CHOICES = (
    (256, 128, 4, 2, 1), (192, 128, 4, 2, 1), (96, 128, 2, 4, 1), (128, 128, 2, 2, 1),
    (128, 128, 4, 2, 1), (128, 64, 2, 2, 1), (128, 64, 4, 1, 1), (64, 128, 2, 2, 1),
    (128, 96, 4, 1, 1), (64, 96, 2, 1, 1), (64, 96, 4, 1, 1), (64, 64, 2, 2, 1), (64, 64, 2, 2, 2),
    (64, 32, 4, 1, 1), (64, 32, 4, 1, 2), (32, 64, 2, 2, 1), (32, 64, 2, 2, 2), (32, 32, 2, 1, 1),
    (32, 32, 2, 1, 2), (32, 32, 2, 1, 4), (16, 64, 1, 2, 1), (16, 32, 1, 1, 1), (16, 32, 1, 1, 2),
    (16, 32, 1, 1, 4),
)
"""(bm, bn, warps_m, warps_n, warps_k) that the rule chooses among."""


def tiles(itemsize: int, shared: int = SHARED) -> list[CudaTile]:
    """Return the tiles of :data:`CHOICES` in as many stages, up to four, as fit ``shared``."""
    found = []
    for bm, bn, warps_m, warps_n, warps_k in CHOICES:
        for stages in (4, 3, 2):
            tile = CudaTile(bm, bn, 64 * warps_k, warps_m, warps_n, stages, warps_k)
            if tile.shared_bytes(itemsize) <= shared:
                if tile.registers(itemsize) <= MOST_REGISTERS:
                    found.append(tile)
                break
    return found


WARPGROUP_CHOICES = (
    (256, 128, 8, 1), (128, 256, 8, 1), (192, 192, 12, 1), (192, 128, 12, 1), (128, 192, 8, 1),
    (128, 128, 8, 1), (64, 256, 4, 1), (128, 96, 8, 1), (128, 64, 8, 1), (64, 128, 4, 1),
    (64, 96, 4, 1), (64, 64, 4, 1),
)
"""(bm, bn, warps_m, warps_n) of products of four warps."""


def warpgroup_tiles(shared: int) -> list[CudaTile]:
    """Return the tiles of :data:`WARPGROUP_CHOICES` in as many stages as fit ``shared``."""
    every = [CudaTile(bm, bn, bk, warps_m, warps_n, stages, wgmma=True)
             for bm, bn, warps_m, warps_n in WARPGROUP_CHOICES
             for bk in (128, 64) for stages in (3, 4, 5, 6)]
    return [tile for tile in every if tile.shared_bytes(1) <= shared]


def predicted(
    tile: CudaTile, rows: int, columns: Sequence[int], depth: int, itemsize: int,
    tail: bool = False, result: int = 4, shared: int = SHARED,
) -> float:
    """Return the predicted cycles of a kernel.

    Parameters
    ----------
    tile
        How it is cut.
    rows, columns, depth
        M, the N of each member, K.
    itemsize
        Bytes of an activation code: two are multiplied as two planes.
    tail
        Whether an elementwise operator follows.
    result
        Bytes that are written of each result, and read of what is added to it.
    shared
        Bytes of shared memory of a multiprocessor, roughly those of a block.
    """
    blocks = -(-rows // tile.bm) * sum(-(-n // tile.bn) for n in columns)
    warps = tile.threads // 32
    resident = max(1, min(shared // (tile.shared_bytes(itemsize) + 1024),
                          REGISTERS // (tile.threads * tile.registers(itemsize)),
                          2048 // tile.threads))
    slices = -(-depth // tile.bk) * tile.bk // 32 / tile.warps_k
    moved = (tile.bm * itemsize + tile.bn) * depth + result * tile.bm * tile.bn
    finish = tile.bm * tile.bn * (_TAIL if tail else _EPILOGUE) / 128
    joined = _JOIN * (tile.warps_k > 1)
    # What a block takes of its multiprocessor, and how long it lasts alone.
    slice_work, slice_alone = _slice(tile, itemsize)
    work = max(slices * slice_work, moved / _CACHE)
    steps = slices * slice_alone
    busy = warps * min(tile.warps_k, 2 * tile.mt * tile.groups) / tile.warps_k
    finishing = max(1.0, 8 / busy)
    alone = _FIXED + max(steps, moved / _CACHE_ALONE) + joined + finish * finishing
    each = -(-blocks // SMS)
    return max(each * (work + finish / resident) + _FIXED, -(-each // resident) * alone)


def _slice(tile: CudaTile, itemsize: int) -> tuple[float, float]:
    """Return cycles of 32 channels: what they take of a multiprocessor, how long they last."""
    warps = tile.threads // 32
    if tile.wgmma:
        each = 32 * (64 + tile.bn // tile.warps_n)  # bytes of a product's operands
        moved = tile.bm // 64 * tile.warps_n * each + 32 * (tile.bm + tile.bn)
        work = max(tile.bm * tile.bn * 32 / _PRODUCTS, moved / _SHARED_PATH)
        part = 32 / tile.bk
        return work, max(work + part * _TURN, part * _LATENCY / (tile.stages - 2))
    mma = tile.mt * tile.groups * 4 * itemsize
    ldmatrix = tile.mt * itemsize + 2 * tile.groups
    return (warps * max(mma * _MMA / 4, ldmatrix * _LDMATRIX),
            _STEP + mma * _MMA * -(-warps // 4))


def default_tile(
    rows: int, columns: Sequence[int], depth: int, itemsize: int, tail: bool = False,
    result: int = 4, shared: int = SHARED, wgmma: bool = False,
) -> CudaTile:
    """Return the tile that is used where nothing says better.

    Parameters are those of :func:`predicted`; ``shared`` is what a block may have, ``wgmma`` says
    whether there are products of four warps.
    """
    found = []
    every = warpgroup_tiles(shared) if wgmma and itemsize == 1 else []
    for tile in [*tiles(itemsize, shared), *every]:
        outputs = tile.bm * tile.bn * tile.warps_k // tile.threads
        if ((tile.stages >= 3 or depth <= tile.bk * tile.stages)
                and not (tail and outputs > MOST_OUTPUTS)):
            found.append(tile)
    return min(found, key=lambda tile: predicted(
        tile, rows, columns, depth, itemsize, tail, result, shared))
