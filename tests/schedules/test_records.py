"""Records are on disk at once, survive a torn line, and are refused with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from schedules.isa import AVX2, AVX512VNNI
from schedules.records import BadRecord, Record, RecordFile, Schedules, latest
from schedules.space import space_of
from schedules.spaces.linear import linear_task

TASK = linear_task("linear_requant", (197, 192, 192), "int8", "int8", "", 2)


def make(ratio: float = 0.9, when: str = "2026-01-01", what: str = "best", threads: int = 1,
         **changes: object) -> Record:
    space = space_of(TASK, AVX2)
    assert space is not None
    point = {**space.ranked()[3], **changes}
    return Record(what, "avx2", TASK.kind, TASK.fields, point, 1e-4, ratio, 0.8, threads, "cpu",
                  when)


def test_a_line_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "avx2.jsonl")
    assert file.read() == []
    records = [make(what="trial"), make(0.8)]
    for record in records:
        file.append(record)
    assert file.read("avx2") == records and not file.refused
    assert json.loads(file.path.read_text().splitlines()[0])["key"] == TASK.key


def test_a_torn_last_line_counts_for_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "avx2.jsonl")
    file.append(make())
    whole = file.path.read_bytes()
    for length in (1, 50, len(whole) - 1):
        file.path.write_bytes(whole + whole[:length])
        if length < len(whole) - 1:
            assert file.read() == [make()] and not file.refused
        file.append(make(0.7, "2026-02-01"))
        assert [r.ratio for r in file.read()][-1] == 0.7
        assert len(file.read()) == (2 if length < len(whole) - 1 else 3)


@pytest.mark.parametrize("change,reason", [
    ({"versions": {"tvm": "0.26.0", "kernels": 1}}, "made with TVM 0.26.0"),
    ({"versions": {"tvm": make().versions["tvm"], "kernels": 0}}, "made with kernels 0"),
    ({"isa": "avx512vnni"}, "for the instruction set avx512vnni, not avx2"),
    ({"what": "rumour"}, "unknown sort"),
])
def test_refused_with_its_reason(change: dict[str, object], reason: str, tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "avx2.jsonl")
    file.append(replace(make(), **change))
    file.append(make())
    assert file.read("avx2") == [make()]
    assert [number for number, _ in file.refused] == [1] and reason in file.refused[0][1]
    for line in ("", "{}", "[1]", "not json", '{"what": "best"}'):
        with pytest.raises(BadRecord, match="damaged"):
            Record.from_json(line)


@pytest.mark.parametrize("change", [
    {"ratio": "x"}, {"ratio": 0}, {"seconds": None}, {"seconds": -1.0}, {"seconds": float("nan")},
    {"point": None}, {"task": {"op": "x"}}, {"threads": "1"}, {"share": "much"}, {"when": 3},
])  # fmt: skip
def test_values_of_other_sorts_are_damage(change: dict[str, object]) -> None:
    line = json.dumps({**json.loads(make().to_json()), **change})
    with pytest.raises(BadRecord, match="is damaged"):
        Record.from_json(line)


def test_the_latest_best_of_as_many_threads_holds() -> None:
    old, new = make(0.9, "2026-01-01", chunks=1), make(0.95, "2026-01-02", rows=4)
    two = make(0.5, "2026-01-03", threads=2, rows=2)
    assert latest([new, old, make(0.1, "2027", "trial")]) == {new.key: new}
    assert Schedules(AVX2, [old, new, two]).point(TASK) == new.point
    assert Schedules(AVX2, [old, new, two], threads=2).point(TASK) == two.point
    assert Schedules(AVX2, [old, new, two], threads=4).point(TASK) == new.point


def test_hits_and_misses() -> None:
    space = space_of(TASK, AVX2)
    assert space is not None
    other = linear_task("linear_requant", (98, 192, 192), "int8", "int8", "", 2)
    schedules = Schedules(AVX2, [make()])
    assert schedules.point(TASK) == make().point and schedules.point(other) is None
    assert list(schedules.hits) == [TASK.key] and list(schedules.misses) == [other.key]
    assert list(schedules.nearest(other)) == [make().point]
    # The default as a record is a hit that changes nothing; a point that is none is no hit.
    same = Schedules(AVX2, [replace(make(), point=space.default)])
    assert same.point(TASK) is None and list(same.hits) == [TASK.key]
    stale = Schedules(AVX2, [make(rows=77)])
    assert stale.point(TASK) is None and list(stale.misses) == [TASK.key]
    assert Schedules(AVX512VNNI, [make()]).point(TASK) is None
