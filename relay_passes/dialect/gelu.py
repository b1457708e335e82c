"""``vitq.gelu``: elementwise GELU of integer codes, in the three families, no division.

An int8 tensor of the ``table`` family without channel gains is one look-up of 256 codes. Everything
else splits by sign (only decaying exponentials are ever taken, so nothing can blow up)::

    gelu(t) = max(t, 0) - tail(|t|)            tail(u) = u * Phi(-u), between 0 and 0.17

    p   = min(max(t, 0), ceiling[c])                 1. narrow, for 8-bit output; 2. wide
    1.  a   = ((p*lift[c]) * gain[c]) >> 16              b = q15(H, tail_gain[c])
        out = clamp(q15(a - b + offset, unit))
    2.  out = clamp(((p*gain[c] - H*tail_gain[c] + 2**(shift[c] - 1)) >> shift[c]) + zero_point)

with ``t = x - in_zero_point`` and ``H`` the tail as an integer below 2**15 of a fixed unit. The
gains hold ``in_scale``, the channel gains and ``1/out_scale``; past ``ceiling`` the output is
saturated, so that the gains keep their bits. Every value of the narrow form is a 16-bit word, the
output with 4 to 7 fractional bits (``unit = 2**15 >> bits``, ``offset`` the zero point with as
many); ``q15(a, b) = (a*b + 2**14) >> 15``. The wide form's gains keep 15 significant bits and its
products are int32. ``H`` comes from

* ``table``: for 8-bit codes an entry for every ``|t|``; for int16 codes 256 pieces of [0, 4.5] with
  linear interpolation (error below 5e-5);
* ``poly``: ``u/2 * p(u)**8`` with a cubic ``p ~ (2*Phi(-u))**(1/8)`` on [0, 4.5] (error below
  2e-4); every product is of 15-bit fractions;
* ``shift``: I-ViT's ``u * sigma(-1.702 u)``, ``1.702 u ~ u + (u>>1) + (u>>3) + (u>>4)``, with the
  guarded exponential ``z`` of ``relay_passes.dialect.exponent`` and, in place of the division,
  ``z/(1 + z) ~ z*(1 - z*(7/8 - 3/8*z))`` (error below 0.03 in all). No row maximum is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    output_interval,
    tensor_of,
    value_interval,
)
from relay_passes.dialect.exponent import check_method, check_scale, masked, q15
from relay_passes.dialect.gelu_tail import (
    TAIL_UNIT,
    exact_gelu,
    tail_bounds,
    tail_design,
    te_tail,
)
from relay_passes.dialect.registry import Claim, Interval, call, register
from relay_passes.dialect.requantize import output_codes
from relay_passes.errors import VitqError

__all__ = ["gelu"]

_CHANNEL_ARGUMENTS = ("gain", "tail_gain", "ceiling", "shift")
_NARROW = ("uint16", "int16", "uint16", "uint16")
"""dtypes of the channel arguments in the narrow form, whose ``shift`` is ``lift``."""
_TAIL_ARGUMENTS = {"shift": (), "poly": ("uint16",), "interpolate": ("uint16", "int32"),
                   "direct": ("int32",)}
_FIRST_TAIL = 6


def gelu(
    x: relax.Expr,
    in_scale: float,
    in_zp: int,
    out_scale: float,
    out_zp: int,
    qmin: int,
    qmax: int,
    out_dtype: str,
    method: str,
    channel_scale: np.ndarray | None = None,
) -> relax.Call:
    """GELU, element by element, times a gain per channel if one is given.

    Parameters
    ----------
    x : relax.Expr
        int8, uint8 or int16 codes [..., N].
    in_scale, in_zp : float, int
        Step and zero point of ``x``.
    out_scale, out_zp, qmin, qmax, out_dtype
        Step, zero point, clamp and dtype of the output codes.
    method : {"shift", "poly", "table"}
        Family of the approximation.
    channel_scale : ndarray [N], optional
        The output is ``gelu(x) * channel_scale``.

    Raises
    ------
    VitqError
        If the scales are not usable, or too far apart for int32.
    """
    check_method("gelu", method)
    in_scale = check_scale("gelu", "in_scale", in_scale)
    out_scale = check_scale("gelu", "out_scale", out_scale)
    shape, dtype = [int(n) for n in x.ty.shape.values], str(x.ty.dtype)
    if dtype not in ACTIVATION_DTYPES:
        raise VitqError(f"gelu: x must be {' or '.join(ACTIVATION_DTYPES)}, not {dtype}")
    codes = dtype_interval(dtype)
    common = {
        "method": method,
        "in_zero_point": int(in_zp),
        **output_codes(out_zp, qmin, qmax, out_dtype),
    }
    gains = np.ones(1) if channel_scale is None else np.asarray(channel_scale, np.float64)
    if gains.ndim != 1 or gains.size not in (1, shape[-1] if shape else 1):
        raise VitqError(f"gelu: channel_scale {gains.shape} does not fit x {shape}")
    if not np.isfinite(gains).all():
        raise VitqError("gelu: channel_scale is not finite")

    if method == "table" and dtype != "int16" and gains.size == 1:
        centred = np.arange(codes.lo, codes.hi + 1, dtype=np.float64) - in_zp
        real = exact_gelu(centred * in_scale) * gains[0]
        table = np.clip(np.floor(real / out_scale + 0.5) + out_zp, qmin, qmax).astype(out_dtype)
        return call("gelu", x, as_const(table, out_dtype), form="codes", **common)

    furthest = max(codes.hi - in_zp, in_zp - codes.lo)
    form, design, constants = tail_design(method, in_scale, furthest)
    scaled = _Channels(
        gains * (in_scale / out_scale),
        gains * (TAIL_UNIT[form](in_scale, design) / out_scale),
        max(codes.hi - in_zp, 1),
        max(qmax - out_zp, out_zp - qmin),
        int(out_zp),
    )
    arrays = None if furthest > 2**15 or out_dtype == "int16" else scaled.narrow()
    arrays = [*(scaled.wide() if arrays is None else arrays), *constants]
    return call("gelu", x, *(as_const(a, str(a.dtype)) for a in arrays), form=form, **common,
                **design)


@dataclass(frozen=True)
class _Channels:
    """Output codes that one code of ``p`` and of ``H`` are worth, and what fixed point needs."""

    ratio: np.ndarray
    tail_ratio: np.ndarray
    largest: int
    span: int
    zero_point: int

    def _reach(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (ceiling, reach of the tail, reach of both) in output codes."""
        tail = np.abs(self.tail_ratio) * 2.0**15
        enough = np.ceil((self.span + tail + 2) / np.maximum(np.abs(self.ratio), 1e-9))
        ceiling = np.minimum(enough, self.largest)
        return ceiling, tail, np.abs(self.ratio) * ceiling + tail

    def narrow(self) -> list[np.ndarray] | None:
        """Return (gain, tail_gain, ceiling, lift, (offset, unit)), None if 16 bits are too few."""
        ceiling, tail, reach = self._reach()
        if self.ratio.min() < 0:
            return None
        lift = (2**16 - 1) // ceiling
        room = np.min([
            (2.0**16 - 1) * lift / np.maximum(self.ratio * 2.0**16, 1.0),
            (2.0**15 - 1) / np.maximum(tail, 1.0),
            (2.0**15 - 2) / (reach + abs(self.zero_point) + 1),
        ])
        bits = min(math.floor(math.log2(room)), 7)
        if bits < 4:
            return None
        gain = np.floor(self.ratio * 2.0 ** (bits + 16) / lift + 0.5)
        tail_gain = np.floor(self.tail_ratio * 2.0 ** (bits + 15) + 0.5)
        values = (gain, tail_gain, ceiling, lift)
        finish = np.array([self.zero_point << bits, 2**15 >> bits], np.int16)
        return [*(v.astype(t) for v, t in zip(values, _NARROW, strict=True)), finish]

    def wide(self) -> list[np.ndarray]:
        """Return int32 (gain, tail_gain, ceiling, shift, zero point); products within 2**30."""
        ceiling, tail, _ = self._reach()
        reach = np.maximum(np.maximum(np.abs(self.ratio) * ceiling, tail), 2.0)
        shift = np.minimum(np.floor(np.log2(2.0**30 / reach)), 28)
        if shift.min() < 1:
            raise VitqError(
                f"gelu: the output would span {reach.max():.3g} steps; the output scale is too "
                "small for its input, calibrate that site again"
            )
        gains = [np.floor(r * 2.0**shift + 0.5) for r in (self.ratio, self.tail_ratio)]
        return [v.astype(np.int32)
                for v in (*gains, ceiling, shift, np.array([self.zero_point]))]


def _infer(node: relax.Call) -> relax.TensorType:
    shape, dtype = tensor_of(node, 0, ACTIVATION_DTYPES, "x")
    attrs = node.attrs
    check_method("vitq.gelu", attrs["method"])
    output_interval(node)
    if attrs["form"] == "codes":
        table, _ = tensor_of(node, 1, [attrs["out_dtype"]], "table")
        if dtype == "int16" or table != [256]:
            raise fail(node, f"a table of codes has 256 entries for 8-bit x, not {table}, {dtype}")
    else:
        channels = shape[-1] if shape else 1
        narrow = tensor_of(node, 1)[1] == "uint16"
        dtypes = _NARROW if narrow else ("int32",) * 4
        for index, label in enumerate(_CHANNEL_ARGUMENTS, 1):
            if tensor_of(node, index, [dtypes[index - 1]], label)[0] not in ([1], [channels]):
                raise fail(node, f"{label} must have 1 or {channels} entries")
        tensor_of(node, 5, ["int16" if narrow else "int32"], "finish")
        for index, wanted in enumerate(_TAIL_ARGUMENTS[attrs["form"]], _FIRST_TAIL):
            tensor_of(node, index, [wanted], "tail")
    return relax.TensorType(shape, attrs["out_dtype"])


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    x = tensors[0]
    if attrs["form"] == "codes":
        lowest = dtype_interval(str(x.dtype)).lo
        table = tensors[1]
        return te.compute(x.shape, lambda *i: table(x(*i).astype("int32") - lowest), name="gelu")
    narrow = str(tensors[1].dtype) == "uint16"

    def element(*i: Any) -> Any:
        channel = [t(i[-1] if int(t.shape[0]) > 1 else 0) for t in tensors[1:5]]
        centred = x(*i).astype("int32") - attrs["in_zero_point"]
        magnitude = te.max(centred, 0 - centred)
        tail = te_tail(attrs["form"], magnitude, attrs, tensors[_FIRST_TAIL:])
        positive = te.min(te.max(centred, 0), channel[2].astype("int32"))
        finish = _finish_narrow if narrow else _finish_wide
        value = finish(positive, tail, channel, tensors[5])
        return te.min(te.max(value, attrs["qmin"]), attrs["qmax"]).astype(attrs["out_dtype"])

    return te.compute(x.shape, element, name="gelu")


def _finish_narrow(positive: Any, tail: Any, channel: Sequence[Any], finish: te.Tensor) -> Any:
    gain, tail_gain, _, lift = channel
    product = (positive.astype("uint16") * lift).astype("uint32") * gain.astype("uint32")
    linear = (product >> tirx.const(16, "uint32")).astype("int16")
    curved = q15(tail, tail_gain.astype("int32")).astype("int16")
    total = linear - curved + finish(0)
    # The mask changes nothing; it shows that the unit is positive.
    return q15(total.astype("int32"), finish(1).astype("int32") & (2**15 - 1))


def _finish_wide(positive: Any, tail: Any, channel: Sequence[Any], finish: te.Tensor) -> Any:
    gain, tail_gain, _, shift = channel
    total = positive * gain - tail * tail_gain
    return (((total >> masked(shift - 1)) + 1) >> 1) + finish(0)


def _bounds(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    attrs = node.attrs
    if attrs["form"] == "codes":
        codes = value_interval(constant_or_fail(node, 1, "table"))
        lowest = dtype_interval(tensor_of(node, 0)[1]).lo
        index = Interval(args[0].lo - lowest, args[0].hi - lowest)
        return codes, [Claim("table index", index.lo, index.hi, "uint8")]
    gain, tail_gain, ceiling, shift, finish = (
        constant_or_fail(node, index, "gain") for index in range(1, _FIRST_TAIL)
    )
    lo, hi = args[0].lo - attrs["in_zero_point"], args[0].hi - attrs["in_zero_point"]
    constants = [constant_or_fail(node, i, "tail") for i in range(_FIRST_TAIL, len(node.args))]
    tail, claims = tail_bounds(attrs["form"], max(abs(lo), abs(hi)), attrs, constants)
    claims.insert(0, Claim("centred codes", lo, hi, "int32"))
    positive = np.clip(hi, 0, ceiling)
    if tensor_of(node, 1)[1] == "uint16":
        ends, more = _narrow_bounds(positive, tail, gain, tail_gain, shift, finish)
    else:
        ends, more = _wide_bounds(positive, tail, gain, tail_gain, shift, int(finish[0]))
    claims += [*more, Claim("codes", *ends, "int32")]
    return clamp_interval(*ends, output_interval(node)), claims


def _narrow_bounds(
    positive: np.ndarray, tail: int, gain: np.ndarray, tail_gain: np.ndarray, lift: np.ndarray,
    finish: np.ndarray
) -> tuple[tuple[int, int], list[Claim]]:
    """Return (interval of the codes before the clamp, claims) of the narrow form."""
    lifted = positive * lift
    linear, curved = lifted * gain >> 16, q15(tail, tail_gain)
    low, high = -curved.max(), linear.max()
    offset, unit = (int(v) for v in finish)
    claims = [
        Claim("lifted value", 0, int(lifted.max()), "uint16"),
        Claim("linear product", 0, int((lifted * gain).max()), "uint32"),
        Claim("linear part", 0, int(linear.max()), "int16"),
        Claim("curved part", 0, int(curved.max()), "int16"),
        Claim("difference", int(low), int(high), "int16"),
        Claim("sum", int(low + offset), int(high + offset), "int16"),
    ]
    return (int(q15(low + offset, unit)), int(q15(high + offset, unit))), claims


def _wide_bounds(
    positive: np.ndarray, tail: int, gain: np.ndarray, tail_gain: np.ndarray, shift: np.ndarray,
    zero_point: int
) -> tuple[tuple[int, int], list[Claim]]:
    """Return (interval of the codes before the clamp, claims) of the wide form."""
    linear = np.stack([np.zeros_like(gain), gain * positive])
    curved = np.stack([np.zeros_like(tail_gain), tail_gain * tail])
    least = linear.min(axis=0) - curved.max(axis=0)
    most = linear.max(axis=0) - curved.min(axis=0)
    claims = [
        Claim("linear product", int(linear.min()), int(linear.max()), "int32"),
        Claim("tail product", int(curved.min()), int(curved.max()), "int32"),
        Claim("sum", int(least.min()), int(most.max()), "int32"),
        Claim("2**(shift - 1)", 1, 1 << (int(shift.max()) - 1), "int32"),
    ]
    low = int((((least >> (shift - 1)) + 1) >> 1).min()) + zero_point
    high = int((((most >> (shift - 1)) + 1) >> 1).max()) + zero_point
    return (low, high), claims


register(
    "gelu",
    ["x", *_CHANNEL_ARGUMENTS, "finish", "scalars", "table"],
    "Integer GELU, element by element.",
    infer=_infer,
    compute=_compute,
    bounds=_bounds,
)
