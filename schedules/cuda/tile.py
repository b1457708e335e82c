"""How a weight matmul is cut for a GPU, and the rule that chooses.

A block computes ``bm x bn`` results with ``warps_m x warps_n`` warps; a step of its pipeline takes
``bk`` channels, and ``stages`` steps lie in shared memory. :func:`predicted` is the model behind
the rule, in cycles. A multiprocessor is as slow as the slowest of its tensor cores, its path to
shared memory (``ldmatrix``), its share of the second-level cache's bandwidth and, for the epilogue,
its schedulers; but a lone block lasts as long as its dependent steps. Blocks run in rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CHOICES", "SHARED", "SPARE", "CudaTile", "default_tile", "predicted", "tiles"]

MOST_OUTPUTS = 64
"""Results of a thread before a tail: each takes dozens of instructions, which must be fetched."""
SMS = 132
"""Multiprocessors of the device that the default rule is for."""
SHARED = 63 << 10
"""Bytes of shared memory that a block may have everywhere, with some to spare."""
SPARE = 8 << 10
REGISTERS, MOST_REGISTERS = 65536, 250
_MMA, _LDMATRIX = 6.4, 4.0
"""Cycles of one ``mma`` on a tensor core, of one ``ldmatrix`` of 4 matrices on shared memory."""
_CACHE, _CACHE_ALONE = 28.0, 48.0
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
    """

    bm: int
    bn: int
    bk: int
    warps_m: int
    warps_n: int
    stages: int
    warps_k: int = 1

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if (self.bm % (16 * self.warps_m) or self.bn % (32 * self.warps_n)
                or self.bk % (64 * self.warps_k) or not 2 <= self.stages <= 6):
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


def predicted(
    tile: CudaTile, rows: int, columns: Sequence[int], depth: int, itemsize: int,
    tail: bool = False, shared: int = SHARED,
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
    shared
        Bytes of shared memory of a multiprocessor, roughly those of a block.
    """
    blocks = -(-rows // tile.bm) * sum(-(-n // tile.bn) for n in columns)
    warps = tile.threads // 32
    resident = max(1, min(shared // (tile.shared_bytes(itemsize) + 1024),
                          REGISTERS // (tile.threads * tile.registers(itemsize)),
                          2048 // tile.threads))
    slices = -(-depth // tile.bk) * tile.bk // 32 / tile.warps_k
    mma = tile.mt * tile.groups * 4 * itemsize
    ldmatrix = tile.mt * itemsize + 2 * tile.groups
    moved = (tile.bm * itemsize + tile.bn) * depth + 4 * tile.bm * tile.bn
    finish = tile.bm * tile.bn * (_TAIL if tail else _EPILOGUE) / 128
    joined = _JOIN * (tile.warps_k > 1)
    # What a block takes of its multiprocessor, and how long it lasts alone.
    work = max(slices * warps * max(mma * _MMA / 4, ldmatrix * _LDMATRIX), moved / _CACHE)
    steps = slices * (_STEP + mma * _MMA * -(-warps // 4))
    busy = warps * min(tile.warps_k, 2 * tile.mt * tile.groups) / tile.warps_k
    finishing = max(1.0, 8 / busy)
    alone = _FIXED + max(steps, moved / _CACHE_ALONE) + joined + finish * finishing
    each = -(-blocks // SMS)
    return max(each * (work + finish / resident) + _FIXED, -(-each // resident) * alone)


def default_tile(
    rows: int, columns: Sequence[int], depth: int, itemsize: int, tail: bool = False,
    shared: int = SHARED,
) -> CudaTile:
    """Return the tile that is used where nothing says better; see :func:`predicted`.

    ``tail`` says whether an elementwise operator follows; ``shared``, how many bytes of shared
    memory a block may have.
    """
    found = []
    for tile in tiles(itemsize, shared):
        outputs = tile.bm * tile.bn * tile.warps_k // tile.threads
        if ((tile.stages >= 3 or depth <= tile.bk * tile.stages)
                and not (tail and outputs > MOST_OUTPUTS)):
            found.append(tile)
    return min(found, key=lambda tile: predicted(
        tile, rows, columns, depth, itemsize, tail, shared))
