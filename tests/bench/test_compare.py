"""Order of the turns, statistics, choice of peers, where the float model comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from relay_passes.errors import VitqError
from tvm_vitq.bench import peers as peer_list
from tvm_vitq.bench.chart import draw
from tvm_vitq.bench.compare import float_source, interleave, summarise
from tvm_vitq.bench.layers import summary
from tvm_vitq.bench.peer import Peer
from tvm_vitq.bench.worker import cores


@dataclass
class Fake:
    """A runner that writes its name down and takes a time of its own."""

    name: str
    seconds: float
    log: list[str] = field(default_factory=list)

    def turn(self) -> float:
        self.log.append(self.name)
        return self.seconds


def test_every_peer_has_ours_just_before_it() -> None:
    log: list[str] = []
    steps: list[int] = []
    peers = {name: Fake(name, s, log) for name, s in (("b", 3.0), ("c", 5.0))}
    times, partners = interleave(Fake("a", 1.0, log), peers, 3, steps.append)
    assert log == ["a", "b", "a", "c"] * 3
    assert steps == [1, 1, 1]
    assert {name: values.tolist() for name, values in times.items()} == {
        "b": [3.0] * 3, "c": [5.0] * 3}
    assert all(values.tolist() == [1.0] * 3 for values in partners.values())


def test_alone() -> None:
    times, partners = interleave(Fake("a", 1.0), {}, 4, lambda _: None)
    assert times == {} and partners["tvm-vitq"].tolist() == [1.0] * 4


def test_ratio_is_the_median_of_the_pairs() -> None:
    """Not the ratio of the medians: whatever slows one pair slows both halves of it."""
    found = summarise(np.array([2.0, 40.0, 3.0]), np.array([1.0, 20.0, 1.0]))
    assert found["ratio"] == 2.0
    assert found["median_ms"] == 3000.0 and found["runs"] == 3
    assert found["p10_ms"] <= found["median_ms"] <= found["p90_ms"]


def test_unknown_peer_is_named_with_the_nearest() -> None:
    with pytest.raises(VitqError, match="unknown peer 'ort-fp23'; did you mean ort-fp32"):
        peer_list.choose("torch-eager,ort-fp23")
    with pytest.raises(VitqError, match="names nothing"):
        peer_list.choose(" , ")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Peer("absent", "int8", "", ("no_such_package_",), lambda job: lambda: None)
    monkeypatch.setattr(peer_list, "PEERS", {"absent": absent})
    chosen, skipped = peer_list.choose("all")
    assert chosen == []
    assert skipped == [{"runner": "absent", "reason": "not installed (pip install .[bench])"}]
    with pytest.raises(VitqError, match=r"absent needs no_such_package_.*\.\[bench\]"):
        peer_list.choose("absent")


def test_the_issued_peers_are_listed_once() -> None:
    assert [p.precision for p in peer_list.PEERS.values()].count("int8") == 4
    assert len(peer_list.PEERS) == 8
    assert all(peer.name == name and peer.packages for name, peer in peer_list.PEERS.items())


def test_float_source(tmp_path: Path) -> None:
    factory = {"kind": "timm", "source": "vit", "arguments": {"depth": 1}, "checkpoint": None}
    meta = {"model": {"factory": factory}}
    source, note = float_source(meta)
    assert (source.source, source.arguments, note) == ("vit", {"depth": 1}, None)
    factory["checkpoint"] = str(tmp_path / "gone.pth")
    source, note = float_source(meta)
    assert source.checkpoint is None and note is not None and "random" in note
    source, _ = float_source(meta, model="other")
    assert source.source == "other" and source.arguments is None
    with pytest.raises(VitqError, match="--checkpoint"):
        float_source(meta, checkpoint=str(tmp_path / "gone.pth"))
    with pytest.raises(VitqError, match="--model"):
        float_source({"model": {"factory": {"kind": "module", "source": None}}})
    with pytest.raises(VitqError, match=r"gone\.onnx is not there"):
        float_source(meta, model=str(tmp_path / "gone.onnx"))


def test_more_threads_than_cores() -> None:
    with pytest.raises(VitqError, match="may use"):
        cores(10**6)
    assert len(cores(1)) == 1


def test_layers_add_up() -> None:
    linear = {"op": "vitq.linear", "shape": [4, 8, 16], "macs": 512,
              "dots": [{"dot": "fast", "chain": 2, "columns": 6}, {"dot": "slow", "columns": 2}]}
    kernels = {"k": linear, "k1": linear, "s": {"op": "vitq.softmax"}}
    calls = [("k", 3e-6), ("s", 2e-6), ("k1", 1e-6)]
    found = summary(calls, kernels, {("fast", 2): 2.0, ("slow", 1): 1.0}, 1, 7e-6)
    assert found["outside_matmuls"] == pytest.approx(1 / 3, abs=1e-3)
    assert [(row["op"], row["calls"]) for row in found["operators"]] == [
        ("vitq.linear", 2), ("vitq.softmax", 1)]
    (row,) = (row for row in found["kernels"] if row["macs"])
    assert row["gmacs"] == pytest.approx(1024 / 4e-6 / 1e9, abs=0.01)
    # 6 columns at 2 and 2 columns at 1 take 5 units of time for 8: the peak is 1.6.
    assert row["of_peak"] == pytest.approx(0.256 / 1.6, abs=1e-3)
    assert found["peaks"] == {"fast x2": 2.0, "slow": 1.0}
    assert found["weights"] == {"of_peak": row["of_peak"], "work": {"fast x2": 0.75, "slow": 0.25}}


def test_chart(tmp_path: Path) -> None:
    rows = [{"runner": name, "precision": "int8", "ratio": 1.5, **summarise(np.array([s, 2 * s]))}
            for name, s in (("tvm-vitq", 1e-3), ("peer", 2e-3))]
    document = {"results": rows, "model": "m", "batch": 1, "threads": 2, "processor": "p"}
    path = draw(document, tmp_path / "chart.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(VitqError, match="cannot write the chart"):
        draw(document, tmp_path / "no" / "chart.png")
