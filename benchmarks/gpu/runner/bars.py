"""The bars, computed from a results document: met, missed, or not shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["BARS", "Bar", "bars"]

Bar = tuple[str, str, str, str]
BARS = {"fp32": 4.2, "half": 1.3, "peak": 0.6, "launches": 8}
"""Least ratios to PyTorch, least share of the int8 peak, most kernels in a block."""
_COMPILED = "torch.compile"


def _fastest(
    document: Mapping[str, Any], model: str, batch: str, kind: str
) -> tuple[str, float] | None:
    """Return the fastest peer of a kind and its time over ours."""
    runners = document["times"].get(model, {}).get(batch, {}).get("runners", {})
    found = [(entry["ratio"], name) for name, entry in runners.items() if entry["kind"] == kind]
    return (min(found)[1], min(found)[0]) if found else None


def _verdict(met: bool, whole: bool = True) -> str:
    return "missed" if not met else "met" if whole else "met so far"


def bars(document: Mapping[str, Any]) -> list[Bar]:
    """Compare results with the bars.

    Parameters
    ----------
    document
        See :class:`runner.results.Results`.

    Returns
    -------
    list of (what, bar, measured, verdict)
        The verdict is ``met``, ``missed``, ``not shown`` (nothing was measured, or not on a GPU) or
        ``met so far`` (a part of what the bar speaks of was not measured, or not against
        ``torch.compile``).
    """
    if document["device"]["kind"] != "cuda":
        document = {**document, "checks": {}, "times": {}, "kernels": {}, "sanitize": {}}
    models = {name: model for name, model in document["bundle"]["models"].items()}
    judged = [name for name, model in models.items() if model["bars"]]
    rows = [_logits(document, models)]
    rows += _fp32(document, judged)
    rows += [_half(document, judged, batch) for batch in ("1", "8", "64")]
    rows.append(_peak(document))
    rows += _launches(document, judged)
    rows.append(_sanitizer(document))
    return rows


def _logits(document: Mapping[str, Any], models: Mapping[str, Any]) -> Bar:
    entries = [e for model in document["checks"].values() for e in model.values()]
    if not entries:
        return ("logits", "0 different", "", "not shown")
    kinds = ("golden", "derived", "repeated")
    different = sum(entry[kind]["different"] for entry in entries for kind in kinds)
    compared = sum(entry[kind]["logits"] for entry in entries for kind in kinds)
    whole = set(document["checks"]) == set(models)
    return ("logits", "0 different", f"{different} of {compared} in {len(entries)} artefacts",
            _verdict(different == 0, whole))  # fmt: skip


def _fp32(document: Mapping[str, Any], judged: list[str]) -> list[Bar]:
    rows = []
    for model in judged:
        found = _fastest(document, model, "8", "fp32")
        what, bar = f"{model}, batch 8, against fp32 (TF32 off)", f"≥ {BARS['fp32']}×"
        if found is None:
            rows.append((what, bar, "", "not shown"))
        else:
            rows.append((what, bar, f"{found[1]:.2f}× {found[0]}",
                         _verdict(found[1] >= BARS["fp32"])))  # fmt: skip
    return rows


def _half(document: Mapping[str, Any], judged: list[str], batch: str) -> Bar:
    what, bar = f"batch {batch}, against the best half precision", f"≥ {BARS['half']}× (mean)"
    found = {model: _fastest(document, model, batch, "half") for model in judged}
    known = {model: best for model, best in found.items() if best is not None}
    if not known:
        return (what, bar, "", "not shown")
    mean = math.exp(sum(math.log(best[1]) for best in known.values()) / len(known))
    compiled = [model for model in known if any(
        name.startswith(_COMPILED) and entry["kind"] == "half"
        for name, entry in document["times"][model][batch]["runners"].items())]  # fmt: skip
    each = ", ".join(f"{model} {best[1]:.2f}" for model, best in known.items())
    whole = len(compiled) == len(judged)
    missing = "" if whole else f"; compiled peer for {len(compiled)} of {len(judged)}"
    return (what, bar, f"{mean:.2f}× ({each}{missing})", _verdict(mean >= BARS["half"], whole))


def _peak(document: Mapping[str, Any]) -> Bar:
    what, bar = "large matmuls, DeiT-B, batch 64, of the int8 peak", f"≥ {BARS['peak']:.0%}"
    large = document["kernels"].get("deit_base", {}).get("64", {}).get("large")
    if not large or not document["peaks"]:
        return (what, bar, "", "not shown")
    peak = document["peaks"]["int8_peak_tops"]
    share = large["tops"] / peak
    return (what, bar, f"{share:.0%} ({large['tops']:.0f} of {peak:.0f} TOP/s; worst "
            f"{large['worst_tops'] / peak:.0%})", _verdict(share >= BARS["peak"]))  # fmt: skip


def _launches(document: Mapping[str, Any], judged: list[str]) -> list[Bar]:
    rows = []
    for model in judged:
        what = f"{model}, kernels a block (all launches over blocks)"
        bar = f"≤ {BARS['launches']}"
        found = [entry["launches"] for entry in document["kernels"].get(model, {}).values()
                 if "launches" in entry]  # fmt: skip
        if not found:
            rows.append((what, bar, "", "not shown"))
            continue
        each = max(found) / document["bundle"]["models"][model]["blocks"]
        rows.append((what, bar, f"{each:.1f}", _verdict(each <= BARS["launches"])))
    return rows


def _sanitizer(document: Mapping[str, Any]) -> Bar:
    entries = [e for tool in document["sanitize"].values() for e in tool.values()]
    if not entries:
        return ("compute-sanitizer", "clean", "", "not shown")
    clean = sum(entry["clean"] for entry in entries)
    tools = ", ".join(document["sanitize"])
    return ("compute-sanitizer", "clean", f"{clean} of {len(entries)} runs ({tools})",
            _verdict(clean == len(entries)))  # fmt: skip
