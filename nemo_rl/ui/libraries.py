"""The JavaScript libraries of the page: pinned, checked, and put into the wheel when it is built.

Other people's code is not in the repository. A wheel holds it (build_hook.py); a checkout fetches it once with npm, which
knows the registry from its own settings, into the cache. `python -m nemo_rl.ui.libraries` does so, and prints the folder;
`python nemo_rl/ui/libraries.py nemo_rl/ui/vendor` puts it beside the page, for images that are built without npm.

This module needs the standard library alone: the build hook loads it by its path.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FETCH = "python -m nemo_rl.ui.libraries"
"""The command that fetches them."""
NPM_SECONDS = 120


class LibrariesMissing(RuntimeError):
    """The libraries are not here and cannot be fetched. Says why, and what to do."""


@dataclass(frozen=True)
class Library:
    """One package of the npm registry: the digest of its archive, and the files of it that the page uses.

    `files` maps a path in the archive to (name beside the page, SHA-256 of the content).
    """

    name: str
    version: str
    integrity: str
    files: Mapping[str, tuple[str, str]]


LIBRARIES = (
    Library(
        "preact",
        "11.2.0",
        "sha512-/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
        {
            "dist/preact.mjs": ("preact.js", "bdcbd9abdf2c77c5c45326eab42191e949222d479d0d5f69467387a77040cb55"),
            "LICENSE": ("preact.LICENSE", "1fe6958409c8c257a70c587a18b6f7f412b179b456630790d30b2ec9a8e4b7d4"),
        },
    ),
    Library(
        "htm",
        "3.1.1",
        "sha512-983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
        {
            "dist/htm.mjs": ("htm.js", "ab33dd3f38059b9be4d5f5350128eefb2356639c4e0bbe9d9e8b3ba75847e9e4"),
            "LICENSE": ("htm.LICENSE", "740725f7252e750af735d0028cc534970772f513331e9f68150fede8fb3ce00f"),
        },
    ),
    Library(
        "uplot",
        "1.6.32",
        "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        {
            "dist/uPlot.esm.js": ("uplot.js", "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba"),
            "dist/uPlot.min.css": ("uplot.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
            "LICENSE": ("uplot.LICENSE", "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd"),
        },
    ),
)
BESIDE_THE_PAGE = Path(__file__).parent / "vendor"
"""Where a wheel has them."""


def find() -> Path:
    """The folder with the libraries, of the wheel or the cache; fetched where they are in neither. LibrariesMissing."""
    for folder in (BESIDE_THE_PAGE, cached()):
        if complete(folder):
            return folder
    fetch(cached())
    return cached()


def cached() -> Path:
    """Their folder in the cache; another one for each choice of versions."""
    chosen = hashlib.sha256("\n".join(library.integrity for library in LIBRARIES).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nemo-rl" / "ui" / chosen


def complete(folder: Path) -> bool:
    """Whether each file is there with the content that is expected."""
    for library in LIBRARIES:
        for name, sha256 in library.files.values():
            try:
                content = (folder / name).read_bytes()
            except OSError:
                return False
            if hashlib.sha256(content).hexdigest() != sha256:
                return False
    return True


def fetch(folder: Path) -> None:
    """Writes the libraries into the folder, from the registry that npm is set up for. LibrariesMissing."""
    npm = shutil.which("npm")
    if npm is None:
        raise LibrariesMissing(
            "the page's JavaScript libraries are not in this installation, and npm is not here to fetch them; install "
            f"nemo-rl from a wheel, or install npm and run {FETCH}"
        )
    try:
        with tempfile.TemporaryDirectory() as aside:
            contents: dict[str, bytes] = {}
            for library in LIBRARIES:
                contents |= _files(library, _archive(npm, library, Path(aside)))
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in contents.items():
                written = folder / f".{name}.{os.getpid()}"
                written.write_bytes(content)
                written.replace(folder / name)
    except (OSError, subprocess.SubprocessError, tarfile.TarError, KeyError, ValueError) as error:
        raise LibrariesMissing(
            f"the page's JavaScript libraries cannot be fetched: {error}; check npm ping, then run {FETCH} again, or install "
            "nemo-rl from a wheel"
        ) from None


def _archive(npm: str, library: Library, aside: Path) -> bytes:
    """The archive of a library as the registry has it. ValueError for another content than the pinned one."""
    wanted = f"{library.name}@{library.version}"
    command = [npm, "pack", wanted, "--ignore-scripts", "--silent", "--pack-destination", str(aside)]
    # not in this folder: npm would read the settings of a project that is around it
    run = subprocess.run(command, cwd=aside, capture_output=True, text=True, timeout=NPM_SECONDS)
    path = aside / f"{library.name}-{library.version}.tgz"
    if run.returncode or not path.exists():
        raise ValueError(f"npm pack {wanted} ended with {run.returncode}: {(run.stderr or run.stdout).strip()[-300:]}")
    content = path.read_bytes()
    found = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != library.integrity:
        raise ValueError(f"the registry has another {wanted} than the one that was reviewed ({found})")
    return content


def _files(library: Library, archive: bytes) -> dict[str, bytes]:
    import io

    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        for inside, (name, sha256) in library.files.items():
            member = opened.extractfile(f"package/{inside}")
            content = member.read() if member else b""
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError(f"{inside} of {library.name} {library.version} is not the one that was reviewed")
            found[name] = content
    return found


def main() -> int:
    try:
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1])
            if not complete(folder):
                fetch(folder)
        else:
            folder = find()
    except LibrariesMissing as error:
        print(f"nemo-rl: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
