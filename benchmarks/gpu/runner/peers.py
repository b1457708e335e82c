"""The peers: PyTorch in every precision, eager, as CUDA graphs and compiled; int8; ONNX Runtime.

A peer makes a function that starts the network on input set ``i`` and returns its logits, without
waiting for the device. CUDA graphs hold one graph for each input set, so that nothing is copied.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .models import WindowAttention, build

__all__ = ["PEERS", "Int8Linear", "Peer", "Unavailable", "quantize_linears"]

Run = Callable[[int], Any]


class Unavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class Peer:
    """A way to run the float model, or its int8 form.

    Attributes
    ----------
    name
    kind
        ``fp32``, ``tf32``, ``half`` or ``int8``: which bars it counts for.
    stage
        ``quick``, ``compile``, ``int8`` or ``ort``: when the runner takes it.
    dtype
    tf32, graph, compiled, int8, fused
        Options: TF32 in matrix products, CUDA graphs, ``torch.compile``, int8 linears, PyTorch's
        fused attention in Swin's windows too (ViT always has it; such a peer is for Swin only).
    """

    name: str
    kind: str
    stage: str
    dtype: torch.dtype
    tf32: bool = False
    graph: bool = True
    compiled: bool = False
    int8: bool = False
    fused: bool = False

    def suits(self, architecture: Mapping[str, Any]) -> bool:
        """Whether this is a peer of its own for an architecture."""
        return not self.fused or architecture["family"] == "swin"

    def prepare(
        self, architecture: Mapping[str, Any], images: Sequence[Tensor],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Run:  # fmt: skip
        """Return a function that runs the network on ``images[i]``.

        Parameters
        ----------
        architecture
            See :func:`runner.models.build`.
        images
            Input sets, float32 ``[N, C, H, W]`` on the device.
        weights
            timm's state dict; None for random ones, which take the same time.

        Raises
        ------
        Unavailable
            If it cannot run here.
        """
        device = images[0].device
        if self.graph and device.type != "cuda":
            raise Unavailable("CUDA graphs need a GPU")
        torch.manual_seed(0)
        model = build(architecture, weights, self.fused)
        if self.int8:
            quantize_linears(model, images[0][:1].cpu())
        if self.stage == "ort":
            return _onnx_runtime(self, model, images)
        model = model.to(device, self.dtype)
        sets = [x.to(self.dtype) for x in images]
        if self.dtype != torch.float32:
            model, sets = (model.to(memory_format=torch.channels_last),
                           [x.to(memory_format=torch.channels_last) for x in sets])  # fmt: skip
        call: Callable[[Tensor], Tensor] = model
        if self.compiled:
            # Its own CUDA graphs copy the input; ours are recorded below.
            mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
            torch._dynamo.reset()
            call = torch.compile(model, mode=mode)

        def run(i: int) -> Tensor:
            with torch.inference_mode(), _tf32(self.tf32):
                return call(sets[i])

        run(0)
        return _graphs(run, len(sets)) if self.graph else run


@contextmanager
def _tf32(allowed: bool) -> Any:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _graphs(run: Callable[[int], Tensor], sets: int) -> Run:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            run(i % sets)
    torch.cuda.current_stream().wait_stream(stream)
    graphs: list[Any] = []
    results: list[Tensor] = []
    for i in range(sets):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            results.append(run(i))
        graphs.append(graph)

    def replay(i: int) -> Tensor:
        graphs[i].replay()
        return results[i]

    return replay


class Int8Linear(nn.Module):
    """A linear on ``torch._int_mm``: static scale of the activations, one a channel of weights."""

    def __init__(self, linear: nn.Linear, largest: float) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1) / 127
        codes = (linear.weight / scale[:, None]).round().clamp(-128, 127).to(torch.int8)
        # cuBLAS wants the second factor column by column, which is how W^T lies.
        self.register_buffer("codes", codes.contiguous())
        step = max(largest, 1e-6) / 127
        self.inverse = 1.0 / step
        self.register_buffer("scale", scale * step)
        self.register_buffer("bias", linear.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        """Leave the scales in float32, whatever the model is cast to: sums exceed float16."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.codes.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Quantize, multiply, scale back."""
        q = (x * self.inverse).round().clamp(-128, 127).to(torch.int8)
        y = torch._int_mm(q.reshape(-1, q.shape[-1]), self.codes.t()) * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_linears(model: nn.Module, image: Tensor) -> None:
    """Replace a model's linears but the head, which has too few rows, with int8 ones.

    Parameters
    ----------
    model
        On the CPU, float32.
    image
        One image, for the ranges.
    """
    linears = {name: part for name, part in model.named_modules()
               if isinstance(part, nn.Linear) and not name.startswith("head")}  # fmt: skip
    largest: dict[str, float] = {}
    hooks = [part.register_forward_pre_hook(
        lambda _part, x, name=name: largest.__setitem__(name, float(x[0].abs().max())))
        for name, part in linears.items()]  # fmt: skip
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    for name, part in linears.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Int8Linear(part, largest[name]))


def _onnx_runtime(peer: Peer, model: nn.Module, images: Sequence[Tensor]) -> Run:
    try:
        import onnxruntime
    except ImportError:
        raise Unavailable("onnxruntime is not installed") from None
    on_gpu = images[0].device.type == "cuda"
    provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Unavailable(f"this onnxruntime has no {provider}")
    for part in model.modules():
        if isinstance(part, WindowAttention):
            part.fused = False
    model = model.to(images[0].device, peer.dtype)
    sets = [x.to(peer.dtype).contiguous() for x in images]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with torch.inference_mode():
            torch.onnx.export(model, (sets[0],), str(path), dynamo=True, verbose=False,
                              external_data=False)  # fmt: skip
        options: dict[str, Any] = {"use_tf32": int(peer.tf32)} if on_gpu else {}
        session = onnxruntime.InferenceSession(str(path), providers=[(provider, options)])
    place = ("cuda", 0) if on_gpu else ("cpu", 0)
    entry, leaving = session.get_inputs()[0].name, session.get_outputs()[0].name
    element = {torch.float32: "float32", torch.float16: "float16"}[peer.dtype]
    bindings = []
    for x in sets:
        binding = session.io_binding()
        binding.bind_input(entry, *place, element, tuple(x.shape), x.data_ptr())
        binding.bind_output(leaving, *place)
        bindings.append((binding, x))

    def run(i: int) -> Any:
        session.run_with_iobinding(bindings[i][0])
        return bindings[i][0].get_outputs()

    run(0)
    return run


_F32, _F16, _B16 = torch.float32, torch.float16, torch.bfloat16

PEERS = [
    Peer("torch fp32", "fp32", "quick", _F32, graph=False),
    Peer("torch fp32, graph", "fp32", "quick", _F32),
    Peer("torch tf32, graph", "tf32", "quick", _F32, tf32=True),
    Peer("torch fp16", "half", "quick", _F16, graph=False),
    Peer("torch fp16, graph", "half", "quick", _F16),
    Peer("torch fp16, graph, fused", "half", "quick", _F16, fused=True),
    Peer("torch bf16", "half", "quick", _B16, graph=False),
    Peer("torch bf16, graph", "half", "quick", _B16),
    Peer("torch.compile fp16, graph", "half", "compile", _F16, compiled=True),
    Peer("torch.compile int8, graph", "int8", "int8", _F16, compiled=True, int8=True),
    Peer("ONNX Runtime fp32", "fp32", "ort", _F32, graph=False),
    Peer("ONNX Runtime fp16", "half", "ort", _F16, graph=False),
]
"""Every peer; the runner keeps to this order inside a stage."""
