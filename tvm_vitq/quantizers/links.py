"""Pairs of places whose constants may be rescaled together without changing the function.

For every channel c of an activation, a factor f and a shift d may move across it:

* norm: ``(gamma * n + beta - d) / f`` before, ``W * f`` and ``b + W^T d`` after (RepQ-ViT);
* value: V's output channels before, the output projection's rows after. A shift is exact too,
  because the rows of softmax sum to one;
* gelu: a factor per channel behind GELU, fc2's rows after;
* key: Q's channels times f, K's divided by f. K may also be shifted by any constant per channel:
  that adds one number to a whole row of scores, which softmax does not see.

Which channel meets which is found by sending channel numbers through the layout operators, so
heads, windows, slices and concatenations need no rules of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvm_vitq.quantizers.structure import GELU, PASSING, Linear, Structure
from tvm_vitq.reference.float_interpreter import OPERATORS, Step

__all__ = ["Affine", "KeyLink", "Link", "Links", "Reader"]


@dataclass(frozen=True)
class Reader:
    """A linear that reads rescaled channels; row k of its weight reads channel ``rows[k]``."""

    linear: Linear
    rows: torch.Tensor


@dataclass(frozen=True)
class Affine:
    """What makes the channels of a source: ``scale`` multiplies them, ``shift`` is added.

    ``scale`` is the slot of gamma, or of a weight whose columns are the channels; ``shift`` that of
    beta or of the bias. ``linear`` is the linear, None for a norm. A linear may have no bias: then
    ``shift`` is -1 and :meth:`Draft.set_bias` makes one.
    """

    scale: int
    shift: int
    linear: Linear | None = None


@dataclass(frozen=True)
class Link:
    """Channels of ``site`` that linears read.

    Attributes
    ----------
    kind : str
        norm, value or gelu.
    site : int
        Slot of the site whose codes the readers take (for value: the context).
    source : Affine or None
        Where the channels are made; None for GELU, where a new factor is made.
    size : int
        Number of channels.
    readers : tuple of Reader
    also : tuple of int
        Further sites that carry the same channels (V itself; a mean after the norm).
    """

    kind: str
    site: int
    source: Affine | None
    size: int
    readers: tuple[Reader, ...]
    also: tuple[int, ...] = ()


@dataclass(frozen=True)
class KeyLink:
    """Channels of Q and K that are multiplied with each other.

    ``pairs [P, 2]`` holds (channel of Q, channel of K); ``query`` and ``key`` are (site, source).
    """

    query: tuple[int, Affine]
    key: tuple[int, Affine]
    pairs: torch.Tensor


class Links:
    """All links of a structure that no given quantizer forbids.

    Attributes
    ----------
    links : list of Link
    keys : list of KeyLink
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.program = structure.program
        self.linear_at = {linear.step: linear for linear in structure.linears}
        self.linear_of = {linear.site: linear for linear in structure.linears}
        found = []
        for site in structure.sites.values():
            if site.kind == "norm":
                found.append(self._norm(site.slot))
            elif site.kind == "gelu":
                found.append(self._gelu(site.slot))
            elif site.kind == "context":
                found.append(self._value(site.slot))
        self.links = [link for link in found if link is not None]
        scores = [s.slot for s in structure.sites.values() if s.kind == "scores"]
        keys = [self._key(slot) for slot in scores]
        self.keys = [key for key in keys if key is not None]

    # -- tracing -------------------------------------------------------------------------------
    def numbers(self, slot: int) -> torch.Tensor:
        """Return channel numbers (position on the last axis) in the static shape of ``slot``."""
        shape = self.program.shape(slot)
        return torch.arange(shape[-1], dtype=torch.float32).expand(shape)

    def spread(self, source: int, numbers: torch.Tensor, target: int) -> torch.Tensor:
        """Send ``numbers`` at ``source`` through layout operators and means to ``target``.

        Elements that come from elsewhere are -1.
        """
        if target == source:
            return numbers
        if target in self.program.constants:
            return torch.full(tuple(self.program.constants[target].shape), -1.0)
        index = self.structure.producer.get(target)
        step = None if index is None else self.program.steps[index]
        if step is None or (step.op not in PASSING and step.op != "mean"):
            return torch.full(self.program.shape(target), -1.0)
        if step.op in ("quantize", "dequantize"):
            return self.spread(source, numbers, step.args[0])
        parts = [self.spread(source, numbers, slot).unsqueeze(0) for slot in step.args]
        lifted = Step(step.var, step.op, step.args, step.out, (True,) * len(parts), step.call)
        if step.op == "take":
            return OPERATORS[step.op]([parts[0], self.program.constants[step.args[1]]], step)[0]
        return OPERATORS[step.op](parts, lifted)[0]

    def readers_of(self, site: int, through_mean: bool = False) -> tuple[list[int], list[int]]:
        """Steps other than layout that read the codes of ``site``; and the means passed."""
        found: list[int] = []
        means: list[int] = []
        pending = [site]
        while pending:
            for index in self.structure.consumers[pending.pop()]:
                step = self.program.steps[index]
                if step.op == "mean" and through_mean:
                    means.append(step.out)
                if step.op in PASSING or (step.op == "mean" and through_mean):
                    pending.append(step.out)
                else:
                    found.append(index)
        return list(dict.fromkeys(found)), means

    # -- the kinds -----------------------------------------------------------------------------
    def _readers(
        self, source: int, numbers: torch.Tensor, steps: list[int]
    ) -> tuple[Reader, ...] | None:
        readers = []
        for index in steps:
            linear = self.linear_at.get(index)
            if linear is None or linear.given:
                return None
            rows = _constant_over(self.spread(source, numbers, linear.x), keep=-1)
            if rows is None or (rows < 0).any():
                return None
            readers.append(Reader(linear, rows.reshape(-1).long()))
        return tuple(readers) or None

    def _free(self, *sites: int) -> bool:
        return all(not self.structure.sites[site].given for site in sites)

    def _norm(self, site: int) -> Link | None:
        steps, means = self.readers_of(site, through_mean=True)
        readers = self._readers(site, self.numbers(site), steps)
        if readers is None or not self._free(site, *means):
            return None
        _, gamma, beta = self.program.steps[self.structure.producer[site]].args
        size = self.program.constants[gamma].numel()
        return Link("norm", site, Affine(gamma, beta), size, readers, tuple(means))

    def _gelu(self, site: int) -> Link | None:
        steps, _ = self.readers_of(site)
        readers = self._readers(site, self.numbers(site), steps)
        if readers is None or not self._free(site):
            return None
        if self.program.steps[self.structure.producer[site]].op not in GELU:
            return None
        return Link("gelu", site, None, self.program.shape(site)[-1], readers)

    def _product(self, site: int) -> Step | None:
        """Return the matmul of two activations that the chain of ``site`` starts with."""
        slot = site
        while slot in self.structure.producer:
            step = self.program.steps[self.structure.producer[slot]]
            if step.op == "matmul" and all(step.lifted):
                return step
            if step.op not in ("add", "multiply"):
                return None
            slot = next(s for s, up in zip(step.args, step.lifted, strict=True) if up)
        return None

    def _source(self, slot: int, product: Step) -> int | None:
        """Site behind an operand of ``product`` that nothing else reads."""
        origins = self.structure.origins(slot)
        if len(origins) != 1 or not self._free(origins[0]):
            return None
        steps, _ = self.readers_of(origins[0])
        single = [self.program.steps[i] for i in steps]
        return origins[0] if len(single) == 1 and single[0] is product else None

    def _affine(self, site: int) -> Affine | None:
        """Return what makes the channels of a site, if that is a linear or a norm."""
        linear = self.linear_of.get(site)
        if linear is not None and not linear.given:
            plain = self.structure.sites[site].kind == "linear"
            return Affine(linear.weight, linear.bias, linear) if plain else None
        step = self.program.steps[self.structure.producer[site]]
        return Affine(step.args[1], step.args[2]) if step.op == "nn.layer_norm" else None

    def _value(self, site: int) -> Link | None:
        product = self._product(site)
        value = None if product is None else self._source(product.args[1], product)
        affine = None if value is None else self._affine(value)
        if product is None or value is None or affine is None or not self._free(site):
            return None
        at_product = self.spread(value, self.numbers(value), product.args[1])
        columns = _constant_over(at_product, keep=None, axes=(-2,))
        if columns is None:
            return None
        numbers = columns.expand(self.program.shape(site))
        steps, _ = self.readers_of(site)
        readers = self._readers(site, numbers, steps)
        if readers is None or len(readers) != 1:
            return None
        size = self.program.shape(value)[-1]
        if not torch.equal(readers[0].rows.sort().values, torch.arange(size)):
            return None
        return Link("value", site, affine, size, readers, (value,))

    def _key(self, site: int) -> KeyLink | None:
        product = self._product(site)
        if product is None:
            return None
        ends = [self._source(slot, product) for slot in product.args]
        if ends[0] is None or ends[1] is None or ends[0] == ends[1]:
            return None
        affine = [self._affine(end) for end in ends if end is not None]
        if affine[0] is None or affine[1] is None:
            return None
        q = self.spread(ends[0], self.numbers(ends[0]), product.args[0])
        k = self.spread(ends[1], self.numbers(ends[1]), product.args[1])
        q, k = _constant_over(q, None, (-2,)), _constant_over(k, None, (-1,))
        if q is None or k is None or (q < 0).any() or (k < 0).any():
            return None
        both = torch.stack([q.squeeze(-2).reshape(-1), k.squeeze(-1).reshape(-1)], 1).long()
        pairs = torch.unique(both, dim=0)
        if len(torch.unique(pairs[:, 0])) != len(pairs) or len(torch.unique(pairs[:, 1])) != len(
            pairs
        ):
            return None
        return KeyLink((ends[0], affine[0]), (ends[1], affine[1]), pairs)


def _constant_over(
    numbers: torch.Tensor, keep: int | None, axes: tuple[int, ...] = ()
) -> torch.Tensor | None:
    """Collapse axes on which the numbers don't vary (all but ``keep``); None if they do vary."""
    if keep is not None:
        axes = tuple(a for a in range(numbers.dim()) if a != keep % numbers.dim())
    for axis in axes:
        first = numbers.narrow(axis, 0, 1)
        if not torch.equal(first.expand_as(numbers), numbers):
            return None
        numbers = first
    return numbers
