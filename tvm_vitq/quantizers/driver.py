"""``quantize``: the whole way from a float module and images to the quantize/dequantize form."""

from __future__ import annotations

import json
from typing import Any

import torch
import tvm

from relay_passes.errors import VitqError
from tvm_vitq.calibration.data import load_images
from tvm_vitq.calibration.statistics import ChannelStatistics, Recorder
from tvm_vitq.quantizers.draft import CHUNK, Draft
from tvm_vitq.quantizers.emit import emit
from tvm_vitq.quantizers.finish import finish_unit
from tvm_vitq.quantizers.importance import output_importance
from tvm_vitq.quantizers.links import Links
from tvm_vitq.quantizers.mixed import choose_wide
from tvm_vitq.quantizers.ranges import wide
from tvm_vitq.quantizers.recipe import Recipe
from tvm_vitq.quantizers.search import Choice, UnitSearch
from tvm_vitq.quantizers.structure import SOFTMAX, Structure
from tvm_vitq.quantizers.units import Unit, cut
from tvm_vitq.reference.float_interpreter import Program, Step

__all__ = ["Calibration", "quantize"]

SEARCH_IMAGES = 16


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
        self.x = self.program.lift(images)
        self.count = len(images)
        self.statistics: dict[int, ChannelStatistics] = {}
        self.choices: list[Choice] = []
        self.views = self._views()

    def _views(self) -> dict[int, int]:
        """Slot where a site's channels lie on the last axis, in rows that are read -> the site."""
        views = {slot: slot for slot in self.structure.sites}
        linears = {linear.step: linear for linear in self.structure.linears}
        for site in self.structure.sites:
            readers, _ = self.links.readers_of(site)
            linear = linears.get(readers[0]) if len(readers) == 1 else None
            if linear is not None and linear.x != site:
                rows = self.links.spread(site, self.links.numbers(site), linear.x)
                whole = self.program.shape(site)[-1] == rows.shape[-1]
                if not whole or bool((rows == torch.arange(rows.shape[-1])).all()):
                    views.pop(site)
                    views[linear.x] = site
        return views

    def subset(self, count: int) -> torch.Tensor:
        """Positions of a few chunks of images, spread evenly."""
        chunks = self.x.shape[0]
        wanted = max(1, min(chunks, count // self.program.input_shape[0]))
        return torch.linspace(0, chunks - 1, wanted).round().long()

    # -- phase 1 -------------------------------------------------------------------------------
    def observe(self, draft: Draft, unit: Unit, x: torch.Tensor) -> torch.Tensor:
        """Execute a float unit on all images and record the statistics of its sites."""
        parts = x.split(CHUNK)
        recorders: dict[int, Recorder] = {}
        read = {linear.x for linear in self.structure.linears}
        totals: dict[int, tuple[torch.Tensor, int]] = {}

        def record(slot: int, value: torch.Tensor) -> None:
            site = self.views.get(slot)
            if site is not None and not self.structure.sites[site].given:
                recorder = recorders.setdefault(site, Recorder(len(parts), self.recipe.seed))
                recorder.add(value.float())

        def watch(step: Step, result: torch.Tensor) -> torch.Tensor:
            record(step.out, result)
            if step.out in read:
                rows = result.reshape(-1, result.shape[-1])
                total, count = totals.get(step.out, (0.0, 0))
                totals[step.out] = (total + rows.sum(0, dtype=torch.float64), count + len(rows))
            return result

        done = []
        for part in parts:
            if unit.source == self.program.input_slot:
                record(unit.source, part)
            env = self.program.execute(
                {unit.source: part},
                start=unit.start,
                stop=unit.stop,
                keep=frozenset({unit.result}),
                hook=watch,
            )
            done.append(env[unit.result])
        self.statistics.update({site: r.result() for site, r in recorders.items()})
        for link in self.links.links:
            if link.kind == "value" and link.site in recorders:  # into the order of V's channels
                order = link.readers[0].rows.argsort()
                self.statistics[link.site] = self.statistics[link.site].reordered(order)
        means = {slot: (total / count).float() for slot, (total, count) in totals.items()}
        draft.means.update(means)
        return torch.cat(done)

    def decide(self, draft: Draft) -> Draft:
        """Choose rescalings and quantizers of all units."""
        chosen = self.subset(SEARCH_IMAGES)
        weightings = output_importance(self.program, self.units, self.x[chosen], self.recipe.seed)
        x = self.x
        for unit in self.units:
            y = self.observe(draft, unit, x)
            if not torch.isfinite(y).all():
                raise VitqError(
                    "the float model gives NaN or infinite values on the calibration images; "
                    "check its weights and the images"
                )
            search = UnitSearch(
                self.links,
                self.recipe,
                unit,
                self.statistics,
                x[chosen],
                y[chosen],
                weightings[unit.result],
            )
            draft = search.run(draft)
            self.choices += search.choices
            x = y
        return draft

    # -- phase 2 and 3 -------------------------------------------------------------------------
    def widen(self, draft: Draft) -> list[int]:
        """Give int16 codes to the sites that the budget allows."""
        taken = choose_wide(self.structure, self.choices, self.recipe.a16_budget)
        for site in taken:
            draft.set_quantizer(site, wide(self.statistics[site]))
        return taken

    def finish(self, draft: Draft) -> torch.Tensor:
        """Round all weights; returns the quantized logits of the images."""
        x = draft.enter(self.x)
        for unit in self.units:
            x = finish_unit(draft, unit, x, self.recipe)
        return x.reshape(-1, *x.shape[2:])[: self.count]

    def methods(self) -> dict[int, str]:
        """Integer method of every softmax and GELU."""
        found = {}
        for step in self.program.steps:
            kind = "softmax" if step.op in SOFTMAX else "gelu"
            found[step.out] = self.recipe.method(kind)
        return found


@torch.no_grad()
def quantize(mod: tvm.IRModule, calib: Any, recipe: Recipe | None = None) -> tvm.IRModule:
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
    draft = work.decide(Draft(work.structure))
    taken = work.widen(draft)
    work.finish(draft)
    out = emit(mod, draft, work.methods())
    report = {
        "recipe": recipe.to_dict(),
        "images": len(images),
        "a16": [work.structure.sites[s].name for s in taken],
        "sites": [
            {
                "name": c.name,
                "kind": c.kind,
                "strength": c.strength,
                "observer": c.observer,
            }
            for c in work.choices
        ],
    }
    return out.with_attr("vitq.recipe", json.dumps(report))
