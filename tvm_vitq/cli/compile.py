"""``tvm-vitq compile``: a trained model and calibration images in, one proved artefact out."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .common import DebugOption, JsonOption, ThreadsOption, counted, emit, progress_bar, verb

__all__ = ["command"]


class Nonlinear(str, Enum):
    """Families of integer softmax and GELU."""

    TABLE = "table"
    POLY = "poly"
    SHIFT = "shift"


class Input(str, Enum):
    """Forms of the compiled function's input."""

    FLOAT32 = "float32"
    UINT8 = "uint8"


class Observer(str, Enum):
    """Ways to choose a range; search takes the best at each place."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    SEARCH = "search"


PREPROCESSING = "Preprocessing (from the model's own configuration unless given)"


def _preprocess(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=PREPROCESSING)


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="timm name, factory 'package.module:function', .pt2, .onnx, or what "
            "--save-quantized wrote.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The artefact to write.")],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Weights: .safetensors, .pth, ...")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option("--calib", help="Calibration images: folder, .npz or .npy; no labels needed."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Calibration images to use, taken evenly.")
    ] = 128,
    nonlinear: Annotated[
        Nonlinear | None, typer.Option("--nonlinear", help="Integer softmax and GELU.")
    ] = None,
    observer: Annotated[Observer | None, typer.Option("--observer", help="Range rule.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Quantization recipe: a preset or a JSON file.")
    ] = None,
    input_form: Annotated[
        Input, typer.Option("--input", help="float32: normalised NCHW; uint8: raw NHWC pixels.")
    ] = Input.FLOAT32,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images per call. [the file's, or 1]")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="native, aarch64, aarch64+dotprod, aarch64+i8mm, a processor name such as "
            "x86-64-v3 or cortex-a76, or a GPU's: cuda, sm_75 ... sm_90a.",
        ),
    ] = "native",
    verify_with: Annotated[
        str | None,
        typer.Option("--verify-with",
                     help="Emulator for the target's code: qemu-aarch64, ...; emulator for a "
                     "GPU's."),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option("--records", help="Folder of tuning records to use before the package's; "
                     "none for the default rules alone."),
    ] = None,
    save_quantized: Annotated[
        Path | None, typer.Option("--save-quantized", help="Also save the quantized module.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Class names to store: one a line, or JSON.")
    ] = None,
    input_size: Annotated[
        str | None, _preprocess("Input size, S or H,W or C,H,W.", "--input-size")
    ] = None,
    resize: Annotated[
        str | None, _preprocess("Size before the crop, S or H,W.", "--resize")
    ] = None,
    crop_pct: Annotated[
        float | None, _preprocess("Share of the resized image that is kept.", "--crop-pct")
    ] = None,
    crop_mode: Annotated[
        str | None, _preprocess("center, squash or border.", "--crop-mode")
    ] = None,
    interpolation: Annotated[
        str | None, _preprocess("bilinear, bicubic, ...", "--interpolation")
    ] = None,
    mean: Annotated[str | None, _preprocess("Mean per channel, M or M,M,M.", "--mean")] = None,
    std: Annotated[str | None, _preprocess("Deviation per channel, S or S,S,S.", "--std")] = None,
    dump_ir: Annotated[
        Path | None, typer.Option("--dump-ir", help="Folder for the IR after every phase.")
    ] = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile MODEL to an integer-only shared library, and prove it."""
    # OpenMP reads this when torch is loaded. Threads that spin while they wait for one that has
    # lost its core made calibration three times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with verb(debug):
        from tvm_vitq.job import CompileJob

        job = CompileJob(
            model=model,
            output=output,
            checkpoint=checkpoint,
            calib=calib,
            samples=samples,
            recipe=recipe,
            choices={
                "nonlinear": nonlinear.value if nonlinear else None,
                "observer": observer.value if observer else None,
            },
            input_form=input_form.value,
            batch=batch,
            target=target,
            save_quantized=save_quantized,
            labels=labels,
            preprocess={
                "input_size": input_size,
                "resize": resize,
                "crop_pct": crop_pct,
                "crop_mode": crop_mode,
                "interpolation": interpolation,
                "mean": mean,
                "std": std,
            },
            dump_ir=dump_ir,
            threads=threads,
            verify_with=verify_with,
            records=records,
        )
        with progress_bar(job.phases, "start") as (advance, say):
            document = job.run(advance, say)

    def show(console: Console) -> None:
        phases = ", ".join(f"{name} {s:.1f} s" for name, s in document["seconds"].items()
                           if document["equal"] is not None or not name.startswith("compare"))
        size = f"{document['size_bytes']:,} bytes"
        if document["size_percent"] is not None:
            size += f", {document['size_percent']} % of the fp32 weights"
        console.print(f"{document['artifact']}: {size}")
        vectors = f"{document['vectors']} golden vectors"
        if document["equal"] is None:
            golden = f"{vectors} stored, not replayed here: {document['not_replayed']}"
            golden += "; --verify-with emulator or qemu-aarch64 replays them here"
        else:
            golden = f"equal to the reference on {vectors} ({document['logits_compared']} logits)"
            if "replayed_with" in document:
                golden += f" under {document['replayed_with']}"
        if "not_shown" in document:
            golden += f"; {document['not_shown']} yet"
        console.print(f"integer-only: yes; ranges proved: yes; {golden}")
        tuned = document["schedules"]
        counts = f"{counted(tuned['hits'], 'task')} from records, {tuned['misses']} by default"
        console.print(f"schedules: {counts}")
        for reason in tuned["refused"]:
            console.print(f"refused: {reason}", markup=False)
        console.print(phases, style="dim")

    emit(document, json, show)
