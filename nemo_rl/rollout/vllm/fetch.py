"""Fetches shards from the trainer, or finds them in a folder, and checks each before anybody reads it. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_rl.rollout.vllm import scratch

TOKEN_VARIABLE = "NEMO_RL_ROLLOUT_TOKEN"
"""Environment variable with the token of a rollout server and of the trainer that uses it."""
CHUNK = 16 * 2**20
ATTEMPTS = 5
"""Tries to go on with a file whose connection broke, each from the byte where the one before ended."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class BadWeights(ValueError):
    """Files that are not what the trainer said they were. Nothing of them was loaded."""


@contextlib.contextmanager
def on_disk(source: str, files: list[dict[str, Any]]) -> Iterator[list[Path]]:
    """The files of a version, each with the size and the digest that it should have.

    `source`: a folder, or the address whose children they are; of each file its name, sha256 and size. Raises BadWeights.
    """
    for file in files:
        if not _NAME.fullmatch(file["name"]):
            raise BadWeights(f"{file['name']!r} is no name of a file of weights")
    if not source.startswith(("http://", "https://")):
        paths = [Path(source) / file["name"] for file in files]
        for path, file in zip(paths, files, strict=True):
            check(path, file)
        yield paths
        return
    # the workers of a server share what one of them has fetched
    prefix = f"nemo-rl-weights-{os.getuid()}-"
    folder = Path(tempfile.gettempdir()) / f"{prefix}{os.getpgrp()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not scratch.held(folder):
            scratch.hold(folder)
            scratch.remove_abandoned(prefix)
        wanted = folder / hashlib.sha256(repr(sorted(file["sha256"] for file in files)).encode()).hexdigest()[:16]
        for old in folder.glob("*/*"):
            if old.parent != wanted:
                old.unlink()
        wanted.mkdir(exist_ok=True)
        paths = [wanted / file["name"] for file in files]
        for path, file in zip(paths, files, strict=True):
            if not path.exists():
                part = path.with_name(f".part-{path.name}")
                _fetch(f"{source.rstrip('/')}/{file['name']}", part, file)
                check(part, file)
                part.rename(path)
    yield paths


def _fetch(url: str, part: Path, file: dict[str, Any]) -> None:
    """Writes a file to `part`, going on from the byte where a broken connection ended."""
    part.unlink(missing_ok=True)
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        headers = {"Authorization": f"Bearer {os.environ[TOKEN_VARIABLE]}", "Range": f"bytes={have}-"}
        try:
            with (
                urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer,
                open(part, "ab" if answer.status == 206 else "wb") as stream,
            ):
                while chunk := answer.read(CHUNK):
                    stream.write(chunk)
        except urllib.error.HTTPError as error:
            raise BadWeights(f"{url} cannot be fetched: the trainer answered {error.code}") from None
        except (OSError, http.client.HTTPException) as error:
            failure = error
        if part.exists() and part.stat().st_size >= file["size"]:
            return
        time.sleep(0.1 * 2**attempt)
    size = part.stat().st_size if part.exists() else 0
    raise BadWeights(f"{url} ended after {size} of {file['size']} bytes, {ATTEMPTS} times ({failure or 'no error'})")


def check(path: Path, file: dict[str, Any]) -> None:
    """Raises BadWeights where a file is not the one that was meant."""
    try:
        size = path.stat().st_size
        if size != file["size"]:
            raise BadWeights(f"{file['name']} has {size} bytes, expected {file['size']}: it is not complete")
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BadWeights(f"{file['name']} cannot be read ({error.strerror or error})") from None
    if digest != file["sha256"]:
        raise BadWeights(f"{file['name']} has another content than the trainer published: its sha256 differs")
