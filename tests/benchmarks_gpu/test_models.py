"""The peers' models: equal to timm's with the same weights; int8 linears stay close."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from benchmarks.gpu.networks import NETWORKS
from benchmarks.gpu.runner.models import blocks_of, build
from benchmarks.gpu.runner.peers import PEERS, Int8Linear, Peer, Unavailable, quantize_linears

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
       "num_classes": 11}  # fmt: skip
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4),
        "window_size": 4, "mlp_ratio": 3.0, "num_classes": 7}  # fmt: skip
SMALL = {"vit": (VisionTransformer, VIT), "swin": (SwinTransformer, SWIN)}


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", SMALL)
def test_equal_to_timm(family: str, fused: bool) -> None:
    torch.manual_seed(0)
    made, arguments = SMALL[family]
    theirs = made(**arguments).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = build({"family": family, **arguments}, theirs.state_dict(), fused)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NETWORKS if ":" not in NETWORKS[name].source])
def test_architecture_is_the_networks(name: str) -> None:
    """Every parameter of the timm model has its place, of its shape."""
    network = NETWORKS[name]
    with torch.device("meta"):
        theirs = timm.create_model(network.source).state_dict()
        ours = build_meta(network.architecture)
    wanted = {key: value.shape for key, value in theirs.items()
              if not key.endswith(("relative_position_index", "attn_mask"))}  # fmt: skip
    assert {key: value.shape for key, value in ours.items()} == wanted
    assert blocks_of(network.architecture) == 12


def build_meta(architecture: dict[str, object]) -> dict[str, torch.Tensor]:
    from benchmarks.gpu.runner import models

    arguments = dict(architecture)
    family = {"vit": models.VisionTransformer, "swin": models.SwinTransformer}
    return family[arguments.pop("family")](**arguments).state_dict()


def test_wrong_weights_are_refused() -> None:
    weights = build({"family": "vit", **VIT}).state_dict()
    weights["surplus"] = weights.pop("head.bias")
    with pytest.raises(ValueError, match=r"missing \['head.bias'\], unknown \['surplus'\]"):
        build({"family": "vit", **VIT}, weights)


@pytest.mark.parametrize("family", SMALL)
def test_int8_linears_stay_close(family: str) -> None:
    torch.manual_seed(0)
    model = build({"family": family, **SMALL[family][1]})
    # _int_mm wants more than 16 rows.
    x = images().repeat(8, 1, 1, 1)
    with torch.inference_mode():
        wanted = model(x)
        quantize_linears(model, x[:1])
        found = model(x)
    assert sum(isinstance(part, Int8Linear) for part in model.modules()) >= 8
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def close(peer: Peer, family: str) -> None:
    """Compare a peer's logits with the plain model's, set by set."""
    architecture = {"family": family, **SMALL[family][1]}
    sets = [images(), images().flip(-1)]
    reference = build(architecture)
    run = peer.prepare(architecture, sets, reference.state_dict())
    for i, x in enumerate(sets):
        found = run(i)
        found = torch.from_numpy(found[0].numpy()) if isinstance(found, list) else found
        with torch.inference_mode():
            wanted = reference(x)
        limit = 1e-4 if peer.dtype == torch.float32 else 0.05
        assert float((found.float() - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("peer", [p for p in PEERS if p.stage == "quick"], ids=lambda p: p.name)
def test_eager_peers(peer: Peer, family: str) -> None:
    assert peer.suits({"family": family}) is not (peer.fused and family == "vit")
    if peer.graph:
        with pytest.raises(Unavailable, match="need a GPU"):
            close(peer, family)
        return
    close(peer, family)


@pytest.mark.slow
@pytest.mark.parametrize("peer", [p for p in PEERS if p.stage != "quick"], ids=lambda p: p.name)
def test_compiled_and_exported_peers(peer: Peer) -> None:
    """On the processor, without CUDA graphs: the same calls but for the mode of torch.compile."""
    close(replace(peer, graph=False, compiled=peer.compiled and not peer.int8), "swin")


def test_sums_beyond_half_precision() -> None:
    """127 · 127 · 64 is no float16; the scaled result is."""
    linear = torch.nn.Linear(64, 32)
    linear.weight.data.fill_(1.0)
    linear.bias.data.fill_(0.5)
    x = torch.ones(20, 64, dtype=torch.float16)
    found = Int8Linear(linear, 1.0).half()(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, torch.full_like(found, 64.5), rtol=1e-3, atol=0)
