"""The results file: one JSON document, written whole after every task."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

__all__ = ["FORMAT", "Results", "damaged", "read_json"]

FORMAT = 1


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into one line.

    Raises
    ------
    ValueError
        Naming the file.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except (ValueError, KeyError, EOFError, BadZipFile) as why:
        raise ValueError(f"{path} is damaged: unpack or make it again ({why})") from None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return a document of a file; errors as of :func:`damaged`."""
    with damaged(path):
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not document:
            raise ValueError(f"not {what}")
        return document


class Results:
    """What is known so far, on disk.

    Attributes
    ----------
    document
        ``format, date, device, bundle``; ``checks``, ``times`` and ``kernels`` by model and batch;
        ``peaks``; ``sanitize`` by tool; ``tasks``: ``done`` (seconds), ``failed`` and ``skipped``
        (why), by task.
    """

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path, self.document = Path(path), document

    @classmethod
    def open(cls, path: Path, device: dict[str, Any], bundle: dict[str, Any]) -> Results:
        """Go on with a file, or begin one.

        Raises
        ------
        ValueError
            If the file is of another device or bundle.
        """
        path = Path(path)
        if path.is_file():
            document = read_json(path, "results")
            for key, now in (("device", device), ("bundle", bundle)):
                name = "name" if key == "device" else "made"
                if document.get("format") != FORMAT or document[key].get(name) != now.get(name):
                    raise ValueError(f"{path} is of another {key}: name another file with --out")
            return cls(path, document)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(path, {
            "format": FORMAT, "date": now, "device": device, "bundle": bundle, "checks": {},
            "peaks": None, "times": {}, "kernels": {}, "sanitize": {},
            "tasks": {"done": {}, "failed": {}, "skipped": {}},
        })  # fmt: skip

    def place(self, section: str, model: str, batch: int) -> dict[str, Any]:
        """Return the entry of a model and batch, made if need be."""
        entry: dict[str, Any] = self.document[section].setdefault(model, {})
        return entry.setdefault(str(batch), {})  # type: ignore[no-any-return]

    def save(self) -> None:
        """Write the file, whole or not at all."""
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)
