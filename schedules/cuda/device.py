"""Device functions: each instruction that CUDA C++ has no operator for, by one small function.

Kernels are TIR; where TIR has no node for what a warp does together (``mma.sync``, ``ldmatrix``,
asynchronous copies, shuffles), they call one of :data:`DEVICE`, whose text travels with the
kernel. Every function has the same meaning on every architecture from sm_75 on; what an older one
lacks is made of what it has. Pointers are generic ones; "shared" ones must be of shared memory.

Fragments are those of ``mma.sync.m16n8k32``; with ``g = lane / 4`` and ``t = lane % 4``::

    a[0..3]   rows g, g+8, g, g+8; 4 codes of K from 4*t, 4*t, 16 + 4*t, 16 + 4*t
    b[0..1]   column g; 4 codes of K from 4*t, 16 + 4*t
    c[0..3]   rows g, g, g+8, g+8; columns 2*t, 2*t+1, 2*t, 2*t+1
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICE", "DeviceFunction", "function"]


@dataclass(frozen=True)
class DeviceFunction:
    """One function: its name, its CUDA C++ text, what it returns (a TIR dtype or ``void``)."""

    name: str
    source: str
    returns: str = "void"


def function(signature: str, body: str, returns: str = "void") -> DeviceFunction:
    """Return a function of its signature, its body and the TIR dtype that it returns."""
    head = {"void": "void", "int32": "int", "uint32": "unsigned int",
            "uint64": "unsigned long long", "handle": "void*"}[returns]
    name = signature.partition("(")[0]
    text = f"__device__ __forceinline__ {head} {signature} {{\n{body.strip(chr(10))}\n}}\n"
    return DeviceFunction(name, text, returns)


def _mma(a: str, b: str) -> DeviceFunction:
    """Return ``c += a @ b`` of a 16 x 8 tile over 32 codes of K."""
    small = "\n".join(
        f'  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.{a}.{b}.s32 {{%0, %1}}, {{%2}}, '
        f'{{%3}}, {{%0, %1}};" : "+r"(c[{2 * row}]), "+r"(c[{2 * row + 1}]) '
        f': "r"(a[{2 * half + row}]), "r"(b[{half}]));'
        for half in range(2) for row in range(2)
    )
    return function(f"vitq_mma_{a}_{b}(int* c, const int* a, const int* b)", f"""
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.{a}.{b}.s32 {{%0, %1, %2, %3}}, "
               "{{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
{small}
#endif""")


def _ldmatrix(count: int) -> DeviceFunction:
    """Return the load of ``count`` matrices of 8 rows of 16 bytes; lane i gives row i's address."""
    outs = ", ".join(f'"=r"(d[{i}])' for i in range(count))
    regs = ", ".join(f"%{i}" for i in range(count))
    return function(f"vitq_ldmatrix{count}(int* d, const void* shared)", f"""
  unsigned int at = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {{{regs}}}, [%{count}];"
               : {outs} : "r"(at) : "memory");""")


def _copy(size: int) -> DeviceFunction:
    """Return the asynchronous copy of ``size`` bytes, or of as many zeros if not ``valid``."""
    kind = {4: "int", 8: "int2", 16: "int4"}[size]
    form = "cg" if size == 16 else "ca"
    zero = {4: "0", 8: "make_int2(0, 0)", 16: "make_int4(0, 0, 0, 0)"}[size]
    return function(f"vitq_copy{size}(void* shared, const void* global, bool valid)", f"""
#if __CUDA_ARCH__ >= 800
  unsigned int at = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.{form}.shared.global [%0], [%1], {size}, %2;"
               :: "r"(at), "l"(global), "r"(valid ? {size} : 0) : "memory");
#else
  *reinterpret_cast<{kind}*>(shared) =
      valid ? *reinterpret_cast<const {kind}*>(global) : {zero};
#endif""")


def _wait(left: int) -> DeviceFunction:
    """Return the wait until at most ``left`` groups of this thread's copies are under way."""
    return function(f"vitq_copy_wait{left}()", f"""
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group {left};" ::: "memory");
#endif""")


def _words(size: int) -> list[DeviceFunction]:
    """Return load and store of ``size`` neighbouring bytes, aligned so, as 32-bit words."""
    kind = {4: "int", 8: "int2", 16: "int4"}[size]
    fields = ["v"] if size == 4 else [f"v.{field}" for field in "xyzw"[: size // 4]]
    unpack = " ".join(f"d[{i}] = {field};" for i, field in enumerate(fields))
    pack = "s[0]" if size == 4 else f"make_{kind}({', '.join(f's[{i}]' for i in range(size // 4))})"
    return [
        function(f"vitq_load{size}(int* d, const void* from)",
                  f"  {kind} v = *reinterpret_cast<const {kind}*>(from);\n  {unpack}"),
        function(f"vitq_store{size}(void* to, const int* s)",
                  f"  *reinterpret_cast<{kind}*>(to) = {pack};"),
    ]


def _pack(dtype: str) -> DeviceFunction:
    """Return the packing of four (two) int32 in one word, each limited to its part's dtype."""
    if dtype == "s16":
        signature, arguments = "int a, int b", '"r"(b), "r"(a)'
        text = "cvt.pack.sat.s16.s32 %0, %1, %2;"
    else:
        signature, arguments = "int a, int b, int c, int d", '"r"(b), "r"(a), "r"(d), "r"(c)'
        kind = f"cvt.pack.sat.{dtype}.s32.b32"
        text = f"{{.reg .b32 high; {kind} high, %3, %4, 0; {kind} %0, %1, %2, high;}}"
    return function(f"vitq_pack_{dtype}({signature})", f"""
  int word;
  asm("{text}" : "=r"(word) : {arguments});
  return word;""", "int32")


DEVICE = [
    *(_mma(a, b) for a in ("s8", "u8") for b in ("s8", "u8")),
    *(_ldmatrix(count) for count in (1, 2, 4)),
    *(_copy(size) for size in (4, 8, 16)),
    function("vitq_copy_commit()", """
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif"""),
    *(_wait(left) for left in range(5)),
    *(_pack(dtype) for dtype in ("s8", "u8", "s16")),
    *(one for size in (4, 8, 16) for one in _words(size)),
    # Launches may overlap from sm_90 on, if they are made so (.overlap): the next one may begin;
    # what the ones before wrote is there behind the wait.
    function("vitq_let_next_begin()", """
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif"""),
    function("vitq_wait_for_launches()", """
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif"""),
    function("vitq_shuffle_xor(int value, int lanes)",
              "  return __shfl_xor_sync(0xffffffffu, value, lanes);", "int32"),
    function("vitq_either(bool first, const void* a, const void* b)",
              "  return const_cast<void*>(first ? a : b);", "handle"),
    function("vitq_dot4(int a, int b, int c)", "  return __dp4a(a, b, c);", "int32"),
    function("vitq_bytes(int a, int b, int select)",
              "  return static_cast<int>(__byte_perm(static_cast<unsigned int>(a), "
              "static_cast<unsigned int>(b), static_cast<unsigned int>(select)));", "int32"),
    function("vitq_rescale(int value, int mult, int rounding, int shift)",
              "  return (__mulhi(value, mult) + rounding) >> shift;", "int32"),
    # The floor of a / b for b > 0, a bit a step: a division would be done in float32.
    function("vitq_divide(int a, int b)", """
  unsigned int sign = a >> 31, left = a ^ sign, rest = 0, quotient = 0, by = b;
#pragma unroll
  for (int bit = 30; bit >= 0; --bit) {
    rest = rest << 1 | (left >> bit & 1);
    bool fits = rest >= by;
    rest -= fits ? by : 0;
    quotient = quotient << 1 | (fits ? 1 : 0);
  }
  return static_cast<int>(quotient ^ sign);""", "int32"),
    function("vitq_abs(int a)", "  return abs(a);", "int32"),
    # Between 0 and an end that is not below it: one instruction where nvcc would make two or three.
    function("vitq_ramp(int a, int end)", """
#if __CUDA_ARCH__ >= 900
  return __vimin_s32_relu(a, end);
#else
  return min(max(a, 0), end);
#endif""", "int32"),
    function("vitq_high(int a, int b)", "  return __mulhi(a, b);", "int32"),
]
"""Every function that all architectures have."""
