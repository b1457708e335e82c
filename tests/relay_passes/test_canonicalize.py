"""The canonicalisation pass as a whole: grammar, errors, names, raw pixels."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op as R

from relay_passes.canonicalize import Canonicalize, canonicalize, check_canonical
from relay_passes.canonicalize.naming import digest
from relay_passes.canonicalize.uint8_input import fold_uint8_input
from relay_passes.errors import VitqError
from tests.helpers.tiny import tiny_vit_module
from tests.relay_passes.canonical_helpers import array, const, function, run

IMAGE = (1, 3, 4, 4)


def classify(e, x, w=None):
    """The shortest model: pixels to logits; GELU keeps scalars from folding into the weight."""
    w = array(48, 5) if w is None else w
    return e(R.matmul(e(R.reshape(x, (1, 48))), const(w)))


def wrapped(op):
    """A model with ``op`` before its last linear layer."""

    def body(e, x):
        return classify(e, e(R.nn.gelu(op(e, x))))

    return function(IMAGE, body)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("batch", [1, 3])
def test_canonical_module_passes_and_stays_the_same(pool: str, batch: int) -> None:
    mod = tiny_vit_module(pool=pool, batch=batch)
    check_canonical(mod)
    once = canonicalize(mod)
    check_canonical(once)
    tvm.ir.assert_structural_equal(canonicalize(once)["main"], once["main"])
    assert once.attrs["vitq.model"] == mod.attrs["vitq.model"]
    x = array(batch, 3, 16, 16)
    np.testing.assert_allclose(run(once, x), run(mod, x), rtol=1e-4, atol=1e-5)


def test_names_stay_the_same() -> None:
    names = {digest(array(48, 5)): "head.weight"}
    once = canonicalize(function(IMAGE, classify), constants=names)
    assert once["main"].body.body.name == "head"
    assert canonicalize(once)["main"].body.body.name == "head"


def test_pass_object() -> None:
    mod = tiny_vit_module(depth=1)
    tvm.ir.assert_structural_equal(Canonicalize()(mod)["main"], canonicalize(mod)["main"])


def test_parameters_as_arguments_name_the_bindings() -> None:
    x = relax.Var("x", relax.TensorType(IMAGE, "float32"))
    w = relax.Var("p_head", relax.TensorType((48, 5), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            out = builder.emit_output(R.matmul(builder.emit(R.reshape(x, (1, 48))), w))
        builder.emit_func_output(out)
    mod = builder.get()
    mod["main"] = mod["main"].with_attr("params", [tvm.runtime.tensor(array(48, 5))])
    result = canonicalize(mod, names={"p_head": "model.head.weight"})
    assert result["main"].body.body.name == "model_head"
    assert len(result["main"].params) == 1


UNSUPPORTED = {
    "silu": (lambda e, x: e(R.nn.silu(x)), "nn.silu"),
    "relu": (lambda e, x: e(R.nn.relu(x)), "nn.relu"),
    "product": (lambda e, x: e(R.multiply(x, e(R.nn.gelu(x)))), "multiply"),
    "gain": (lambda e, x: e(R.multiply(e(R.nn.gelu(x)), const(array(4)))), "multiply"),
    "doubled": (lambda e, x: e(R.multiply(e(R.nn.gelu(x)), const(2.0))), "multiply"),
    "softmax": (lambda e, x: e(R.nn.softmax(x)), "softmax"),
    "pooling": (lambda e, x: e(R.nn.avg_pool2d(x, [1, 1])), "nn.avg_pool2d"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_operator_is_named(case: str) -> None:
    op, name = UNSUPPORTED[case]
    with pytest.raises(VitqError, match=rf"operator {name} .*near .* is not supported; supported"):
        canonicalize(wrapped(op))


def test_error_is_one_line_and_says_where() -> None:
    def body(e, x):
        hidden = e(R.matmul(e(R.reshape(x, (1, 48))), const(array(48, 5))))
        return e(R.nn.silu(hidden))

    with pytest.raises(VitqError, match=r"near blocks\.0\.mlp\.fc1 ") as caught:
        names = {digest(array(48, 5)): "blocks.0.mlp.fc1.weight"}
        canonicalize(function(IMAGE, body), constants=names)
    assert "\n" not in str(caught.value)


def test_operator_with_several_results_is_named() -> None:
    def body(e, x):
        stats = [const(np.ones(3)) for _ in range(4)]
        y = e(R.nn.batch_norm(x, *stats, axis=1))
        return classify(e, e(relax.TupleGetItem(y, 0)))

    with pytest.raises(VitqError, match=r"operator nn.batch_norm near .* is not supported"):
        canonicalize(function(IMAGE, body))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_weights(bad: float) -> None:
    w = array(48, 5)
    w[3, 2] = bad
    with pytest.raises(VitqError, match=r"hold 1 NaN or Inf of 240 values"):
        canonicalize(function(IMAGE, lambda e, x: classify(e, x, w)))


def test_features_instead_of_logits() -> None:
    with pytest.raises(VitqError, match=r"returns \[1, 3, 4, 4\]; logits"):
        canonicalize(function(IMAGE, lambda e, x: e(R.nn.gelu(x))))


def test_wrong_input_type() -> None:
    with pytest.raises(VitqError, match=r"takes float32 \[1, 48\]"):
        canonicalize(function((1, 48), lambda e, x: e(R.matmul(x, const(array(48, 5))))))


def test_dynamic_shape() -> None:
    n = tvm.tirx.Var("n", "int64")
    with pytest.raises(VitqError, match="dynamic shape"):
        canonicalize(function((n, 3, 4, 4), lambda e, x: e(R.nn.gelu(x))))


def test_two_outputs() -> None:
    def body(e, x):
        y = classify(e, x)
        return relax.Tuple([y, y])

    with pytest.raises(VitqError, match="returns 2 tensors"):
        canonicalize(function(IMAGE, body))


def test_check_canonical_rejects_what_the_importer_writes() -> None:
    mod = wrapped(lambda e, x: e(R.nn.conv2d(x, const(array(3, 3, 1, 1)))))
    with pytest.raises(VitqError, match="conv2d"):
        check_canonical(mod)


def test_raw_pixels() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    mod = canonicalize(tiny_vit_module(depth=1))
    raw = fold_uint8_input(mod, mean, std)
    check_canonical(raw)
    assert [str(raw["main"].params[0].ty.dtype), raw["main"].params[0].ty.shape[3]] == ["uint8", 3]
    first = raw["main"].body.blocks[0].bindings[0].value
    assert first.op.name == "relax.dequantize"
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype("uint8")
    x = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype("float32")
    np.testing.assert_allclose(run(raw, pixels), run(mod, x), rtol=1e-3, atol=1e-4)


def test_raw_pixels_need_a_linear_layer_first() -> None:
    mod = canonicalize(wrapped(lambda e, x: e(R.nn.gelu(x))))
    with pytest.raises(VitqError, match="the pixels reach gelu"):
        fold_uint8_input(mod, (0.5,) * 3, (0.5,) * 3)
