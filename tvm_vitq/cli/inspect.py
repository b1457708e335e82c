"""``tvm-vitq inspect``: operators, dtypes, scales, float boundary and proofs of an artefact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .common import DebugOption, JsonOption, emit, verb

__all__ = ["command"]

_REPLAYED = {
    None: "nothing yet: run 'tvm-vitq verify' where there is a GPU, anywhere '--with emulator'",
    "emulator": "emulator; the machine code had not run on a GPU when this was compiled",
}
"""What replayed a GPU artefact's golden vectors when it was compiled, in words."""


def command(
    artifact: Annotated[Path, typer.Argument(help="The artefact.", show_default=False)],
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer's codes.")] = False,
    ranges: Annotated[
        bool, typer.Option("--ranges", help="Show what was proved of every quantity.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Describe ARTIFACT: operators, dtypes, scales, float boundary, proofs."""
    with verb(debug):
        from tvm_vitq.artifact.stored import StoredArtifact

        report = StoredArtifact(artifact).inspect()
    emit(report, json, lambda console: _show(console, report, layers, ranges))


def _show(console: Console, report: dict[str, Any], layers: bool, ranges: bool) -> None:
    console.print(_facts(report))
    console.print(_proofs(report))
    operators = Table("operator", "count", title="Operators", title_justify="left")
    for name, count in report["operators"].items():
        operators.add_row(name, str(count))
    console.print(operators)
    if ranges:
        console.print(_ranges(report["bounds"]))
    if layers and report.get("layers"):
        table = Table(title="Layers", title_justify="left")
        for heading in ("name", "from", "shape", "codes", "scale", "zero point"):
            table.add_column(heading)
        for row in report["layers"]:
            table.add_row(
                str(row["name"]),
                str(row["from"]),
                "x".join(str(v) for v in row["shape"]),
                str(row["dtype"]),
                f"{row['scale']:.6g}",
                str(row["zero_point"]),
            )
        console.print(table)


def _facts(report: dict[str, Any]) -> Table:
    table = Table(title=report["path"], title_justify="left", show_header=False)
    entry, out = report["input"], report["output"]
    target, versions, recipe = report["target"], report["versions"], report["recipe"] or {}
    codes = entry["codes"]
    boundary = "uint8 pixels: no float before the logits"
    if codes["inv_scale"] is not None:
        scale = 1 / codes["inv_scale"]
        boundary = f"{codes['dtype']}, scale {scale:.6g}, zero point {codes['zero_point']}"
    size = f"{report['size_bytes']:,} bytes"
    if report["size_percent"] is not None:
        size += f", {report['size_percent']} % of the fp32 weights"
    for name, value in (
        ("model", str(report["model"].get("name"))),
        ("input", f"{entry['dtype']} {entry['layout']} {entry['shape']}"),
        ("input boundary", boundary),
        ("output boundary", f"{out['dtype']} {out['shape']} times {out['scale']:.6g} to float32"),
        ("target", target["name"] if target["mcpu"] == target["name"] else
         f"{target['name']} ({target['mcpu']})"),
        *_gpu_facts(report),
        ("recipe", ", ".join(f"{k} {v}" for k, v in (recipe.get("recipe") or {}).items())),
        ("16-bit sites", ", ".join(recipe.get("a16") or []) or "none beyond residuals and scores"),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("size", size),
        ("golden vectors", str(report["golden_vectors"])),
    ):
        table.add_row(name, value)
    return table


def _gpu_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines that an artefact for a GPU has besides."""
    if "gpu" not in report:
        return []
    launches, kernels = report["gpu"]["launches"], report["kernels"].values()
    words = f"{launches['total']} launches of {len(report['kernels'])} kernels"
    if launches["per_block"] is not None:
        words += (f"; {launches['typical']} in a block, {launches['per_block']} in the largest of "
                  f"{launches['blocks']}")
    spilled = sum(kernel.get("local_bytes", 0) for kernel in kernels)
    most = max(kernel.get("registers", 0) for kernel in kernels)
    replayed = report["golden"]["replayed_with"]
    products = Counter(kernel["products"] for kernel in kernels if "products" in kernel)
    return [
        ("GPU kernels", words),
        ("GPU products", ", ".join(f"{name} in {count} kernels"
                                   for name, count in products.most_common()) or "none"),
        ("GPU registers", f"at most {most} a thread, {spilled} bytes of local memory"),
        ("replayed with", _REPLAYED.get(replayed, replayed)),
    ]


def _ranges(bounds: list[dict[str, Any]]) -> Table:
    """Lay out the widest proved range of every quantity of every operator."""
    widest: dict[tuple[str, str], dict[str, Any]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row in bounds:
        key = (row["op"], row["quantity"])
        counts[key] += 1
        if row["headroom_bits"] < widest.get(key, {"headroom_bits": 1e9})["headroom_bits"]:
            widest[key] = row
    table = Table(title="Proved ranges, the widest of each kind", title_justify="left")
    for heading in ("operator", "quantity", "proofs", "range", "fits", "headroom"):
        table.add_column(heading, justify="right" if heading in ("proofs", "headroom") else "left")
    for (operator, quantity), row in sorted(widest.items()):
        table.add_row(
            operator,
            quantity,
            str(counts[operator, quantity]),
            f"{row['lo']} ... {row['hi']}",
            row["dtype"],
            f"{row['headroom_bits']} bits",
        )
    return table


def _proofs(report: dict[str, Any]) -> Table:
    table = Table("proof", "result", title="Proofs", title_justify="left")
    found = report["float_instructions"]
    table.add_row("integer only in the IR", "yes" if report["integer_only"] else "NO")
    table.add_row(
        "no overflow possible",
        f"yes, {report['claims']} ranges" if report["ranges_proved"] else "NO",
    )
    table.add_row(
        "floating-point instructions outside the boundary",
        str(found) if found is not None else f"unknown: {report['float_instructions_missing']}",
    )
    return table
