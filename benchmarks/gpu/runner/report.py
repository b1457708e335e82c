"""Results as text: times, kernels, checks and bars, in plain columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bars import bars
from .results import FORMAT, read_json

__all__ = ["bars_table", "columns", "load_results", "tables"]


def load_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises
    ------
    ValueError
        If it is none of this version's.
    """
    document = read_json(Path(path), "results")
    if document.get("format") != FORMAT:
        raise ValueError(f"{path} holds no results of format {FORMAT}")
    return document


def columns(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lay out rows under a heading; the first ``left`` columns are flush left."""
    widths = [max(len(row[i]) for row in (heading, *rows)) for i in range(len(heading))]

    def line(row: Sequence[str]) -> str:
        cells = [text.ljust(width) if i < left else text.rjust(width)
                 for i, (text, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        return "  ".join(cells).rstrip()

    return "\n".join([line(heading), line(["-" * width for width in widths]), *map(line, rows)])


def tables(document: Mapping[str, Any]) -> str:
    """Return everything that a results document shows."""
    device = document["device"]
    head = [f"{device['name']}, driver {device.get('driver', '?')}, "
            f"PyTorch {device.get('torch', 'none')}, {document['date']}"]  # fmt: skip
    if document["peaks"]:
        found = document["peaks"]
        int8, half, copy = (found[key] for key in ("int8_peak_tops", "bf16_peak_tops",
                                                   "copy_gb_per_s"))  # fmt: skip
        head.append(f"measured peaks: int8 {int8} TOP/s, bf16 {half} TFLOP/s, copy {copy} GB/s")
    parts = ["\n".join(head), _times(document), _kernels(document), bars_table(document),
             _left_out(document)]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _cells(document: Mapping[str, Any], section: str) -> list[tuple[str, str, Any]]:
    return [(model, batch, entry) for model, found in document[section].items()
            for batch, entry in sorted(found.items(), key=lambda item: int(item[0]))]  # fmt: skip


def _times(document: Mapping[str, Any]) -> str:
    cells = [(m, b, e["runners"]) for m, b, e in _cells(document, "times") if "runners" in e]
    names = list(dict.fromkeys(name for _, _, runners in cells for name in runners))
    rows = []
    for model, batch, runners in cells:
        for name in names:
            if name in runners:
                found = runners[name]
                rows.append([model, batch, name, f"{found['median_us']:.1f}",
                             f"{found['p10_us']:.1f}-{found['p90_us']:.1f}",
                             f"{found['ratio']:.2f}"])  # fmt: skip
    heading = ["model", "batch", "runner", "median us", "10-90 %", "over ours"]
    return columns(heading, rows, 3) if rows else ""


def _kernels(document: Mapping[str, Any], most: int = 8) -> str:
    peak = (document["peaks"] or {}).get("int8_peak_tops")
    rows = []
    for model, batch, entry in _cells(document, "kernels"):
        for row in entry.get("rows", [])[:most]:
            tops = row.get("tops")
            share = f"{tops / peak:.0%}" if tops and peak else ""
            shape = "×".join(map(str, row.get("shape", ())))
            rows.append([model, batch, row["symbol"][:48], shape, f"{row['calls']:g}",
                         f"{row['us']:.1f}", f"{tops:.0f}" if tops else "", share])  # fmt: skip
    heading = ["model", "batch", "kernel", "shape", "calls", "us", "TOP/s", "of peak"]
    return columns(heading, rows, 3) if rows else ""


def bars_table(document: Mapping[str, Any]) -> str:
    """Return the bars as a table."""
    return columns(["bar", "wanted", "measured", "verdict"], bars(document), 4)


def _left_out(document: Mapping[str, Any]) -> str:
    state = document["tasks"]
    rows = [[word, key, why] for word in ("failed", "skipped")
            for key, why in state[word].items()]  # fmt: skip
    return columns(["", "task", "why"], rows, 3) if rows else ""
