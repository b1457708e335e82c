"""Sites, linears, links and units of a tiny ViT."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from tests.helpers.tiny import tiny_vit_module
from tvm_vitq.calibration.statistics import Recorder
from tvm_vitq.quantizers.draft import Draft
from tvm_vitq.quantizers.equalize import balance_keys, rescale
from tvm_vitq.quantizers.links import Links
from tvm_vitq.quantizers.structure import Structure
from tvm_vitq.quantizers.units import cut
from tvm_vitq.reference.float_interpreter import Program


@pytest.fixture(params=["token", "avg", "pair"])
def links(request: pytest.FixtureRequest) -> Links:
    return Links(Structure(Program(tiny_vit_module(depth=2, pool=request.param))))


def test_every_compute_result_is_one_site(links: Links) -> None:
    kinds = Counter(site.kind for site in links.structure.sites.values())
    mean = kinds.pop("mean", 0)
    assert mean in (0, 1)
    assert kinds == {
        "input": 1,
        "embed": 1,
        "norm": 5,
        "linear": 8,
        "scores": 2,
        "softmax": 2,
        "context": 2,
        "residual": 4,
        "gelu": 2,
        "output": 1,
    }


def test_constants_of_a_concat_share_the_scale_of_the_tokens(links: Links) -> None:
    embed = next(s for s in links.structure.sites.values() if s.kind == "embed")
    assert list(links.structure.concat_constants.values()) == [embed.group]


def test_links_of_every_block(links: Links) -> None:
    assert Counter(link.kind for link in links.links) == {"norm": 5, "value": 2, "gelu": 2}
    assert len(links.keys) == 2


def test_units_chain_from_input_to_logits(links: Links) -> None:
    units = cut(links.structure)
    assert units[0].source == links.program.input_slot
    assert all(a.result == b.source for a, b in pairwise(units))
    assert units[-1].stop == len(links.program.steps)
    assert len(units) == 1 + 4 + 1


@pytest.mark.parametrize("kind", ["norm", "value", "gelu", "key"])
def test_rescaling_leaves_the_function_as_it_is(links: Links, kind: str) -> None:
    x = torch.randn(4, 3, 16, 16)
    draft, generator = Draft(links.structure), torch.Generator().manual_seed(0)
    before = draft.run(x, cut(links.structure))
    for link in links.links:
        if link.kind == kind:
            factor = torch.rand(link.size, generator=generator) * 3 + 0.2
            shift = torch.randn(link.size, generator=generator)
            shift = torch.zeros_like(shift) if kind == "gelu" else shift
            rescale(draft, link, factor, shift)
    if kind == "key":
        for key in links.keys:
            recorders = []
            for site, _ in (key.query, key.key):
                recorder = Recorder(64)
                width = links.program.shape(site)[-1]
                recorder.add(torch.randn(1, 200, width, generator=generator) * 3 + 1)
                recorders.append(recorder.result())
            balance_keys(draft, key, *recorders)
    assert draft.constants
    after = draft.run(x, cut(links.structure))
    torch.testing.assert_close(after, before, atol=2e-4, rtol=2e-4)
