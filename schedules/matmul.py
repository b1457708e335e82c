"""TE definitions of the matmul operators: what every schedule must equal bit for bit.

A definition has two stages, ``acc`` (the int32 accumulator) and ``out`` (the epilogue), and carries
its :class:`~schedules.gemm.GemmSpec` as an annotation of ``out``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from .dot import dot_named
from .gemm import ANNOTATION, Epilogue, GemmSpec, Tile

__all__ = ["linear_te", "matmul_te", "packed_linear_te", "requantize_te"]


def requantize_te(value: Any, mult: Any, shift: Any) -> Any:
    """Return ``(value*mult + 2^(shift-1)) >> shift`` as an int64 expression."""
    bits = shift.astype("int64") if hasattr(shift, "astype") else tirx.const(int(shift), "int64")
    factor = mult.astype("int64") if hasattr(mult, "astype") else tirx.const(int(mult), "int64")
    one = tirx.const(1, "int64")
    rounding = tirx.shift_left(one, bits - one)
    return tirx.shift_right(value.astype("int64") * factor + rounding, bits)


def _finish(
    acc: te.Tensor,
    epilogue: Epilogue,
    spec: GemmSpec,
    scale: Callable[[Any], tuple[Any, Any]] | None,
    residual: Callable[..., Any] | None,
    zero_point: Any = None,
) -> te.Tensor:
    """Append the stage ``out`` to an accumulator; ``scale(n)`` gives multiplier and shift."""
    if zero_point is None:
        zero_point = tirx.const(epilogue.zero_point, "int64")

    def element(*index: Any) -> Any:
        value = acc(*index)
        if epilogue.kind == "acc" or scale is None:
            return value
        total = requantize_te(value, *scale(index[-1]))
        if residual is not None:
            total = total + requantize_te(
                residual(*index), epilogue.res_mult, epilogue.res_shift
            )
        total = total + zero_point
        low = tirx.const(epilogue.qmin, "int64")
        high = tirx.const(epilogue.qmax, "int64")
        return tirx.max(tirx.min(total, high), low).astype(epilogue.out_dtype)

    axes = spec.out_axes or tuple(range(len(acc.shape)))
    return te.compute(
        [acc.shape[axis] for axis in axes],
        lambda *index: element(*(index[axes.index(i)] for i in range(len(axes)))),
        name="out",
        attrs={ANNOTATION: spec.to_json()},
    )


def linear_te(
    x: te.Tensor,
    w: te.Tensor,
    bias: te.Tensor,
    epilogue: Epilogue,
    mult: te.Tensor | None = None,
    shift: te.Tensor | None = None,
    residual: te.Tensor | None = None,
) -> te.Tensor:
    """Return ``epilogue(x @ w + bias)``.

    Parameters
    ----------
    x
        int8, uint8 or int16 [..., K].
    w
        int8 [K, N].
    bias
        int32 [N].
    mult, shift
        int32 [N], for the kinds ``requant`` and ``requant_add``.
    residual
        [..., N], for ``requant_add``.
    """
    k = te.reduce_axis((0, x.shape[-1]), "k")
    total = te.compute(
        [*x.shape[:-1], w.shape[1]],
        lambda *i: te.sum(x(*i[:-1], k).astype("int32") * w(k, i[-1]).astype("int32"), axis=k),
        name="acc",
    )
    acc = te.compute(total.shape, lambda *i: total(*i) + bias(i[-1]), name="biased")
    return _finish(acc, epilogue, GemmSpec("linear", epilogue), _by_column(mult, shift), residual)


def _by_column(
    mult: te.Tensor | None, shift: te.Tensor | None
) -> Callable[[Any], tuple[Any, Any]] | None:
    if mult is None or shift is None:
        return None
    factors, bits = mult, shift
    return lambda n: (factors(n), bits(n))


def packed_linear_te(
    x: te.Tensor,
    w: te.Tensor,
    bias: te.Tensor,
    columns: int,
    epilogue: Epilogue,
    dot: str,
    lanes: int,
    offset: int = 0,
    chains: Sequence[int] = (),
    fallback: str = "",
    mult: te.Tensor | None = None,
    shift: te.Tensor | None = None,
    residual: te.Tensor | None = None,
    rows: te.Tensor | None = None,
    gather: str = "",
    tile: Tile | None = None,
) -> te.Tensor:
    """Return the same as :func:`linear_te` from packed weights.

    Parameters
    ----------
    w
        int8 [N/nt, K/kv, nt, kv], zeros where N and K are padded.
    bias, mult, shift
        int32, padded to N/nt * nt.
    columns
        N without padding.
    dot
        Name of the dot sequence that the layout is made for.
    lanes
        32-bit lanes of that sequence.
    offset
        Added to every activation code before the product (128 where int8 codes are taken as
        unsigned; ``bias`` must then hold -128 times the column sums of the weights).
    chains, fallback
        See :class:`~schedules.gemm.GemmSpec`; they change no bit.
    rows, gather
        int32 [M]: row i of the result is of row ``rows[i]`` of x (``gather = "x"``), of the
        residual (``"residual"``) or of both (``"both"``), which are matrices then. int32 [M, P],
        with ``"x"``: of the P rows ``rows[i]`` of x, side by side.
    tile
        What a record says, None for the default rules.
    """
    _, _, nt, kv = (int(s) for s in w.shape)
    of_x = rows if gather in ("x", "both") else None
    pieces = 1 if of_x is None or len(of_x.shape) == 1 else int(of_x.shape[1])
    width = int(x.shape[-1])
    k = te.reduce_axis((0, width * pieces), "k")
    shift_by = tirx.const(offset, "int32")
    sequence = dot_named(dot)

    def product(*i: Any) -> Any:
        n = i[-1]
        column, channel = sequence.column_slot(n % nt), sequence.channel_slot(k % kv)
        weight = w(n // nt, k // kv, column, channel).astype("int32")
        if of_x is None:
            code = x(*i[:-1], k)
        elif pieces == 1:
            code = x(of_x(i[0], *[0] * (len(of_x.shape) - 1)), k)
        else:
            code = x(of_x(i[0], k // width), k % width)
        return te.sum((code.astype("int32") + shift_by) * weight, axis=k)

    outer = x.shape[:-1] if rows is None else rows.shape[:1]
    total = te.compute([*outer, columns], product, name="acc")
    acc = te.compute(total.shape, lambda *i: total(*i) + bias(i[-1]), name="biased")
    spec = GemmSpec("packed_linear", epilogue, dot=dot, vectors=nt // lanes, offset=offset,
                    chains=tuple(chains), fallback=fallback, gather=gather, tile=tile)
    added: Callable[..., Any] | None = residual
    if residual is not None and rows is not None and gather != "x":
        held, table = residual, rows
        added = lambda i, n: held(table(i), n)  # noqa: E731
    return _finish(acc, epilogue, spec, _by_column(mult, shift), added)


def matmul_te(
    a: te.Tensor,
    b: te.Tensor,
    transpose_b: bool,
    epilogue: Epilogue,
    a_axes: Sequence[int] = (),
    b_axes: Sequence[int] = (),
    out_axes: Sequence[int] = (),
    residual: te.Tensor | None = None,
    scalars: te.Tensor | None = None,
) -> te.Tensor:
    """Return ``epilogue(a @ b)`` over the last two axes, the others being batch.

    Parameters
    ----------
    a
        [..., M, K], after its axes were permuted by ``a_axes`` if there are any.
    b
        [..., K, N], or [..., N, K] if ``transpose_b``, after ``b_axes``.
    epilogue
        ``acc``, ``requant`` or ``requant_add``.
    a_axes, b_axes, out_axes
        Permutations of the operands and of the result, as in ``permute_dims``.
    residual
        [..., M, N] for ``requant_add``; a leading axis may be 1.
    scalars
        int32 (multiplier, shift) or (multiplier, shift, zero point), unless ``acc``.
    """
    left, left_shape = _permuted(a, a_axes)
    right, right_shape = _permuted(b, b_axes)
    columns = right_shape[-2] if transpose_b else right_shape[-1]
    k = te.reduce_axis((0, left_shape[-1]), "k")

    def product(*i: Any) -> Any:
        *batch, row, column = i
        factor = right(*batch, column, k) if transpose_b else right(*batch, k, column)
        return te.sum(left(*batch, row, k).astype("int32") * factor.astype("int32"), axis=k)

    acc = te.compute([*left_shape[:-1], columns], product, name="acc")
    spec = GemmSpec("matmul", epilogue, transpose_b=transpose_b, a_axes=tuple(a_axes),
                    b_axes=tuple(b_axes), out_axes=tuple(out_axes))
    scale, zero_point = None, None
    if scalars is not None:
        factor, bits = scalars(0), scalars(1)
        scale = lambda _: (factor, bits)  # noqa: E731
        zero_point = scalars(2).astype("int64") if int(scalars.shape[0]) > 2 else None
    if residual is None:
        return _finish(acc, epilogue, spec, scale, None, zero_point)
    held, extents = residual, [int(extent) for extent in residual.shape]

    def added(*i: Any) -> Any:
        return held(*(0 if extent == 1 else at for at, extent in zip(i, extents, strict=True)))

    return _finish(acc, epilogue, spec, scale, added, zero_point)


def _permuted(
    x: te.Tensor, axes: Sequence[int]
) -> tuple[Callable[..., Any], list[Any]]:
    """Return the elements and the shape of ``permute(x, axes)``."""
    if not axes:
        return x, list(x.shape)

    def element(*index: Any) -> Any:
        return x(*(index[list(axes).index(i)] for i in range(len(axes))))

    return element, [x.shape[axis] for axis in axes]
