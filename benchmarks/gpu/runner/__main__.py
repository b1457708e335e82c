"""Command line of the runner: see ``README.md`` beside this folder.

``python3 -m runner`` checks and times everything; ``check`` compares logits only and needs no
PyTorch; ``table FILE`` prints results again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .device import why_not
from .ffi import Runtime, RuntimeFailure
from .report import load_results, tables
from .session import alone, bound, sit, work
from .tasks import STAGES, TOOLS, Bundle, Task, check, tasks

__all__ = ["main"]

_HERE = Path(__file__).resolve().parent.parent


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m runner", description=__doc__)
    parser.add_argument("verb", nargs="?", default="run", choices=("run", "check", "table", "work"),
                        metavar="VERB", help="run (default), check, table")  # fmt: skip
    parser.add_argument("files", nargs="*", type=Path, help="results, for table")
    parser.add_argument("--bundle", type=Path, default=_HERE, help="folder with bundle.json")
    parser.add_argument("--out", type=Path, default=Path("results.json"),
                        help="results; a file that is there is gone on with")  # fmt: skip
    parser.add_argument("--budget", type=float, default=540, help="seconds [540]")
    usual = [stage for stage in STAGES if stage != "sanitize"]
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=usual, metavar="STAGE",
                        help=f"of {', '.join(STAGES)} [all but sanitize]")  # fmt: skip
    parser.add_argument("--models", nargs="+", help="names in bundle.json [all]")
    parser.add_argument("--batches", nargs="+", type=int, help="[all]")
    parser.add_argument("--sanitize", nargs="*", choices=TOOLS, metavar="TOOL",
                        help="run compute-sanitizer's tools, too [all four]")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="do failed tasks again")
    parser.add_argument("--inputs", type=int, help="for check: how many derived inputs [all]")
    parser.add_argument("--replays", type=int, default=5,
                        help="for check: golden vectors again, so often [5]")  # fmt: skip
    parser.add_argument("--current", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0: done; 1: logits differ, or could not be compared; 2: wrong input.

    130 if it was stopped: what was measured is in the results file, and the same command goes on.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    try:
        if options.verb == "table":
            documents = [load_results(path) for path in options.files or [options.out]]
            print("\n\n".join(tables(document) for document in documents))
            return 0
        return _run(options, given)
    except (OSError, ValueError, RuntimeFailure) as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "" if options.verb == "check" else (
            f": what was measured is in {options.out}, and the same command goes on")  # fmt: skip
        print(f"stopped{goes_on}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, given: list[str]) -> int:
    if options.files:
        raise ValueError(f"{options.verb} takes no {options.files[0]}; files are for table")
    for name in ("inputs", "replays"):
        count = getattr(options, name)
        if count is not None and count < 1:
            raise ValueError(f"--{name} {count}: it must be at least 1")
    if options.budget <= 0:
        raise ValueError(f"--budget {options.budget:g}: give the seconds that may be taken")
    bundle = Bundle(options.bundle)
    unknown = sorted(set(options.models or ()) - set(bundle.models))
    if unknown:
        raise ValueError(f"no model {', '.join(unknown)}; there are {', '.join(bundle.models)}")
    missing = sorted(set(options.batches or ()) - {t.batch for t in tasks(bundle, ["check"])})
    if missing:
        raise ValueError(f"no artefact for batch {', '.join(map(str, missing))} in this bundle")
    why = why_not(bundle.manifest["arch"]) if bundle.device == "cuda" else ""
    if why:
        raise RuntimeFailure(why)
    if options.verb != "work":
        bundle.check_files()
    if options.verb == "check":
        return _check(options, bundle)
    stages = [*options.stages, *(["sanitize"] if options.sanitize is not None else [])]
    tools = options.sanitize or TOOLS
    todo = tasks(bundle, stages, options.models, options.batches, tools)
    if options.verb == "work":
        bound(options.parent)
        return work(bundle, todo, options.out, bundle.device, options.deadline,
                    lambda task: _note(options.current, task))  # fmt: skip
    child = [sys.executable, "-m", __package__ or "runner", "work",
             *[word for word in given if word not in ("run", "--retry")]]  # fmt: skip
    with alone(bundle.folder):
        if options.retry and options.out.is_file():
            document = load_results(options.out)
            document["tasks"]["failed"] = {}
            options.out.write_text(json.dumps(document), encoding="utf-8")
        results = sit(bundle, todo, options.out.resolve(), bundle.device, options.budget, child)
    print("\n" + tables(results.document))
    checks = [entry for model in results.document["checks"].values() for entry in model.values()]
    failed = [key for key in results.document["tasks"]["failed"] if key.startswith("check/")]
    return 0 if all(entry["equal"] for entry in checks) and not failed else 1


def _note(path: Path, task: Task) -> None:
    path.write_text(f"{task.key} {time.time()}", encoding="utf-8")


def _check(options: argparse.Namespace, bundle: Bundle) -> int:
    runtime = Runtime(bundle.folder / "lib", bundle.device)
    equal = True
    for task in tasks(bundle, ["check"], options.models, options.batches):
        found = check(bundle, task.model, task.batch, runtime, options.inputs,
                      options.replays)  # fmt: skip
        equal &= found["equal"]
        counts = ", ".join(f"{name} {entry['different']} of {entry['logits']} different"
                           for name, entry in found.items() if name != "equal")  # fmt: skip
        print(f"{task.model} batch {task.batch}: {counts}", flush=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
