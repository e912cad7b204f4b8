"""The libraries of the page: only what was reviewed is used, and where they cannot be had, a sentence says what to do."""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
from pathlib import Path

import pytest

from nemo_rl.ui import libraries
from nemo_rl.ui.libraries import LIBRARIES, LibrariesMissing

PAGE = Path(libraries.__file__).parent / "page"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries, "BESIDE_THE_PAGE", tmp_path / "vendor")


def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An npm that does as the script says."""
    program = tmp_path / "bin/npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_without_npm_a_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LibrariesMissing, match=r"npm is not here.*python -m nemo_rl\.ui\.libraries"):
        libraries.find()


def test_a_registry_that_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry(tmp_path, monkeypatch, 'echo "E404 not found" >&2; exit 1')
    with pytest.raises(LibrariesMissing, match="E404 not found"):
        libraries.find()


def test_another_archive_than_the_reviewed_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = LIBRARIES[0]
    with tarfile.open(tmp_path / "forged.tgz", "w:gz") as archive:
        content = b"export const h = steal;"
        member = tarfile.TarInfo("package/dist/preact.mjs")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    registry(tmp_path, monkeypatch, f'cp {tmp_path}/forged.tgz "$6/{first.name}-{first.version}.tgz"')
    with pytest.raises(LibrariesMissing, match=r"another preact@.* than the one that was reviewed"):
        libraries.find()
    assert not libraries.cached().exists()


def test_a_changed_file_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "vendor"
    folder.mkdir()
    for library in LIBRARIES:
        for name, _ in library.files.values():
            (folder / name).write_text("changed")
    assert not libraries.complete(folder)


def test_the_modules_of_the_page_name_nothing_but_each_other_and_the_libraries() -> None:
    known = {f"../libraries/{name}" for library in LIBRARIES for name, _ in library.files.values()}
    known |= {f"./{path.name}" for path in PAGE.glob("*.js")}
    for path in PAGE.glob("*.js"):
        source = path.read_text(encoding="utf-8")
        assert set(re.findall(r'from "([^"]+)"', source)) <= known, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source), (
            path
        )
        assert "://" not in source, f"{path} names another server"
