"""A tiny ViT in exact canonical float form, built by hand, for tests that need no front end."""

from __future__ import annotations

import json

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op as R

__all__ = ["tiny_vit_module"]


class _Net:
    """Emits canonical patterns with random constants."""

    def __init__(self, bb: relax.BlockBuilder, seed: int) -> None:
        self.bb = bb
        self.rng = np.random.default_rng(seed)

    def const(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> relax.Expr:
        return relax.const((self.rng.standard_normal(shape) * scale + offset).astype("float32"))

    def linear(self, x: relax.Expr, out: int) -> relax.Var:
        width = int(x.ty.shape[-1])
        product = self.bb.emit(R.matmul(x, self.const(width, out, scale=width**-0.5)))
        return self.bb.emit(R.add(product, self.const(out, scale=0.1)))

    def norm(self, x: relax.Expr) -> relax.Var:
        dim = int(x.ty.shape[-1])
        gamma, beta = self.const(dim, scale=0.2, offset=1.0), self.const(dim, scale=0.1)
        return self.bb.emit(R.nn.layer_norm(x, gamma, beta, axes=[-1], epsilon=1e-6))

    def heads(self, x: relax.Expr, heads: int, axes: list[int]) -> relax.Var:
        b, n, c = (int(s) for s in x.ty.shape)
        split = self.bb.emit(R.reshape(x, (b, n, heads, c // heads)))
        return self.bb.emit(R.permute_dims(split, axes))

    def attention(self, x: relax.Expr, heads: int) -> relax.Var:
        b, n, c = (int(s) for s in x.ty.shape)
        q = self.heads(self.linear(x, c), heads, [0, 2, 1, 3])
        k = self.heads(self.linear(x, c), heads, [0, 2, 3, 1])
        v = self.heads(self.linear(x, c), heads, [0, 2, 1, 3])
        logits = self.bb.emit(R.matmul(q, k))
        scale = relax.const(np.float32((c // heads) ** -0.5))
        p = self.bb.emit(R.nn.softmax(self.bb.emit(R.multiply(logits, scale)), axis=-1))
        out = self.bb.emit(R.permute_dims(self.bb.emit(R.matmul(p, v)), [0, 2, 1, 3]))
        return self.linear(self.bb.emit(R.reshape(out, (b, n, c))), c)

    def block(self, x: relax.Expr, heads: int, ratio: int) -> relax.Var:
        x = self.bb.emit(R.add(x, self.attention(self.norm(x), heads)))
        width = int(x.ty.shape[-1])
        hidden = self.bb.emit(R.nn.gelu(self.linear(self.norm(x), width * ratio)))
        return self.bb.emit(R.add(x, self.linear(hidden, width)))

    def patches(self, x: relax.Expr, patch: int) -> relax.Var:
        b, c, h, w = (int(s) for s in x.ty.shape)
        gh, gw = h // patch, w // patch
        grid = self.bb.emit(R.reshape(x, (b, c, gh, patch, gw, patch)))
        grid = self.bb.emit(R.permute_dims(grid, [0, 2, 4, 1, 3, 5]))
        return self.bb.emit(R.reshape(grid, (b, gh * gw, c * patch * patch)))


def tiny_vit_module(
    dim: int = 32,
    depth: int = 2,
    heads: int = 2,
    image: int = 16,
    patch: int = 4,
    classes: int = 10,
    batch: int = 1,
    pool: str = "token",
    mlp_ratio: int = 4,
    seed: int = 0,
) -> tvm.IRModule:
    """Return a random pre-norm ViT of ``(image/patch)^2 + 1`` tokens in canonical float form.

    Parameters
    ----------
    pool : {"token", "avg", "pair"}
        Class token, mean over all tokens, or the first two tokens side by side (as distilled DeiT).
    """
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((batch, 3, image, image), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            net = _Net(bb, seed)
            embedded = net.linear(net.patches(x, patch), dim)
            count = (image // patch) ** 2
            embedded = bb.emit(R.add(embedded, net.const(1, count, dim, scale=0.1)))
            tokens = bb.emit(R.concat([net.const(batch, 1, dim), embedded], axis=1))
            for _ in range(depth):
                tokens = net.block(tokens, heads, mlp_ratio)
            tokens = net.norm(tokens)
            if pool == "avg":
                pooled = bb.emit(R.mean(tokens, axis=[1], keepdims=False))
            elif pool == "pair":
                pair = bb.emit(R.strided_slice(tokens, [1], [0], [2]))
                pooled = bb.emit(R.reshape(pair, (batch, 2 * dim)))
            else:
                token = bb.emit(R.strided_slice(tokens, [1], [0], [1]))
                pooled = bb.emit(R.reshape(token, (batch, dim)))
            out = bb.emit_output(net.linear(pooled, classes))
        bb.emit_func_output(out)
    model = {
        "name": "tiny_vit",
        "source": "tests",
        "batch": batch,
        "input": {"layout": "NCHW", "dtype": "float32", "shape": [batch, 3, image, image]},
        "preprocess": {
            "input_size": [3, image, image],
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "crop_mode": "center",
        },
        "num_classes": classes,
        "labels": None,
        "factory": None,
    }
    return bb.get().with_attr("vitq.model", json.dumps(model))
