"""``make demo`` and the plug-in's pipeline, from outside."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import tvm
from PIL import Image
from tvm import relax

from tests.integration import models
from tvm_vitq import demo


def test_demo_passes_and_draws(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "tvm_vitq.demo", "--output", str(tmp_path / "demo")],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for word in ("top-1", "same prediction", "latency", "size", "Proofs", "golden vectors"):
        assert word in done.stdout
    assert "NO" not in done.stdout
    for name in ("digits.png", "logits.png"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert min(picture.size) > 400
    assert (tmp_path / "demo/digits/labels.csv").exists()
    # Its one thread is busy throughout, so processor time is what the clock says on a free core.
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 60


def test_plugged_in_pipeline_builds_the_same_function(digits_built: models.Built) -> None:
    """Nothing but tvm and the saved module: relax.get_pipeline("vitq") does the rest."""
    from schedules.isa import resolve_target

    quantized = digits_built.quantized()
    built = tvm.compile(
        quantized, resolve_target("native"), relax_pipeline=relax.get_pipeline("vitq")
    )
    vm = relax.VirtualMachine(built, tvm.cpu())
    x = demo.normalise(demo.pixels(demo.digits("test")[0][:1]))
    assert np.array_equal(vm["main"](tvm.runtime.tensor(x)).numpy(), digits_built.artifact().run(x))
