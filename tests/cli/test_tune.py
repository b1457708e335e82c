"""``tune``, ``records`` and ``compile --records`` from the command line."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from schedules.isa import isa_for, resolve_target
from schedules.records import Record, RecordFile
from schedules.space import space_of
from tests.helpers.tiny import tiny_vit_module
from tvm_vitq.cli import app
from tvm_vitq.quantizers import quantize
from tvm_vitq.saved import load_quantized, save_quantized
from tvm_vitq.tuning.extract import extract

ISA = isa_for(resolve_target("x86-64-v3"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype("float32")
    path = tmp_path_factory.mktemp("tiny") / "tiny.vitq"
    return save_quantized(quantize(tiny_vit_module(depth=1), images), path)


def _records(tiny: Path, folder: Path) -> list[Record]:
    """Write a best for every task: some other point than the default, if there is one."""
    from relay_passes.pipeline import lower

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for job in extract(lower(load_quantized(tiny)), ISA):
        space = space_of(job.task, ISA)
        assert space is not None
        point = space.ranked()[-1]
        made.append(Record("best", ISA.name, job.task.kind, job.task.fields, point, 1e-5, 0.9,
                           None, 1, "cpu", "2026-01-01"))
        RecordFile.of(folder, ISA).append(made[-1])
    return made


def _run(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def test_compile_uses_records_and_says_so(tiny: Path, tmp_path: Path) -> None:
    made = _records(tiny, tmp_path / "r")
    words = ["compile", tiny, "--target", "x86-64-v3", "--json", "-o"]
    status, out, _ = _run(*words, tmp_path / "t.so", "--records", tmp_path / "r")
    tuned = json.loads(out)
    assert status == 0 and tuned["equal"]
    assert tuned["schedules"] == {"hits": len(made), "misses": 0, "refused": []}
    plain = json.loads(_run(*words, tmp_path / "p.so", "--records", "none")[1])
    assert plain["schedules"] == {"hits": 0, "misses": len(made), "refused": []}
    file = RecordFile.of(tmp_path / "old", ISA)
    file.path.parent.mkdir()
    file.append(replace(made[0], versions={"tvm": "0.1", "kernels": 1}))
    old = json.loads(_run(*words, tmp_path / "o.so", "--records", tmp_path / "old")[1])
    assert "which was made with TVM 0.1" in old["schedules"]["refused"][0]
    file = RecordFile.of(tmp_path / "other", ISA)
    file.path.parent.mkdir()
    file.append(replace(made[0], point={"rows": 99}))
    other = json.loads(_run(*words, tmp_path / "o.so", "--records", tmp_path / "other")[1])
    assert "a record whose schedule its kernel does not have" in other["schedules"]["refused"][0]
    status, _, err = _run(*words, tmp_path / "x.so", "--records", tmp_path / "nowhere")
    assert status == 2 and "there are no records at" in err and not (tmp_path / "x.so").exists()
    (tmp_path / "empty").mkdir()
    status, _, err = _run(*words, tmp_path / "x.so", "--records", tmp_path / "empty")
    assert status == 2 and "there are no records at" in err


def test_merge_list_and_prune(tiny: Path, tmp_path: Path) -> None:
    made = _records(tiny, tmp_path / "a")
    other = RecordFile.of(tmp_path / "b", ISA)
    other.path.parent.mkdir()
    other.append(replace(made[0], when="2026-02-02", ratio=0.8))
    other.append(replace(made[1], what="trial", when="2026-02-02"))
    other.append(made[2])
    other.append(replace(made[0], versions={"tvm": "0.1", "kernels": 1}))
    status, out, _ = _run("records", "merge", tmp_path / "a", tmp_path / "b", "--json")
    merged = json.loads(out)
    assert status == 0 and merged["added"] == 2 and merged["records"] == {"avx2": len(made) + 2}
    assert "TVM 0.1" in merged["refused"][0]
    listed = json.loads(_run("records", "list", tmp_path / "a", "--json")[1])
    assert len(listed["best"]) == len(made)
    assert [row["ratio"] for row in listed["best"] if row["when"] == "2026-02-02"] == [0.8]
    assert sum(row["trials"] for row in listed["best"]) == 1
    pruned = json.loads(_run("records", "prune", tmp_path / "a", "--json")[1])
    assert pruned == {"kept": len(made), "removed": 2, "refused": []}
    assert len(RecordFile.of(tmp_path / "a", ISA).read()) == len(made)
    assert _run("records", "list", tmp_path / "a")[0] == 0
    (tmp_path / "empty").mkdir()
    for words in (("prune", tmp_path / "c"), ("prune", tmp_path / "empty"),
                  ("list", tmp_path / "empty"), ("merge", tmp_path / "d", tmp_path / "empty")):
        status, _, err = _run("records", *words)
        assert status == 2 and "there are no records at" in err
    assert _run("records")[1].startswith("Usage: ")
    two = RecordFile.of(tmp_path / "e", ISA)
    two.path.parent.mkdir()
    for record in made[:2]:
        two.append(replace(record, versions={"tvm": "0.1", "kernels": 1}))
    assert "2 records, which were made with" in _run("records", "list", tmp_path / "e")[1]
    (tmp_path / "README.md").write_text("# no records\n")
    status, _, err = _run("records", "merge", tmp_path / "f", tmp_path / "README.md")
    assert status == 2 and "is no file of records" in err


@pytest.mark.parametrize("words,said", [
    ([], "say when to stop"),
    (["--trials", "1", "--boards", "2"], "--boards goes with --tracker"),
    (["--trials", "1", "--target", "aarch64"], "use --rpc or --tracker"),
    (["--trials", "1", "--target", "x86-64"], "kernels for x86-64 are not tuned"),
    (["--trials", "1", "--target", "sm_80"], "tune on the machine that it is in"),
    (["--trials", "1", "--target", "sm_80", "--threads", "2"], "--threads is for processors"),
    (["--trials", "1", "--target", "sm_80", "--rpc", "127.0.0.1:9"], "leave out --rpc"),
    (["--trials", "1", "--records", "none"], "--records none means no records"),
    (["--trials", "1", "--tracker", "127.0.0.1:9", "--key", "k"], "127.0.0.1:9"),
    (["--trials", "1", "--rpc", "127.0.0.1:9"], "127.0.0.1:9"),
    (["--trials", "1", "--key", "k"], "--key goes with"),
    (["--trials", "1", "--plot", "/nowhere/x.png"], "no folder"),
    (["--trials", "1", "--plot", "x.txt"], "--plot writes a PNG"),
])  # fmt: skip
def test_refused_before_any_work(
    tiny: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    start = time.monotonic()
    status, _, err = _run("tune", tiny, "--records", tmp_path / "r", *words)
    assert time.monotonic() - start < 30
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1


def test_tune_then_compile(tiny: Path, tmp_path: Path) -> None:
    words = ["tune", tiny, "--target", "x86-64-v3", "--records", tmp_path / "r", "--trials", 6]
    status, out, _ = _run(*words, "--plot", tmp_path / "p.png", "--json")
    document = json.loads(out)
    assert status == 0 and document["trials"] == 6 and document["gain"] >= 1
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = _run(*words)
    assert status == 0 and "linear" in out
    assert "6 trials" in out and "and 6 that were known" in out
    out = _run("compile", tiny, "--target", "x86-64-v3", "-o", tmp_path / "t.so", "--json",
               "--records", tmp_path / "r")[1]
    assert json.loads(out)["schedules"]["hits"] >= 1
