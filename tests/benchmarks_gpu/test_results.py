"""Statistics, order of work, time limits, results on disk, tables and bars: no GPU, no model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.runner import __main__ as command
from benchmarks.gpu.runner import device, session
from benchmarks.gpu.runner.bars import bars
from benchmarks.gpu.runner.inputs import KINDS, derive, noise
from benchmarks.gpu.runner.kernels import rows_of
from benchmarks.gpu.runner.report import tables
from benchmarks.gpu.runner.results import Results
from benchmarks.gpu.runner.tasks import STAGES, Bundle, Ruined, Task, tasks, verdict
from benchmarks.gpu.runner.timing import Clock, interleave, repeats, summarise

MODEL = {"architecture": {"family": "vit"}, "weights": "random", "recipe": "minmax", "blocks": 12,
         "bars": True, "checks": "c.npz", "artifacts": {"1": "a", "8": "b", "64": "c"}}  # fmt: skip
MANIFEST = {"made": "now", "arch": "sm_90", "device": "cuda", "versions": {},
            "models": {"deit_tiny": MODEL, "deit_base": MODEL}}  # fmt: skip
GPU = {"kind": "cuda", "name": "a GPU", "driver": "1", "torch": "2"}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "bundle.json").write_text(json.dumps(MANIFEST))
    return Bundle(tmp_path)


@pytest.fixture
def results(bundle: Bundle, tmp_path: Path) -> Results:
    return Results.open(tmp_path / "r.json", GPU, bundle.identity())


def test_ratio_is_the_median_of_the_rounds() -> None:
    found = summarise([2.0, 40.0, 3.0], [1.0, 20.0, 1.0])
    assert found["ratio"] == 2.0 and found["median_us"] == 3e6 and found["rounds"] == 3
    assert found["p10_us"] == pytest.approx(2.2e6) and found["p90_us"] == pytest.approx(32.6e6)


def test_turns_are_whole_rotations() -> None:
    assert repeats(1e-5, 4) == 400
    assert repeats(1.0, 4) == 4


def test_runners_take_turns() -> None:
    log: list[tuple[str, int]] = []
    runners = {name: lambda i, name=name: (log.append((name, i)), time.sleep(0.001))
               for name in "ab"}  # fmt: skip
    found = interleave(runners, 2, 2, Clock("cpu"))
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
    assert min(found["a"]) >= 0.001
    order = [name for i, (name, _) in enumerate(log) if i == 0 or log[i - 1][0] != name]
    assert order == ["a", "b"] * 3
    assert {i for _, i in log} == {0, 1}


def test_derived_inputs_are_reproducible_and_within_range() -> None:
    base = np.random.default_rng(0).integers(-60, 60, (2, 3, 8, 32)).astype(np.int8)
    codes = derive(base, 3 * KINDS, -100, 120)
    assert codes.dtype == np.int8 and codes.shape == (3 * KINDS, 3, 8, 32)
    assert codes.min() == -100 and codes.max() == 120
    assert len({image.tobytes() for image in codes}) == 3 * KINDS
    np.testing.assert_array_equal(codes[:5], derive(base, 5, -100, 120))


def test_noise_is_splitmix64() -> None:
    assert noise(2, 0).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_most_important_first(bundle: Bundle) -> None:
    found = tasks(bundle, STAGES, tools=["memcheck"])
    keys = [task.key for task in found]
    assert keys[:3] == ["check/deit_tiny/b8", "check/deit_base/b8", "check/deit_tiny/b1"]
    assert keys[6:9] == ["peaks", "quick/deit_tiny/b8", "quick/deit_base/b8"]
    assert keys[-2:] == ["sanitize-memcheck/deit_tiny/b1", "sanitize-memcheck/deit_base/b1"]
    assert [t.key for t in tasks(bundle, ["quick"], ["deit_base"], [64])] == ["quick/deit_base/b64"]


def test_work_saves_goes_on_and_keeps_to_the_time(
    bundle: Bundle, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.save()
    done: list[str] = []

    def perform(task: Task, *_: Any) -> None:
        done.append(task.key)
        if task.batch == 1:
            raise RuntimeError("out of memory\nsecond line")

    monkeypatch.setattr(session, "perform", perform)
    monkeypatch.setattr(session, "describe", lambda _device: GPU)
    todo = tasks(bundle, ["quick"], ["deit_tiny"])
    assert session.work(bundle, todo, results.path, "cuda", time.time() + 1e4) == 0
    state = json.loads(results.path.read_text())["tasks"]
    assert list(state["done"]) == ["quick/deit_tiny/b8", "quick/deit_tiny/b64"]
    assert state["failed"] == {"quick/deit_tiny/b1": "RuntimeError: out of memory"}
    todo = [*todo, Task("compile", "deit_tiny", 8), Task("peaks")]
    assert session.work(bundle, todo, results.path, "cuda", time.time() + 60) == 0
    assert done == [t.key for t in todo[:3]] + ["peaks"]  # compile needs two minutes
    state = json.loads(results.path.read_text())["tasks"]
    assert state["skipped"]["compile/deit_tiny/b8"].startswith("no time left")


def test_a_ruined_context_ends_the_worker(
    bundle: Bundle, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perform(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(session, "perform", perform)
    monkeypatch.setattr(session, "describe", lambda _device: GPU)
    todo = tasks(bundle, ["check"])
    status = session.work(bundle, todo, results.path, "cuda", time.time() + 1e4)
    assert status != 0
    assert list(json.loads(results.path.read_text())["tasks"]["failed"]) == [todo[0].key]


def test_a_ruined_context_costs_one_peer(
    bundle: Bundle, results: Results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The task itself begins anew in the next worker, which is started at once."""
    monkeypatch.setattr(session, "describe", lambda _device: GPU)

    def perform(task: Task, _bundle: Bundle, found: Results, *_: Any) -> None:
        found.document["tasks"]["failed"][f"{task.key}: a peer"] = "CUDA error"
        raise Ruined(task.key)

    todo = [Task("quick", "deit_tiny", 8)]
    with monkeypatch.context() as patch:
        patch.setattr(session, "perform", perform)
        status = session.work(bundle, todo, results.path, "cuda", time.time() + 1e4)
    reopened = Results.open(results.path, GPU, bundle.identity())
    assert session.pending(todo, reopened) == todo
    times = tmp_path / "times"
    script = tmp_path / "child.py"
    script.write_text(f"""
from pathlib import Path
times = Path({str(times)!r})
times.write_text((times.read_text() if times.exists() else "") + "x")
raise SystemExit({status} if len(times.read_text()) < 3 else 0)
""")
    session.sit(bundle, todo, results.path, "cuda", 30, [sys.executable, str(script)])
    assert times.read_text() == "xxx"


def test_estimates_follow_what_was_seen() -> None:
    assert session.estimate(Task("compile", "a", 1), {}) == 120
    assert session.estimate(Task("compile", "a", 1), {"compile/b/b1": 50.0, "check/b": 900}) == 60


CHILD = """
import sys, time
sys.path.insert(0, {root!r})
key, current = sys.argv[1], sys.argv[sys.argv.index("--current") + 1]
open(current, "w").write(key + " " + str(time.time() - 1000))
{action}
"""


@pytest.mark.parametrize("action,why", [("time.sleep(60)", "no answer in 120 s"),
                                        ("import os; os.abort()", "status -6")])  # fmt: skip
def test_a_stuck_or_dead_worker_is_noted(
    bundle: Bundle, results: Results, tmp_path: Path, action: str, why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(session, "describe", lambda _device: GPU)
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=str(tmp_path), action=action))
    todo = [Task("check", "deit_tiny", 8)]
    start = time.time()
    found = session.sit(bundle, todo, results.path, "cuda", 30,
                        [sys.executable, str(script), todo[0].key])  # fmt: skip
    assert why in found.document["tasks"]["failed"][todo[0].key]
    assert time.time() - start < 10


def test_other_device_or_bundle_is_refused(bundle: Bundle, results: Results) -> None:
    results.save()
    with pytest.raises(ValueError, match="another device"):
        Results.open(results.path, {**GPU, "name": "other"}, bundle.identity())
    with pytest.raises(ValueError, match="another bundle"):
        Results.open(results.path, GPU, {**bundle.identity(), "made": "later"})


def test_kernels_are_added_up_by_symbol() -> None:
    told = {"fc": {"op": "vitq.linear+gelu", "shape": [4096, 1024, 512], "macs": 2_000_000_000},
            "ln": {"op": "vitq.layer_norm"}}  # fmt: skip
    times = [("fc_kernel", 10.0), ("fc_kernel", 10.0), ("ln_kernel_1", 2.0), ("Memcpy DtoD", 1.0)]
    found = rows_of(times * 2, 2, told)
    assert found["launches"] == 3
    assert [(r["symbol"], r["calls"], r["us"]) for r in found["rows"]] == [
        ("fc", 2, 20.0), ("ln", 1, 2.0), ("Memcpy DtoD", 1, 1.0)]  # fmt: skip
    assert found["rows"][0]["tops"] == 400.0 and found["large"]["tops"] == 400.0


@pytest.mark.parametrize("output,status,clean", [
    ("========= ERROR SUMMARY: 0 errors", 0, True),
    ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
    ("========= ERROR SUMMARY: 0 errors", 1, False),
    ("========= Invalid __global__ read\n========= ERROR SUMMARY: 3 errors", 0, False),
    ("========= ERROR: Device not supported", 0, False),
])  # fmt: skip
def test_reading_the_sanitizer(output: str, status: int, clean: bool) -> None:
    assert verdict(output, status)["clean"] is clean


def fill(document: dict[str, Any], half: float, compiled: bool = True) -> None:
    """Write results as the runner does."""
    def entry(kind: str, ratio: float) -> dict[str, Any]:
        return {**summarise([ratio], [1.0]), "kind": kind, "group": "quick"}

    for model in ("deit_tiny", "deit_base"):
        good = {"inputs": 2, "logits": 2000, "different": 0}
        document["checks"][model] = {"8": {"golden": good, "derived": good, "repeated": good,
                                           "equal": True}}  # fmt: skip
        document["times"][model] = {b: {"runners": {
            "ours": entry("ours", 1.0), "torch fp32": entry("fp32", 9.0),
            "torch fp32, graph": entry("fp32", 5.0), "torch fp16, graph": entry("half", 4.0),
            **({"torch.compile fp16, graph": entry("half", half)} if compiled else {}),
        }} for b in ("1", "8", "64")}  # fmt: skip
        document["kernels"][model] = {"64": {"launches": 88.0, "rows": [
            {"symbol": "fc", "op": "vitq.linear", "shape": [1, 2, 3], "calls": 12, "us": 9.0,
             "tops": 900.0}],
            "large": {"tops": 900.0, "worst_tops": 600.0, "us": 1.0}}}  # fmt: skip
    document["peaks"] = {"int8_tops": {"8192": 1400.0}, "int8_peak_tops": 1400.0,
                         "bf16_peak_tops": 700.0, "copy_gb_per_s": 3000.0}  # fmt: skip
    document["sanitize"] = {"memcheck": {"deit_tiny b1": verdict("ERROR SUMMARY: 0 errors", 0)}}


def verdicts(document: dict[str, Any]) -> list[str]:
    return [row[3] for row in bars(document)]


def test_bars(results: Results) -> None:
    document = results.document
    assert set(verdicts(document)) == {"not shown"}
    fill(document, 1.5)
    assert verdicts(document) == ["met"] * 10
    text = tables(document)
    assert "1.50× (deit_tiny 1.50, deit_base 1.50)" in text and "64% (900 of 1400" in text
    fill(document, 1.2)
    assert verdicts(document) == ["met"] * 3 + ["missed"] * 3 + ["met"] * 4
    fill(document, 1.5, compiled=False)
    assert verdicts(document)[3:6] == ["met so far"] * 3
    document["times"]["deit_base"] = {}
    assert verdicts(document)[2] == "not shown"
    document["checks"]["deit_tiny"]["8"]["golden"] = {"inputs": 2, "logits": 2000, "different": 1}
    assert verdicts(document)[0] == "missed"


def test_nothing_is_shown_by_a_processor(results: Results) -> None:
    fill(results.document, 9.0)
    results.document["device"] = {"kind": "cpu", "name": "a processor"}
    assert set(verdicts(results.document)) == {"not shown"}


def test_table_command(results: Results, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fill(results.document, 1.5)
    results.document["tasks"]["skipped"]["ort/deit_tiny/b8: x"] = "not installed"
    results.save()
    assert main(["table", str(results.path)]) == 0
    printed = capsys.readouterr().out
    assert "a GPU, driver 1, PyTorch 2" in printed and "torch.compile fp16, graph" in printed
    (tmp_path / "other.json").write_text("{}")
    assert main(["table", str(tmp_path / "other.json")]) == 2


def test_runner_needs_the_standard_library_and_numpy_only() -> None:
    code = """
import sys
import benchmarks.gpu.runner.__main__
print(sorted(sys.modules.keys() & {"tvm", "tvm_ffi", "torch", "timm", "rich"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.stdout.strip() == "[]"


class Driver:
    """Stands for ``libcuda.so.1``."""

    def __init__(self, status: int = 0, count: int = 1, capability: int = 90) -> None:
        self.status, self.count, self.parts = status, count, divmod(capability, 10)

    def cuInit(self, _flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = self.count

    def cuDeviceGet(self, device: Any, _place: int) -> None:
        device._obj.value = 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, _device: Any) -> None:
        value._obj.value = self.parts[attribute - 75]


@pytest.mark.parametrize(("driver", "said"), [
    (None, "no CUDA device: libcuda.so.1: not there"),
    (Driver(status=100), "no CUDA device: the driver's cuInit gives error 100"),
    (Driver(count=0), "no CUDA device: the driver finds none"),
    (Driver(capability=89), "the artefacts are for sm_90, and this device is sm_89"),
])  # fmt: skip
def test_no_device_is_one_line(
    driver: Driver | None, said: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(f"{name}: not there")
        return driver

    monkeypatch.setattr(device.ctypes, "CDLL", load)
    for verb in ("check", "run"):
        assert command.main([verb, "--bundle", str(bundle.folder)]) == 2
        assert capsys.readouterr() == ("", f"error: {said}\n")


def test_a_device_that_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: Driver(capability=100))
    assert device.why_not("sm_90") == ""
    assert "sm_90a alone, and this device is sm_100: make a bundle" in device.why_not("sm_90a")
