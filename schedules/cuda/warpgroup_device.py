"""Device functions of sm_90a: ``wgmma``, products of four warps that read shared memory themselves.

``d += a @ b`` of 64 rows, 32 codes of K and N columns. Operands are described by 64 bits: an
address, how rows are laid out, and how far apart parts of the matrix are (PTX ISA, "asynchronous
warpgroup level matrix instructions"). Warp ``i`` of the four has rows ``16*i`` to ``16*i + 15``,
its sums being those of ``mma.sync`` for one tile of 8 columns after the other.

The products read shared memory as the "asynchronous proxy": what threads (or their copies) wrote is
seen by it after :data:`vitq_fence_async` in the writing thread, and a barrier.
"""

from __future__ import annotations

from .device import DeviceFunction, function

__all__ = ["WARPGROUP"]

_WIDTHS = tuple(range(32, 257, 32))
"""Columns of a product."""


def _product(kind: str, width: int) -> DeviceFunction:
    """Return ``d += a @ b``, rows of ``a`` of dtype ``kind``, columns of ``b`` of int8."""
    count = width // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    held = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    return function(
        f"vitq_wgmma_{kind}_n{width}(int* d, unsigned long long a, unsigned long long b)", f"""
  asm volatile("{{.reg .pred add; setp.ne.b32 add, 1, 0; "
               "wgmma.mma_async.sync.aligned.m64n{width}k32.s32.{kind}.s8 "
               "{{{sums}}}, %{count}, %{count + 1}, add;}}"
               : {held} : "l"(a), "l"(b));""")


def _asm(name: str, text: str) -> DeviceFunction:
    return function(f"{name}()", f'  asm volatile("{text}" ::: "memory");')


WARPGROUP = [
    *(_product(kind, width) for kind in ("s8", "u8") for width in _WIDTHS),
    # Matrices of 8 rows of 16 bytes: `leading` bytes from one to the next along K (form 0),
    # `stride` bytes from 8 rows to the next 8; forms 1, 2: rows of 128, 64 bytes whose 16-byte
    # chunks are permuted by an exclusive or with bits 7 and up of the address.
    function("vitq_descriptor(const void* shared, int leading, int stride, int form)", """
  unsigned long long at = static_cast<unsigned long long>(__cvta_generic_to_shared(shared));
  return (at & 0x3ffff) >> 4 | static_cast<unsigned long long>(leading >> 4) << 16 |
         static_cast<unsigned long long>(stride >> 4) << 32 |
         static_cast<unsigned long long>(form) << 62;""", "uint64"),
    # The permuted forms look at bits of the address itself.
    function("vitq_check_base(const void* shared)", """
  if (__cvta_generic_to_shared(shared) % 1024 != 0) __trap();"""),
    _asm("vitq_fence_async", "fence.proxy.async.shared::cta;"),
    _asm("vitq_wgmma_fence", "wgmma.fence.sync.aligned;"),
    _asm("vitq_wgmma_commit", "wgmma.commit_group.sync.aligned;"),
    _asm("vitq_wgmma_wait0", "wgmma.wait_group.sync.aligned 0;"),
    _asm("vitq_wgmma_wait1", "wgmma.wait_group.sync.aligned 1;"),
    _asm("vitq_together", "bar.warp.sync 0xffffffff;"),
    # Sums are not looked at before the wait, which the compiler does not know to concern them.
    function("vitq_settle8(int* d)", "\n".join(
        f'  asm volatile("" : "+r"(d[{i}]) :: "memory");' for i in range(8))),
]
"""Every such function."""
