"""What an artefact says of kernels that do what several operators did."""

from __future__ import annotations

import tvm
from tvm import te

from tvm_vitq.artifact.kernels import describe_kernels


def kernel(operator: str, *columns: int) -> tvm.tirx.PrimFunc:
    """Return a function of ``x [197, 64]`` with one result ``[197, n]`` for each of ``columns``."""
    x = te.placeholder((197, 64), "int8", name="x")
    results = [te.compute((197, n), lambda i, j: x[i, 0], name=f"y{k}")
               for k, n in enumerate(columns)]  # fmt: skip
    return te.create_prim_func([x, *results]).with_attr("vitq.op", operator)


def test_linears_side_by_side_are_counted_together() -> None:
    linear = "vitq.packed_linear_requant"
    mod = tvm.IRModule({
        "one": kernel(linear, 32),
        "qkv": kernel("+".join([linear] * 3), 32, 32, 96),
        "fc1": kernel(f"{linear}+vitq.gelu", 256),
        "attention": kernel("vitq.matmul_requant+vitq.softmax+vitq.matmul_requant", 64),
    })  # fmt: skip
    found = describe_kernels(mod, {})
    assert found["one"]["shape"] == [197, 32, 64] and found["one"]["macs"] == 197 * 32 * 64
    assert found["qkv"]["shape"] == [197, 160, 64] and found["qkv"]["macs"] == 197 * 160 * 64
    assert found["fc1"]["shape"] == [197, 256, 64]
    assert found["attention"] == {"op": "vitq.matmul_requant+vitq.softmax+vitq.matmul_requant"}
