"""``vitq.layer_norm``: LayerNorm over the last axis, exact statistics, no division.

With ``C`` channels and codes ``x`` of step ``s`` (their zero point cancels)::

    D   = C*x - sum x                                       exact, int32
    V   = (C*sum x**2 - (sum x)**2) * 4**k + eps'           exact, int64
    z   = D * 2**k / sqrt(V)                                the normalised value

with ``eps' = eps*C**2*4**k/s**2`` rounded, at least 1. ``V*4**h`` lies in [2**60, 2**62) for
``h = (clz(V) - 2) >> 1``, so with ``v = V*4**h / 2**62`` in [1/4, 1) the reciprocal root is
``2**(h - 31) / sqrt(v)``. ``1/sqrt(v)`` is a cubic start (within 0.8 %) and two steps
``y <- y*(3 - v*y*y)/2``, which square the error (times 3/2): within 2**-25 for every ``V``, and the
same integers everywhere. Since ``|z| <= sqrt(C - 1) <= 2**headroom``, D shifted by
``a = h + k - headroom`` is below 2**31, and only high halves of products are left::

    z'  = ((D << a) * rsqrt) >> 32                          29 - headroom fractional bits
    out = clamp((((z' * mult[c]) >> 32) + bias[c]) >> out_shift, qmin, qmax)

``mult ~ gamma/out_scale`` and ``bias ~ beta/out_scale + zero point + 1/2`` at ``out_shift``
fractional bits. Nothing divides by gamma, so it may be 0; a row of equal codes gives D = 0 and the
bias alone.

Once layout is folded (:mod:`relay_passes.fold_layout`) a call may have a fourth argument ``rows``,
int32 [M]: then ``x`` is a matrix, and row i of the result is of row ``rows[i]`` of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from relay_passes.dialect.checking import (
    ACTIVATION_DTYPES,
    as_const,
    clamp_interval,
    constant_or_fail,
    dtype_interval,
    fail,
    tensor_of,
)
from relay_passes.dialect.exponent import check_scale, masked
from relay_passes.dialect.registry import Claim, Interval, call, register
from relay_passes.errors import VitqError

__all__ = ["RSQRT_START", "layer_norm", "root_bounds"]

_MOST_CHANNELS = 2**15 - 1
_LARGEST_VARIANCE = 2**62 - 1
RSQRT_START = (835482791, -1586745591, 1672402406, -654592838)
"""Cubic of ``1/sqrt(v)`` on [1/4, 1), lowest order first, 28 fractional bits."""
_ROOT_BITS = 30
_INT32_MAX = 2**31 - 1
_Z_BITS = 29
"""Fractional bits of the normalised value plus ``headroom``."""


def layer_norm(
    x: relax.Expr,
    in_scale: float,
    gamma: np.ndarray,
    beta: np.ndarray,
    eps: float,
    out_scale: float,
    out_zp: int,
    qmin: int,
    qmax: int,
    out_dtype: str,
) -> relax.Call:
    """LayerNorm along the last axis.

    Parameters
    ----------
    x : relax.Expr
        int8, uint8 or int16 codes [..., C], C at most 32767, of any zero point.
    in_scale : float
        Step of ``x``; it only weighs ``eps``.
    gamma, beta : ndarray [C]
        Affine parameters in real units.
    eps : float
        Added to the variance, in real units squared.
    out_scale, out_zp, qmin, qmax, out_dtype
        Step, zero point, clamp and dtype of the output codes.

    Raises
    ------
    VitqError
        If the scales or parameters cannot be held in the fixed-point formats.
    """
    in_scale = check_scale("layer_norm", "in_scale", in_scale)
    out_scale = check_scale("layer_norm", "out_scale", out_scale)
    shape, dtype = [int(n) for n in x.ty.shape.values], str(x.ty.dtype)
    if dtype not in ACTIVATION_DTYPES:
        raise VitqError(f"layer_norm: x must be {' or '.join(ACTIVATION_DTYPES)}, not {dtype}")
    channels = shape[-1] if shape else 0
    if not 1 <= channels <= _MOST_CHANNELS:
        raise VitqError(f"layer_norm: x of shape {shape} must have 1 to {_MOST_CHANNELS} channels")
    gain = np.asarray(gamma, np.float64).reshape(-1) / out_scale
    offset = np.asarray(beta, np.float64).reshape(-1) / out_scale
    if gain.shape != (channels,) or offset.shape != (channels,):
        raise VitqError(
            f"layer_norm: gamma has {gain.size} and beta {offset.size} entries, x has {channels} "
            "channels"
        )
    if not (np.isfinite(gain).all() and np.isfinite(offset).all()):
        raise VitqError("layer_norm: gamma or beta is not finite; check the checkpoint")
    headroom = _headroom(channels)
    codes = dtype_interval(dtype)
    var_shift, eps_code = _epsilon(eps, in_scale, channels, codes.hi - codes.lo)
    mult, bias, out_shift = _affine(gain, offset + out_zp, _Z_BITS - headroom)
    return call(
        "layer_norm",
        x,
        as_const(mult, "int32"),
        as_const(bias, "int32"),
        var_shift=var_shift,
        eps_code=eps_code,
        headroom=headroom,
        out_shift=out_shift,
        qmin=int(qmin),
        qmax=int(qmax),
        out_dtype=str(out_dtype),
    )


def _headroom(channels: int) -> int:
    """Smallest n with ``sqrt(channels - 1) <= 2**n``."""
    n = 0
    while 4**n < channels - 1:
        n += 1
    return n


def _epsilon(eps: float, in_scale: float, channels: int, width: int) -> tuple[int, int]:
    """Return (2k, eps'): the largest even shift of the variance that leaves it below 2**62."""
    if not (math.isfinite(eps) and eps >= 0):
        raise VitqError(f"layer_norm: eps is {eps}; it must be finite and not negative")
    exact = eps * channels**2 / in_scale**2
    largest = channels**2 * width**2 // 4
    for k in range(16, -1, -1):
        code = max(1, math.floor(min(exact * 4.0**k, 2.0**62) + 0.5))
        if largest * 4**k + code <= _LARGEST_VARIANCE:
            return 2 * k, code
    raise VitqError(
        f"layer_norm: in_scale {in_scale:.3g} is so small against eps {eps:.3g} that the variance "
        "passes 62 bits; calibrate the residual stream again"
    )


def _affine(
    gain: np.ndarray, offset: np.ndarray, z_bits: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (mult, bias, out_shift): the most fractional bits that fit int32."""
    offset = np.clip(offset + 0.5, -(2.0**27), 2.0**27)
    out_shift = 24
    steepest, farthest = float(np.abs(gain).max()), float(np.abs(offset).max())
    while out_shift > 0 and (
        steepest * 2.0 ** (32 + out_shift - z_bits) >= 2**31 - 1
        or farthest * 2.0**out_shift >= 2**30
    ):
        out_shift -= 1
    if out_shift == 0:
        raise VitqError(
            f"layer_norm: gamma/out_scale reaches {steepest:.3g}; the output scale is too small "
            "for gamma, calibrate that site again"
        )
    mult = np.floor(gain * 2.0 ** (32 + out_shift - z_bits) + 0.5).astype(np.int32)
    # Half a unit more makes up, on average, for the floor of the high half.
    bias = np.floor(offset * 2.0**out_shift + 1.0).astype(np.int32)
    return mult, bias, out_shift


def _infer(node: relax.Call) -> relax.TensorType:
    shape, _ = tensor_of(node, 0, ACTIVATION_DTYPES, "x")
    if not shape or not 1 <= shape[-1] <= _MOST_CHANNELS:
        raise fail(node, f"x of shape {shape} must have 1 to {_MOST_CHANNELS} channels")
    for index, label in ((1, "mult"), (2, "bias")):
        if tensor_of(node, index, ["int32"], label)[0] != [shape[-1]]:
            raise fail(node, f"{label} must have one entry for each of {shape[-1]} channels")
    whole = dtype_interval(node.attrs["out_dtype"])
    if not whole.lo <= node.attrs["qmin"] <= node.attrs["qmax"] <= whole.hi:
        raise fail(node, f"codes do not fit {node.attrs['out_dtype']}")
    if len(node.args) > 3:
        if len(shape) != 2:
            raise fail(node, f"x {shape} must be a matrix, since a table of its rows is given")
        shape[0] = tensor_of(node, 3, ["int32"], "rows")[0][0]
    return relax.TensorType(shape, node.attrs["out_dtype"])


def _high(a: Any, b: Any) -> Any:
    """High half of an int32 product: ``(a * b) >> 32``."""
    return ((a.astype("int64") * b.astype("int64")) >> 32).astype("int32")


def _root_start(v: Any) -> Any:
    """Cubic start of ``1/sqrt(v)``; 30 fractional bits in and out, int64."""
    c0, c1, c2, c3 = (tirx.const(c, "int64") for c in RSQRT_START)
    return (c0 + ((v * (c1 + ((v * (c2 + ((v * c3) >> 30))) >> 30))) >> 30)) << 2


def _root_step(v: Any, y: Any) -> Any:
    """One step of Newton towards ``1/sqrt(v)``."""
    rest = tirx.const(3 << _ROOT_BITS, "int64") - ((v * ((y * y) >> 30)) >> 30)
    return (y * rest) >> 31


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    source, mult, bias, *table, scalars = tensors
    *rows, channels = source.shape if not table else (table[0].shape[0], source.shape[1])
    count = int(channels)
    var_shift, headroom = attrs["var_shift"], attrs["headroom"]

    def x(*i: Any) -> Any:
        return source(table[0](i[0]), i[1]) if table else source(*i)

    k = te.reduce_axis((0, channels), name="k")
    row_sum = te.compute(rows, lambda *i: te.sum(x(*i, k).astype("int32"), axis=k), name="row_sum")
    j = te.reduce_axis((0, channels), name="j")

    def square(*i: Any) -> Any:
        code = x(*i, j).astype("int32")
        return te.sum((code * code).astype("int64"), axis=j)

    row_squares = te.compute(rows, square, name="row_squares")

    def variance(*i: Any) -> Any:
        total = row_sum(*i).astype("int64")
        exact = row_squares(*i) * tirx.const(count, "int64") - total * total
        return (exact << var_shift) + scalars(0)

    row_var = te.compute(rows, variance, name="row_var")
    row_half = te.compute(
        rows, lambda *i: (tirx.clz(row_var(*i)).astype("int32") - 2) >> 1, name="row_half"
    )

    def lift(half: Any) -> Any:
        return half + (var_shift // 2 - headroom)

    row_shift = te.compute(
        rows, lambda *i: te.min(te.max(lift(row_half(*i)), 0), 30), name="row_shift"
    )

    row_v = te.compute(
        rows,
        lambda *i: (row_var(*i) << masked((row_half(*i) * 2).astype("int64"), 6)) >> 32,
        name="row_v",
    )
    row_start = te.compute(rows, lambda *i: _root_start(row_v(*i)), name="row_start")
    row_root = te.compute(rows, lambda *i: _root_step(row_v(*i), row_start(*i)), name="row_root")

    def rsqrt(*i: Any) -> Any:
        spare = te.max(0 - lift(row_half(*i)), 0)
        root = _root_step(row_v(*i), row_root(*i))
        reduced = root >> masked(spare.astype("int64"), 6)
        return te.min(reduced, tirx.const(_INT32_MAX, "int64")).astype("int32")

    row_rsqrt = te.compute(rows, rsqrt, name="row_rsqrt")

    def out(*i: Any) -> Any:
        row, channel = i[:-1], i[-1]
        centred = x(*i).astype("int32") * count - row_sum(*row)
        z = _high(centred << masked(row_shift(*row)), row_rsqrt(*row))
        value = (_high(z, mult(channel)) + bias(channel)) >> attrs["out_shift"]
        return te.min(te.max(value, attrs["qmin"]), attrs["qmax"]).astype(attrs["out_dtype"])

    return te.compute([*rows, channels], out, name="layer_norm")


def _scalars(node: relax.Call) -> np.ndarray:
    """Return eps', which layers of one shape differ in."""
    return np.array([node.attrs["eps_code"]], np.int64)


@cache
def root_bounds() -> dict[str, tuple[int, int]]:
    """Rigorous bounds of the intermediates of the root, by intervals over 2**14 pieces of [1/4, 1).

    Within a piece every ``v`` and every ``y`` is an interval of integers; shifts are monotone.
    """
    edges = (2**28 + (3 * 2**28 * np.arange(2**14 + 1)) // 2**14).astype(np.int64)
    v = (edges[:-1], edges[1:] - 1)
    found: dict[str, tuple[int, int]] = {}

    def note(name: str, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        least, most = found.get(name, (0, 0))
        found[name] = (min(least, int(lo.min())), max(most, int(hi.max())))
        return lo, hi

    def times(name: str, a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
        # Exact ends in Python integers first: the claim is that they fit int64.
        ends = np.stack([np.multiply(p, q, dtype=object) for p in a for q in b])
        return note(name, ends.min(axis=0), ends.max(axis=0))

    def shifted(pair: Any, bits: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(p >> bits for p in pair)  # type: ignore[return-value]

    c0, c1, c2, c3 = RSQRT_START
    y = (np.full(len(v[0]), c3, dtype=object),) * 2
    for c in (c2, c1, c0):
        product = shifted(times("start product", v, y), 30)
        y = (product[0] + c, product[1] + c)
    y = (y[0] * 4, y[1] * 4)
    for _ in range(2):
        note("root estimate", *y)
        square = shifted(times("square of the root", y, y), 30)
        ratio = shifted(times("v times square", v, square), 30)
        rest = (3 * 2**30 - ratio[1], 3 * 2**30 - ratio[0])
        y = shifted(times("root step", y, rest), 31)
    found["root"] = (int(min(y[0])), int(max(y[1])))
    return found


def _bounds(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    attrs = node.attrs
    shape, _ = tensor_of(node, 0)
    mult, bias = constant_or_fail(node, 1, "mult"), constant_or_fail(node, 2, "bias")
    count, (lo, hi) = shape[-1], (args[0].lo, args[0].hi)
    width, furthest = hi - lo, max(abs(lo), abs(hi))
    spread = (count - 1) * width
    # Popoviciu: C*sum x**2 - (sum x)**2 <= C**2 * width**2 / 4.
    variance = (count * width) ** 2 // 4 << attrs["var_shift"]
    variance += attrs["eps_code"]
    claims = [
        Claim("row sum", min(0, count * lo), max(0, count * hi), "int32"),
        Claim("square", 0, furthest**2, "int32"),
        Claim("C times sum of squares", 0, count * count * furthest**2, "int64"),
        # Its double fits: the normalised variance stays below 2**62.
        Claim("variance (x 2)", 2, 2 * variance, "int64"),
        Claim("C times code", count * lo, count * hi, "int32"),
        Claim("centred value", -spread, spread, "int32"),
    ]
    bounds = root_bounds()
    claims += [Claim(name, *bounds[name], "int64") for name in bounds if name != "root"]
    # |D| <= sqrt((C-1) V), hence |D << a| < 2**31; |z| <= sqrt(C-1) up to the root's error.
    root = min(bounds["root"][1], _INT32_MAX)
    z = (_INT32_MAX * root >> 32) + 1
    claims += [
        Claim("reciprocal root", 0, root, "int32"),
        Claim("lifted value", -_INT32_MAX, _INT32_MAX, "int32"),
        Claim("normalised product", -_INT32_MAX * root, _INT32_MAX * root, "int64"),
        Claim("normalised value", -z, z, "int32"),
    ]
    steepest = np.abs(mult) * z
    claims.append(Claim("affine product", -int(steepest.max()), int(steepest.max()), "int64"))
    low = int((-(steepest >> 32) - 1 + bias).min())
    high = int(((steepest >> 32) + bias).max())
    claims.append(Claim("affine value", low, high, "int32"))
    codes = Interval(attrs["qmin"], attrs["qmax"])
    return clamp_interval(low >> attrs["out_shift"], high >> attrs["out_shift"], codes), claims


register(
    "layer_norm",
    ["x", "mult", "bias"],
    "Integer LayerNorm over the last axis.",
    infer=_infer,
    compute=_compute,
    bounds=_bounds,
    scalars=_scalars,
)
