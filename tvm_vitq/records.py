"""Folders of tuning records: used by ``compile``, merged, listed and pruned.

What a record is, and the files, are in :mod:`schedules.records`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from relay_passes.errors import VitqError
from schedules.isa import ISA
from schedules.records import Record, RecordFile, Schedules, latest
from tvm_vitq.artifact.output import atomic_output

__all__ = ["describe_schedules", "list_records", "merge", "open_schedules", "prune"]


def open_schedules(isa: ISA, folder: str | Path | None, threads: int = 1) -> Schedules:
    """Return the schedules of a folder of records and of the package.

    Parameters
    ----------
    isa
        Instruction set.
    folder
        The folder; ``"none"`` for the default rules alone, None for the package's records.
    threads
        Records of as many are preferred.

    Raises
    ------
    VitqError
        If there is no such folder, or it holds no records.
    """
    if folder is None:
        return Schedules.shipped(isa, threads)
    if str(folder) == "none":
        return Schedules(isa)
    files = _files([Path(folder)])
    file = RecordFile.of(folder, isa)
    file.read(isa.name)
    schedules = Schedules.of_folder(isa, folder, threads)
    schedules.refused = _reasons(file)
    if files and not file.path.exists():
        names = ", ".join(sorted(path.stem for path in files))
        schedules.refused.append(f"{folder} has no records for {isa.name}, only for {names}")
    return schedules


def describe_schedules(schedules: Schedules) -> dict[str, Any]:
    """Return ``hits`` and ``misses``, the numbers of tasks, and why records were ``refused``."""
    return {"hits": len(schedules.hits), "misses": len(schedules.misses),
            "refused": schedules.refused}  # fmt: skip


def _files(places: Iterable[Path]) -> list[Path]:
    """Return the files of folders of records, and files."""
    found: list[Path] = []
    for place in places:
        files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
        if not files or not place.exists():
            raise VitqError(f"there are no records at {place}; tvm-vitq tune makes them")
        found += files
    return found


def _is_json(path: Path) -> bool:
    """Whether a file begins like one of records, whatever these are."""
    with path.open("rb") as file:
        return file.read(1) == b"{"


def _reasons(file: RecordFile) -> list[str]:
    counted = Counter(why for _, why in file.refused)
    plural = {"is": "are", "was": "were"}
    reasons = []
    for why, count in counted.items():
        verb, _, rest = why.partition(" ")
        words = why if count == 1 else f"{plural[verb]} {rest}"
        reasons.append(f"{file.path.name}: {count} record{'s' * (count > 1)}, which {words}")
    return reasons


def _write(path: Path, records: Iterable[Record]) -> None:
    with atomic_output(path) as draft:
        draft.write_text("".join(record.to_json() + "\n" for record in records), encoding="utf-8")


def merge(sources: Sequence[str | Path], into: str | Path) -> dict[str, Any]:
    """Put the records of several folders or files together; a record that is there stays once.

    Returns
    -------
    dict
        ``records`` by instruction set, ``added``, ``refused``.

    Raises
    ------
    VitqError
        If a source is missing, or ``into`` cannot be written.
    """
    into, given = Path(into), _files(map(Path, sources))
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as why:
        raise VitqError(f"cannot make {into}: {why.strerror}") from why
    held: dict[str, dict[str, Record]] = {}
    refused: list[str] = []
    own, before = sorted(into.glob("*.jsonl")), 0
    for path in [*own, *given]:
        file = RecordFile(path)
        records = file.read()
        if path not in own and file.refused and not records and not _is_json(path):
            raise VitqError(f"{path} is no file of records")
        for record in records:
            held.setdefault(record.isa, {}).setdefault(record.to_json(), record)
        refused += _reasons(file)
        if path in own:
            before = sum(len(lines) for lines in held.values())
    for isa, lines in held.items():
        _write(into / f"{isa}.jsonl", sorted(lines.values(), key=lambda r: r.when))
    total = {isa: len(lines) for isa, lines in held.items()}
    return {"records": total, "added": sum(total.values()) - before, "refused": refused}


def prune(folder: str | Path) -> dict[str, Any]:
    """Keep only what ``compile`` uses: the latest best of each task.

    Trials go: a later ``tune`` measures those points again.

    Returns
    -------
    dict
        ``kept``, ``removed``, ``refused``.
    """
    kept = removed = 0
    refused: list[str] = []
    for path in _files([Path(folder)]):
        file = RecordFile(path)
        records = file.read()
        refused += _reasons(file)
        best = sorted(latest(records).values(), key=lambda r: (r.kind, r.of.text, r.threads))
        kept += len(best)
        removed += len(records) + len(file.refused) - len(best)
        _write(path, best)
    return {"kept": kept, "removed": removed, "refused": refused}


def list_records(folder: str | Path) -> dict[str, Any]:
    """Describe the best of each task.

    Returns
    -------
    dict
        ``best``: ``isa, task, threads, point, seconds, ratio, share, trials, host, when``;
        ``refused``.
    """
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for path in _files([Path(folder)]):
        file = RecordFile(path)
        records = file.read()
        refused += _reasons(file)
        trials = Counter(record.key for record in records if record.what == "trial")
        for key, record in latest(records).items():
            rows.append({"isa": record.isa, "task": str(record.of), "threads": record.threads,
                         "point": record.point, "seconds": record.seconds, "ratio": record.ratio,
                         "share": record.share, "trials": trials[key], "host": record.host,
                         "when": record.when})  # fmt: skip
    return {"best": rows, "refused": refused}
