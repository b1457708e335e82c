"""libjpeg and libpng for an architecture, to be linked into a program that carries them along.

They are looked for where the architecture's compiler does. Another architecture's are fetched from
the system's own package sources with apt-get, which keeps its lists of that architecture in a
folder of ours: nothing of the system is changed, and root is not needed.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from relay_passes.errors import VitqError
from schedules.host import host_architecture

from .toolchain import cache_folder, compiler, reason

__all__ = ["ImageLibraries", "image_libraries"]

_ARCHIVES = ("libjpeg.a", "libpng16.a", "libz.a")
_HEADERS = "#include <stdio.h>\n#include <jpeglib.h>\n#include <png.h>\n"
_DEBIAN = {"aarch64": "arm64", "x86_64": "amd64"}
_PACKAGES = ("libpng-dev", "zlib1g-dev")
_JPEG_PACKAGES = ("libjpeg62-turbo-dev", "libjpeg-turbo8-dev")  # Debian's name and Ubuntu's


@dataclass(frozen=True)
class ImageLibraries:
    """What compiling and linking takes.

    Attributes
    ----------
    include
        Folders of headers, beside those that the compiler knows.
    archives
        Static libraries, in the linker's order.
    """

    include: tuple[Path, ...]
    archives: tuple[Path, ...]


def image_libraries(architecture: str) -> ImageLibraries:
    """Return the static libjpeg and libpng of an architecture.

    Raises
    ------
    VitqError
        If there are none and they cannot be fetched; it names Debian's packages.
    """
    found = _installed(compiler(architecture))
    if found is not None:
        return found
    name = _DEBIAN.get(architecture, architecture)
    if architecture == host_architecture():
        raise VitqError(
            f"no {', '.join(_ARCHIVES)} with their headers to link; install them, on Debian and "
            "Ubuntu: apt-get install libjpeg-dev libpng-dev"
        )
    root = cache_folder() / f"image-libraries-{architecture}"
    found = _extracted(root, architecture)
    if found is None:
        _fetch(root, architecture, name)
        found = _extracted(root, architecture)
    if found is None:
        raise _not_fetched(name, "the packages lack them")
    return found


def _not_fetched(name: str, why: str) -> VitqError:
    return VitqError(
        f"no libjpeg or libpng of {name} to link, and apt-get cannot fetch them ({why}); see to "
        f"the network or, on Debian: dpkg --add-architecture {name}; apt-get update; "
        f"apt-get install libjpeg-dev:{name} libpng-dev:{name}"
    )


def _installed(command: str) -> ImageLibraries | None:
    archives = []
    for archive in _ARCHIVES:
        words = [command, f"-print-file-name={archive}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        archives.append(Path(done.stdout.strip()))
    words = [command, "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(words, input=_HEADERS, capture_output=True, text=True, check=False)
    # A compiler that does not find an archive prints its bare name.
    if done.returncode != 0 or not all(path.is_absolute() for path in archives):
        return None
    return ImageLibraries((), tuple(archives))


def _extracted(root: Path, architecture: str) -> ImageLibraries | None:
    include, triple = root / "usr/include", f"{architecture}-linux-gnu"
    archives = tuple(root / "usr/lib" / triple / archive for archive in _ARCHIVES)
    if not all(path.is_file() for path in archives):
        return None
    return ImageLibraries((include, include / triple), archives)


def _fetch(root: Path, architecture: str, name: str) -> None:
    """Unpack Debian's packages of an architecture into a folder."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise _not_fetched(name, "this is no Debian")
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        folder, draft = Path(scratch), Path(scratch) / "root"
        for part in ("state/lists/partial", "cache/archives/partial", "root"):
            (folder / part).mkdir(parents=True)
        options = {"Dir::State": f"{scratch}/state", "Dir::State::status": "/dev/null",
                   "Dir::Cache": f"{scratch}/cache", "APT::Architecture": name,
                   "APT::Architectures": name, "APT::Sandbox::User": ""}  # fmt: skip
        apt = ["apt-get", "-qq", *(w for key in options for w in ("-o", f"{key}={options[key]}"))]
        _tell(name, folder, [*apt, "update"])
        downloads = [[*apt, "download", jpeg, *_PACKAGES] for jpeg in _JPEG_PACKAGES]
        _tell(name, folder, *downloads)
        for package in sorted(folder.glob("*.deb")):
            _tell(name, folder, ["dpkg-deb", "-x", str(package), str(draft)])
        if _extracted(root, architecture) is None:
            shutil.rmtree(root, ignore_errors=True)
        # Another process may have been quicker: then its folder stays.
        with suppress(OSError):
            draft.rename(root)


def _tell(name: str, folder: Path, *commands: list[str]) -> None:
    """Run the first of some commands that succeeds."""
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    raise _not_fetched(name, reason(done.stderr))
