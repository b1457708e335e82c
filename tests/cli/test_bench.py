"""``tvm-vitq bench`` on the digits model, with the peers that every installation has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

PEERS = "torch-eager,ort-fp32,ort-dynamic"


def digits(folder: Path) -> None:
    import tvm_vitq
    from tvm_vitq import demo

    images = demo.normalise(demo.pixels(demo.digits("calib")[0]))[:16]
    module = tvm_vitq.load_model("tvm_vitq.demo:digits_vit")
    quantized = tvm_vitq.quantize(module, images, tvm_vitq.Recipe(observer="minmax"))
    tvm_vitq.compile(quantized, output=folder / "digits.so", golden=images)


@pytest.fixture(scope="session")
def artefact(build_once: Callable[..., Path]) -> Path:
    return build_once("bench_digits", digits) / "digits.so"


def test_json(cli: Cli, artefact: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    done = cli("bench", artefact, "--peers", PEERS, "--pairs", 3, "--warmup", 1, "--per-layer",
               "--plot", chart, "--json")
    assert done.code == 0, done.err
    document = done.json()
    results = {row["runner"]: row for row in document["results"]}
    assert list(results) == ["tvm-vitq", *PEERS.split(",")]
    for row in results.values():
        assert row["precision"] in ("fp32", "int8") and row["threads"] == row["batch"] == 1
        assert 0 < row["min_ms"] <= row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["ratio_p10"] <= row["ratio"] <= row["ratio_p90"]
    assert results["tvm-vitq"]["ratio"] == 1 and results["ort-dynamic"]["precision"] == "int8"
    assert results["tvm-vitq"]["runs"] == 9 and results["ort-fp32"]["runs"] == 3
    assert document["skipped"] == [] and document["pairs"] == 3
    assert document["fastest"]["int8"]["runner"] == "ort-dynamic"
    assert chart.read_bytes().startswith(b"\x89PNG")

    layers = document["layers"]
    assert 0 < layers["outside_matmuls"] < 1
    assert sum(row["share"] for row in layers["operators"]) == pytest.approx(1, abs=0.01)
    known = {row["op"] for row in layers["operators"]}
    assert {"vitq.softmax", "vitq.layer_norm", "vitq.matmul_requant"} <= known
    matmuls = [row for row in layers["kernels"] if row["macs"]]
    assert all(row["gmacs"] > 0 for row in matmuls)
    for row in matmuls:
        for dot in row["dots"]:
            assert dot["dot"] and dot["why"]
        if row["dots"]:
            assert row["of_peak"] > 0


def test_table(cli: Cli, artefact: Path) -> None:
    done = cli("bench", artefact, "--peers", "none", "--pairs", 2, "--per-layer")
    assert done.code == 0, done.err
    for word in ("tvm-vitq", "softmax", "outside matmuls", "65x256x64"):
        assert word in done.out


def test_refusals(refused: Callable[..., str], artefact: Path, tmp_path: Path) -> None:
    assert "--batch 8" in refused("bench", artefact, "--batch", 8)
    assert "unknown peer 'tensorrt'" in refused("bench", artefact, "--peers", "tensorrt")
    assert "--threads 4096" in refused("bench", artefact, "--threads", 4096)
    assert "no folder" in refused("bench", artefact, "--plot", tmp_path / "no" / "x.png")
    refused("bench", artefact, "--pairs", 0)
    refused("bench", tmp_path / "gone.so")


def test_a_named_peer_that_fails_is_an_error(
    refused: Callable[..., str], artefact: Path
) -> None:
    line = refused("bench", artefact, "--peers", "torch-eager", "--model", "no_such_model_")
    assert "torch-eager" in line and "no_such_model_" in line
