"""``vitq.gelu``: elementwise GELU of integer codes, in the three families, no division.

An int8 tensor of the ``table`` family without channel gains is one look-up of 256 codes. Everything
else splits by sign (only decaying exponentials are ever taken, so nothing can blow up)::

    gelu(t) = max(t, 0) - tail(|t|)            tail(u) = u * Phi(-u), between 0 and 0.17

    p   = min(max(t, 0), ceiling[c])
    out = clamp(((p*gain[c] - H*tail_gain[c] + 2**(shift[c] - 1)) >> shift[c]) + zero_point)

with ``t = x - in_zero_point`` and ``H`` the tail as an integer below 2**16 of a fixed unit. The
gains hold ``in_scale``, the channel gains and ``1/out_scale``; past ``ceiling`` the output is
saturated, so that the gains keep 15 significant bits and every product is int32. ``H`` comes from

* ``table``: for 8-bit codes an entry for every ``|t|``; for int16 codes 256 pieces of [0, 4.5] with
  linear interpolation (error below 5e-5);
* ``poly``: ``u * p(u)**8`` with a cubic ``p ~ Phi(-u)**(1/8)`` on [0, 4.5] (error below 3e-4);
  every product is of 15-bit fractions, rounded as ``(a*b + 2**14) >> 15``;
* ``shift``: I-ViT's ``u * sigma(-1.702 u)``, ``1.702 u ~ u + (u>>1) + (u>>3) + (u>>4)``, with the
  guarded exponential ``z`` of ``relay_passes.dialect.exponent`` and, in place of the division,
  ``z/(1 + z) ~ z*(1 - z*(7/8 - 3/8*z))`` (error below 0.03 in all). No row maximum is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, te

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
from relay_passes.dialect.exponent import check_method, check_scale, masked
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
    form, design, table = tail_design(method, in_scale, furthest)
    channels = _channels(
        gains * (in_scale / out_scale),
        gains * (TAIL_UNIT[form](in_scale, design) / out_scale),
        max(codes.hi - in_zp, 1),
        max(qmax - out_zp, out_zp - qmin),
    )
    arrays = channels if table is None else [*channels, table]
    return call("gelu", x, *(as_const(a, "int32") for a in arrays), form=form, **common, **design)


def _channels(
    ratio: np.ndarray, tail_ratio: np.ndarray, largest: int, span: int
) -> list[np.ndarray]:
    """Return int32 (gain, tail_gain, ceiling, shift) a channel; products stay within 2**30."""
    tail_reach = np.abs(tail_ratio) * 2.0**16
    enough = np.ceil((span + tail_reach + 2) / np.maximum(np.abs(ratio), 1e-9))
    ceiling = np.minimum(enough, largest)
    reach = np.maximum(np.maximum(np.abs(ratio) * ceiling, tail_reach), 2.0)
    shift = np.minimum(np.floor(np.log2(2.0**30 / reach)), 28)
    if shift.min() < 1:
        raise VitqError(
            f"gelu: the output would span {reach.max():.3g} steps; the output scale is too small "
            "for its input, calibrate that site again"
        )
    scaled = [np.floor(r * 2.0**shift + 0.5) for r in (ratio, tail_ratio)]
    return [v.astype(np.int32) for v in (*scaled, ceiling, shift)]


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
        for index, label in enumerate(_CHANNEL_ARGUMENTS, 1):
            if tensor_of(node, index, ["int32"], label)[0] not in ([1], [channels]):
                raise fail(node, f"{label} must have 1 or {channels} entries")
    return relax.TensorType(shape, attrs["out_dtype"])


def _compute(tensors: Sequence[te.Tensor], attrs: Any) -> te.Tensor:
    x = tensors[0]
    if attrs["form"] == "codes":
        lowest = dtype_interval(str(x.dtype)).lo
        table = tensors[1]
        return te.compute(x.shape, lambda *i: table(x(*i).astype("int32") - lowest), name="gelu")
    per_channel = int(tensors[1].shape[0]) > 1
    table = tensors[5] if len(tensors) > 5 else None

    def element(*i: Any) -> Any:
        gain, tail_gain, ceiling, shift = (t(i[-1] if per_channel else 0) for t in tensors[1:5])
        centred = x(*i).astype("int32") - attrs["in_zero_point"]
        tail = te_tail(attrs["form"], te.max(centred, 0 - centred), attrs, table)
        total = te.min(te.max(centred, 0), ceiling) * gain - tail * tail_gain
        value = (((total >> masked(shift - 1)) + 1) >> 1) + attrs["zero_point"]
        return te.min(te.max(value, attrs["qmin"]), attrs["qmax"]).astype(attrs["out_dtype"])

    return te.compute(x.shape, element, name="gelu")


def _bounds(node: relax.Call, args: Sequence[Interval]) -> tuple[Interval, list[Claim]]:
    attrs = node.attrs
    if attrs["form"] == "codes":
        codes = value_interval(constant_or_fail(node, 1, "table"))
        lowest = dtype_interval(tensor_of(node, 0)[1]).lo
        index = Interval(args[0].lo - lowest, args[0].hi - lowest)
        return codes, [Claim("table index", index.lo, index.hi, "uint8")]
    gain, tail_gain, ceiling, shift = (
        constant_or_fail(node, index, label) for index, label in enumerate(_CHANNEL_ARGUMENTS, 1)
    )
    lo, hi = args[0].lo - attrs["in_zero_point"], args[0].hi - attrs["in_zero_point"]
    table = constant_or_fail(node, 5, "tail table") if len(node.args) > 5 else None
    tail, claims = tail_bounds(attrs["form"], max(abs(lo), abs(hi)), attrs, table)
    claims.insert(0, Claim("centred codes", lo, hi, "int32"))
    linear = np.stack([np.zeros_like(gain), gain * np.clip(hi, 0, ceiling)])
    curved = np.stack([np.zeros_like(tail_gain), tail_gain * tail])
    least = linear.min(axis=0) - curved.max(axis=0)
    most = linear.max(axis=0) - curved.min(axis=0)
    claims += [
        Claim("linear product", int(linear.min()), int(linear.max()), "int32"),
        Claim("tail product", int(curved.min()), int(curved.max()), "int32"),
        Claim("sum", int(least.min()), int(most.max()), "int32"),
        Claim("2**(shift - 1)", 1, 1 << (int(shift.max()) - 1), "int32"),
    ]
    low = int((((least >> (shift - 1)) + 1) >> 1).min()) + attrs["zero_point"]
    high = int((((most >> (shift - 1)) + 1) >> 1).max()) + attrs["zero_point"]
    claims.append(Claim("codes", low, high, "int32"))
    return clamp_interval(low, high, output_interval(node)), claims


register(
    "gelu",
    ["x", *_CHANNEL_ARGUMENTS, "table"],
    "Integer GELU, element by element.",
    infer=_infer,
    compute=_compute,
    bounds=_bounds,
)
