"""``quantize``: the whole way from a float module and images to the quantize/dequantize form."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import tvm

from relay_passes.errors import VitqError
from tvm_vitq.calibration.data import load_images
from tvm_vitq.calibration.statistics import ChannelStatistics
from tvm_vitq.quantizers.draft import Draft
from tvm_vitq.quantizers.emit import emit
from tvm_vitq.quantizers.finish import finish_unit
from tvm_vitq.quantizers.importance import Importance, measure_importance
from tvm_vitq.quantizers.links import Links
from tvm_vitq.quantizers.mixed import choose_wide, wide_share
from tvm_vitq.quantizers.observe import HeldOut, observe_unit, views_of
from tvm_vitq.quantizers.ranges import wide
from tvm_vitq.quantizers.recipe import Recipe
from tvm_vitq.quantizers.search import Choice, UnitSearch
from tvm_vitq.quantizers.structure import SOFTMAX, Structure
from tvm_vitq.quantizers.units import cut
from tvm_vitq.reference.float_interpreter import Program

__all__ = ["Calibration", "Progress", "quantize"]

Progress = Callable[[int, int], None]

TEST_IMAGES = 16
"""Images on which candidates are compared."""


def ignore(done: int, total: int) -> None:
    """Report no progress."""


class Calibration:
    """One quantization in progress.

    Parameters
    ----------
    mod : tvm.IRModule
        Canonical float module.
    images : torch.Tensor
        ``[N, ...]`` in the form of the module's input.
    recipe : Recipe
    """

    def __init__(self, mod: tvm.IRModule, images: torch.Tensor, recipe: Recipe) -> None:
        self.mod, self.recipe = mod, recipe
        self.program = Program(mod)
        self.structure = Structure(self.program)
        self.links = Links(self.structure)
        self.units = cut(self.structure)
        self.x, self.count = self.program.lift(images), len(images)
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(recipe.seed))
        self.x = self.x[order]
        self.held = HeldOut(len(self.x), max(1, TEST_IMAGES // self.program.input_shape[0]))
        self.statistics: dict[int, ChannelStatistics] = {}
        self.choices: list[Choice] = []
        self.importance = Importance()

    # -- phase 1 -------------------------------------------------------------------------------
    def decide(self, draft: Draft, advance: Progress = ignore) -> Draft:
        """Choose rescalings and quantizers of all units."""
        tests = self.held.tests
        watched = {*views_of(self.links), *(linear.x for linear in self.structure.linears)}
        importance = self.importance = measure_importance(
            self.program, self.units, watched, self.x[tests], self.recipe.seed
        )
        x = self.x
        for unit in self.units:
            y, statistics = observe_unit(
                self.links, draft, unit, x, self.held, importance, self.recipe.seed
            )
            if not torch.isfinite(y).all():
                raise VitqError(
                    "the float model gives NaN or infinite values on the calibration images; "
                    "check its weights and the images"
                )
            self.statistics.update(statistics)
            weighting = importance.outputs.get(unit.result, torch.ones(1))
            search = UnitSearch(
                self.links, self.recipe, unit, self.statistics, x[tests], y[tests], weighting
            )
            draft = search.run(draft)
            self.choices += search.choices
            x = y
            advance(1, 2 * len(self.units))
        return draft

    # -- phase 2 and 3 -------------------------------------------------------------------------
    def widen(self, draft: Draft) -> list[int]:
        """Give int16 codes to the sites that the budget allows."""
        taken = choose_wide(self.structure, self.choices, self.recipe.a16_budget)
        for site in taken:
            draft.set_quantizer(site, wide(self.statistics[site]))
        return taken

    def finish(self, draft: Draft, advance: Progress = ignore) -> torch.Tensor:
        """Round all weights; returns the quantized logits of the (shuffled) images, lifted."""
        x = draft.enter(self.x)
        for unit in self.units:
            x = finish_unit(draft, unit, x, self.importance, self.recipe)
            advance(1, 2 * len(self.units))
        return x

    def methods(self) -> dict[int, str]:
        """Integer method of every softmax and GELU."""
        found = {}
        for step in self.program.steps:
            kind = "softmax" if step.op in SOFTMAX else "gelu"
            found[step.out] = self.recipe.method(kind)
        return found


@torch.no_grad()
def quantize(
    mod: tvm.IRModule,
    calib: Any,
    recipe: Recipe | None = None,
    progress: Progress = ignore,
) -> tvm.IRModule:
    """Quantize a canonical float module.

    Parameters
    ----------
    mod : tvm.IRModule
        Canonical float form (stage 1).
    calib
        Unlabelled images: folder, ``.npz``, ``.npy``, array or iterable; see
        :func:`tvm_vitq.calibration.data.load_images`.
    recipe : Recipe, optional
        The default recipe searches everything.
    progress : callable(done, total), optional
        Called after every piece of work: pieces done since the last call, and pieces in all.

    Returns
    -------
    tvm.IRModule
        Quantize/dequantize form; its attribute ``vitq.recipe`` is a JSON report of what was chosen.

    Raises
    ------
    VitqError
        For unusable images, or a module that is not in canonical form.
    """
    recipe = Recipe() if recipe is None else recipe
    images = load_images(calib, mod, recipe.images)
    work = Calibration(mod, images, recipe)
    draft = work.decide(Draft(work.structure), progress)
    taken = work.widen(draft)
    work.finish(draft, progress)
    out = emit(mod, draft, work.methods())
    report = {
        "recipe": recipe.to_dict(),
        "images": len(images),
        "a16": [work.structure.sites[site].name for site in taken],
        "a16_share": round(wide_share(work.structure, taken), 4),
        "sites": [choice.report(draft) for choice in work.choices],
    }
    return out.with_attr("vitq.recipe", json.dumps(report))
