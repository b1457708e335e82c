"""Decides, unit by unit, how activations are quantized: ranges and rescalings by unit-output error.

The sites of a unit are decided in the order of execution. What comes before a site is already
quantized, what comes after is still float. The candidates for a site (strength of the rescaling,
spread, observer) are ranked by the error of the linears that read it, on rows of held-out images;
the first few are executed to the unit's end on those images, and the one whose output is nearest to
the float unit's wins. Errors are weighted by how much the logits depend on each element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tvm_vitq.calibration.statistics import ChannelStatistics
from tvm_vitq.calibration.workers import spread
from tvm_vitq.quantizers.draft import Draft
from tvm_vitq.quantizers.equalize import balance_keys, channel_factors, rescale
from tvm_vitq.quantizers.links import Link, Links
from tvm_vitq.quantizers.ranges import Form, form_of, propose, wide
from tvm_vitq.quantizers.recipe import STRENGTHS, Recipe
from tvm_vitq.quantizers.structure import Linear
from tvm_vitq.quantizers.units import Unit
from tvm_vitq.quantizers.weights import round_nearest, round_quickly

__all__ = ["Choice", "UnitSearch"]

PROBES = 4
"""Candidates of a site that are executed to the end of the unit, at most one of each strength."""

COLUMNS = 256
"""The error of a linear is taken on so many of its output columns, about."""


@dataclass
class Choice:
    """What was decided for one site.

    Attributes
    ----------
    site : int
    name, kind : str
    strength : float or None
        Of the rescaling, None where there was none to decide.
    observer : str
    error : float
        Weighted unit-output error with the site decided.
    wide_error : float or None
        The same with int16 codes at this site, where that is an option.
    """

    site: int
    name: str
    kind: str
    strength: float | None
    observer: str
    error: float
    wide_error: float | None = None

    def report(self, draft: Draft) -> dict[str, Any]:
        """Return the choice as JSON types, with the quantizer that the site has in ``draft``."""
        quantizer = draft.quantizer(self.site)
        assert quantizer is not None
        return {
            "name": self.name,
            "kind": self.kind,
            "strength": self.strength,
            "observer": self.observer,
            "dtype": quantizer.dtype,
            "scale": quantizer.scale,
            "zero_point": quantizer.zero_point,
            "error": self.error,
            "error_int16": self.wide_error,
        }


@dataclass
class Candidate:
    """A draft with one more site decided."""

    draft: Draft
    statistics: dict[int, ChannelStatistics]
    observer: str
    strength: float | None = None
    provisional: int | None = None

    def settled(self) -> Draft:
        """Return the draft without the quantizer that was only assumed for the trial."""
        if self.provisional is not None:
            group = self.draft.structure.sites[self.provisional].group
            self.draft.quantizers.pop(group, None)
        return self.draft


@dataclass
class UnitSearch:
    """Search of one unit.

    Attributes
    ----------
    links : Links
    recipe : Recipe
    unit : Unit
    statistics : dict of int to ChannelStatistics
        By site, of the float unit; kept up to date with the rescalings.
    x, target : torch.Tensor
        Lifted input and float output of the unit for a few images.
    weighting : torch.Tensor
        Importance of the elements of the output, broadcastable to ``target``.
    """

    links: Links
    recipe: Recipe
    unit: Unit
    statistics: dict[int, ChannelStatistics]
    x: torch.Tensor
    target: torch.Tensor
    weighting: torch.Tensor
    choices: list[Choice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.structure = self.links.structure
        self.program = self.links.program
        self.by_site: dict[int, Link] = {}
        for link in self.links.links:
            self.by_site[link.also[0] if link.kind == "value" else link.site] = link
        self.key_of = {end[0]: key for key in self.links.keys for end in (key.query, key.key)}
        self.rows = {
            r.linear.step: r.rows
            for link in self.links.links
            for r in link.readers
            if not torch.equal(r.rows, torch.arange(len(r.rows)))
        }
        self.readers: dict[int, list[Linear]] = {}
        for linear in self.structure.linears:
            self.readers.setdefault(linear.source, []).append(linear)

    def run(self, draft: Draft) -> Draft:
        """Decide every site of the unit; returns the decided draft."""
        self.envs = [{self.unit.source: part} for part in self.x.split(draft.chunk)]
        self.at = self.unit.start
        balanced: set[int] = set()
        if self.unit.source == self.program.input_slot:
            draft = self._decide(draft, self.program.input_slot)
            self.envs = [
                {self.unit.source: draft.enter(part)} for part in self.x.split(draft.chunk)
            ]
        for index in range(self.unit.start, self.unit.stop):
            slot = self.program.steps[index].out
            if slot not in self.structure.sites:
                continue
            key = self.key_of.get(slot)
            if key is not None and self.recipe.balance_keys and id(key) not in balanced:
                balanced.add(id(key))
                q, k = key.query[0], key.key[0]
                self.statistics[q], self.statistics[k] = balance_keys(
                    draft, key, self.statistics[q], self.statistics[k]
                )
            draft = self._decide(draft, slot)
            self._advance(draft, index + 1)
        return draft

    # -- execution -----------------------------------------------------------------------------
    def _advance(self, draft: Draft, stop: int) -> None:
        values = draft.values()

        def advance(env: dict[int, torch.Tensor]) -> None:
            self.program.execute(
                env,
                start=self.at,
                stop=stop,
                keep=frozenset({self.unit.result}),
                hook=draft.hook,
                constants=values,
            )

        spread(advance, self.envs)
        self.at = stop

    def _errors(self, drafts: Sequence[Draft]) -> list[float]:
        """Weighted square error of the unit's output with each draft, per image."""
        values = [draft.values() for draft in drafts]
        chunk = drafts[0].chunk
        entering = self.unit.source == self.program.input_slot and self.at == self.unit.start

        def error(item: tuple[int, int]) -> float:
            which, part = item
            draft, here = drafts[which], slice(part * chunk, (part + 1) * chunk)
            trial = dict(self.envs[part])
            if entering:
                trial = {self.unit.source: draft.enter(self.x[here])}
            out = self.program.execute(
                trial,
                start=self.at,
                stop=self.unit.stop,
                keep=frozenset({self.unit.result}),
                hook=draft.hook,
                constants=values[which],
            )[self.unit.result]
            difference = (out - self.target[here]).square_()
            weighting = self.weighting if len(self.weighting) == 1 else self.weighting[here]
            return float(difference.mul_(weighting).sum())

        parts = len(self.envs)
        found = spread(error, [(d, p) for d in range(len(drafts)) for p in range(parts)])
        return [
            sum(found[d * parts : (d + 1) * parts]) / max(len(self.x), 1)
            for d in range(len(drafts))
        ]

    # -- decisions -----------------------------------------------------------------------------
    def _decide(self, draft: Draft, slot: int) -> Draft:
        site = self.structure.sites[slot]
        if site.given or draft.quantizer(slot) is not None or slot not in self.statistics:
            return self._with_weights(draft, slot, self.statistics.get(slot))
        form = form_of(site, self.links, self.recipe)
        if form is Form.STREAM:
            self.statistics[slot] = self._joined(slot)
        candidates = self._shortlist(self._candidates(draft, slot, form), slot)
        errors = [0.0]
        if len(candidates) > 1:
            errors = self._errors([c.draft for c in candidates])
        best = candidates[errors.index(min(errors))]
        self.statistics.update(best.statistics)
        choice = Choice(slot, site.name, site.kind, best.strength, best.observer, min(errors))
        if form in (Form.LINEAR, Form.PRODUCT) and self.recipe.a16_budget > 0:
            trial = best.draft.copy()
            trial.set_quantizer(slot, wide(self.statistics[slot]))
            if len(candidates) == 1:
                choice.error, choice.wide_error = self._errors([best.draft, trial])
            else:
                (choice.wide_error,) = self._errors([trial])
        self.choices.append(choice)
        return best.settled()

    def _joined(self, slot: int) -> ChannelStatistics:
        """Statistics of a site widened to everything that shares its scale."""
        group, statistics = self.structure.sites[slot].group, self.statistics[slot]
        for other, site in self.structure.sites.items():
            if site.group == group and other != slot and other in self.statistics:
                statistics = statistics.widened(*self.statistics[other].bounds)
        for constant, where in self.structure.concat_constants.items():
            if where == group:
                value = self.program.constants[constant]
                statistics = statistics.widened(float(value.min()), float(value.max()))
        return statistics

    def _candidates(self, draft: Draft, slot: int, form: Form) -> list[Candidate]:
        link = self.by_site.get(slot)
        if link is None or form not in (Form.LINEAR, Form.PRODUCT):
            return self._ranged(draft, slot, form, {}, None)
        fixed = {"norm": self.recipe.norm, "value": self.recipe.attention, "gelu": self.recipe.gelu}
        strength = fixed[link.kind]
        strengths = STRENGTHS if strength is None else (strength,)
        spreads = (False, True) if self.recipe.observer == "search" else (False,)
        statistics, centred = self.statistics[link.site], link.source is not None

        def rescaled(item: tuple[float, bool]) -> list[Candidate]:
            alpha, robust = item
            trial = draft.copy()
            centre = centred and (strength is None or alpha > 0)
            factor, shift = channel_factors(statistics, alpha, robust, centre)
            rescale(trial, link, factor, shift)
            moved = {
                s: self.statistics[s].moved(1.0 / factor, shift)
                for s in (link.site, *link.also)
                if s in self.statistics
            }
            return self._ranged(trial, slot, form, moved, alpha)

        if True in spreads:
            _ = statistics.quantiles  # once, not by every thread
        choices = [(alpha, r) for alpha in strengths for r in (spreads if alpha else (False,))]
        return [candidate for some in spread(rescaled, choices) for candidate in some]

    def _ranged(
        self,
        draft: Draft,
        slot: int,
        form: Form,
        moved: dict[int, ChannelStatistics],
        strength: float | None,
    ) -> list[Candidate]:
        """Candidates of a rescaled draft: one for each observer."""
        link = self.by_site.get(slot)
        context = link.site if link is not None and link.kind == "value" else None
        later = moved.get(context, self.statistics.get(context)) if context is not None else None
        ahead = {} if later is None else propose(Form.LINEAR, later, self.recipe)
        statistics = moved.get(slot, self.statistics[slot])
        found = []
        for name, quantizer in propose(form, statistics, self.recipe).items():
            trial = draft.copy()
            trial.set_quantizer(slot, quantizer)
            if context is not None and ahead:
                trial.set_quantizer(context, ahead.get(name, next(iter(ahead.values()))))
            found.append(Candidate(trial, moved, name, strength, context))
        return found

    def _shortlist(self, candidates: list[Candidate], slot: int) -> list[Candidate]:
        """Keep the candidates with the least error of the linears that read the site."""
        read = slot if candidates[0].provisional is None else candidates[0].provisional
        if len(candidates) > PROBES and self.readers.get(read):
            wanted = self._wanted(candidates[0], read)
            errors = spread(lambda c: self._linear_error(c, read, wanted), candidates)
            order = sorted(range(len(candidates)), key=errors.__getitem__)
            candidates = [candidates[i] for i in order]
            first: dict[float | None, Candidate] = {}
            for candidate in candidates:
                first.setdefault(candidate.strength, candidate)
            several = list(first.values()) if len(first) > 1 else candidates
            candidates = several[:PROBES]

        def rounded(candidate: Candidate) -> Draft:
            draft = candidate.draft
            for site in {slot, read}:
                statistics = candidate.statistics.get(site, self.statistics.get(site))
                draft = self._with_weights(draft, site, statistics)
            return draft

        drafts = spread(rounded, candidates)
        for candidate, draft in zip(candidates, drafts, strict=True):
            candidate.draft = draft
        return candidates

    def _columns(self, draft: Draft, linear: Linear) -> torch.Tensor:
        """Some columns of a linear's weight, spread evenly."""
        weight = draft.constant(linear.weight)
        return weight[:, :: -(-weight.shape[1] // COLUMNS)]

    def _wanted(self, candidate: Candidate, site: int) -> list[torch.Tensor]:
        """Return the exact results of the linears that read ``site``, about their mean.

        A rescaling changes nothing but their mean, so they are the same for all candidates.
        """
        sample = candidate.statistics.get(site, self.statistics[site]).held
        found = []
        for linear in self.readers[site]:
            rows = self.rows.get(linear.step)
            x = sample if rows is None else sample[:, rows]
            y = x @ self._columns(candidate.draft, linear)
            found.append(y - y.mean(0))
        return found

    def _linear_error(self, candidate: Candidate, site: int, wanted: list[torch.Tensor]) -> float:
        """Relative error, about its mean, of the linears that read ``site``, on sampled rows."""
        sample = candidate.statistics.get(site, self.statistics[site]).held
        quantizer = candidate.draft.quantizer(site)
        if quantizer is None:
            return 0.0
        codes, error = quantizer(sample), 0.0
        bits = 7 if self.recipe.int16_groups else 8
        for linear, exact in zip(self.readers[site], wanted, strict=True):
            weight, rows = self._columns(candidate.draft, linear), self.rows.get(linear.step)
            real = weight if linear.given else round_quickly(weight, bits).real
            y = (codes if rows is None else codes[:, rows]) @ real
            difference = y.sub_(exact)
            difference -= difference.mean(0)
            error += float(difference.square_().sum() / exact.square().sum().clamp_min(1e-20))
        return error

    def _with_weights(self, draft: Draft, slot: int, statistics: ChannelStatistics | None) -> Draft:
        """Round the weights of the linears that read a site to nearest, for the simulation."""
        linears = [r for r in self.readers.get(slot, []) if not r.given]
        if not linears:
            return draft
        draft = draft.copy()
        for linear in linears:
            weight, importance = draft.constant(linear.weight), None
            if statistics is not None:
                importance, rows = statistics.sample.square().mean(0), self.rows.get(linear.step)
                importance = importance if rows is None else importance[rows]
                importance = importance if len(importance) == len(weight) else None
            draft.weights[linear.weight] = round_nearest(weight, importance)
        return draft
