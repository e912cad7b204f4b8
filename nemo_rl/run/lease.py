"""The write lease of a run: one attempt publishes into its output, also where nobody can say whether an earlier one is dead.

A pod on a node that no longer answers may be dead, or cut off and training, or asleep in the middle of a write. So it is
not asked whether it still may write; it is made unable to:

- Whatever is to be published is written in the lease's own folder, `staging`, and published by one rename out of it; what
  is taken away (an old checkpoint) goes by one rename into it.
- Who takes the lease next makes the next generation, and then takes the staging folders of all earlier ones away, before
  it publishes anything. From then on each rename of an earlier holder fails, whenever it wakes up: asking whether the
  lease holds and acting on the answer are one step of the file system, so no pause fits between them.
- A generation is made by renaming a folder to its number, which fails where it exists: compare and swap. An attempt that
  comes later than a higher one of the same job is refused.

Files that grow (metrics) begin as a copy that is published, so that a descriptor of an earlier holder leads to a file
without a name. An object store gives the same by conditional writes: `If-None-Match` for a generation, and manifests that
name it, of which readers take the newest. Loads no torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rl.errors import LeaseLost

LEASES = ".leases"
"""Folder beside the output folders, with one folder for each of them: a lease outlives what happens to its output."""
HOLDER = "holder.json"
STAGING = "staging"
REPLACED = "replaced-"
"""What the names of things begin with that were taken away to be replaced, and return if the replacement never comes."""
_DEAD, _NEW = ".dead-", ".new-"
_OLD_SECONDS = 3600.0
"""Beginnings of a generation that nobody finished in this time are cleared away."""


@dataclass(frozen=True)
class Claim:
    """Who asks for the lease of which output. `number` is the fence: of one `owner` (a job's uid), the highest wins."""

    root: Path
    owner: str
    number: int
    name: str = ""
    """For people: which pod it is."""

    @classmethod
    def on(cls, output: Path, owner: str, number: int, name: str = "") -> Claim:
        """For the output folder `output`."""
        return cls(output.parent / LEASES / output.name, owner, number, name)

    def take(self) -> Lease:
        """Takes the lease: when this returns, no earlier holder can publish anything. LeaseLost where a later one has it."""
        self.root.mkdir(parents=True, exist_ok=True)
        while True:
            lease = self._next_generation()
            if lease is not None:
                lease.fence_earlier()
                return lease

    def of(self, generation: int) -> Lease:
        """The lease that another process of this attempt took."""
        return Lease(self, generation)

    def _next_generation(self) -> Lease | None:
        """A new generation, the newest; None where somebody was faster."""
        newest = max(_generations(self.root), default=0)
        if newest:
            self._give_way_to(newest)
        aside = Path(tempfile.mkdtemp(dir=self.root, prefix=_NEW))
        try:
            aside.chmod(0o755)
            (aside / STAGING).mkdir()
            _write(aside / HOLDER, {"owner": self.owner, "number": self.number, "name": self.name})
            os.rename(aside, _folder(self.root, newest + 1))
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return None
            raise
        # One that was made, superseded and cleared away meanwhile leaves its number free: then this is not the newest.
        if max(_generations(self.root), default=0) > newest + 1:
            shutil.rmtree(_folder(self.root, newest + 1), ignore_errors=True)
            return None
        return Lease(self, newest + 1)

    def _give_way_to(self, generation: int) -> None:
        holder = _holder(self.root, generation)
        if holder.get("owner") == self.owner and _number(holder) > self.number:
            raise LeaseLost(
                f"attempt {self.number} came too late: {_words(holder)} writes to this output, so this one writes nothing"
            )


@dataclass(frozen=True)
class Lease:
    """One generation of the lease. Every process of the attempt may write in `staging`; one of them publishes."""

    claim: Claim = field(repr=False)
    generation: int

    @property
    def staging(self) -> Path:
        """Where everything is written that shall be published. It is gone once the lease is lost."""
        return _folder(self.claim.root, self.generation) / STAGING

    def held(self) -> bool:
        """Whether the lease was held a moment ago. Good for ending early; `publish` needs no such question."""
        return self.staging.is_dir()

    def check(self) -> None:
        """Raises LeaseLost once another attempt has taken it."""
        if not self.held():
            raise self.lost()

    def lost(self) -> LeaseLost:
        newest = max(_generations(self.claim.root), default=0)
        by = _words(_holder(self.claim.root, newest)) if newest > self.generation else "somebody who removed its folder"
        return LeaseLost(
            f"attempt {self.claim.number} lost the right to write to this output to {by}: its node was taken for lost. "
            "Nothing of it was published since; it ends here"
        )

    def publish(self, source: Path, target: Path) -> None:
        """Renames `source`, which is in `staging`, to `target`; a file there is replaced. LeaseLost instead, once it is."""
        with self.guard():
            os.rename(source, target)

    def retire(self, target: Path, name: str) -> Path:
        """Takes `target` away to `name` in `staging`; returns where it is. LeaseLost instead, once it is."""
        aside = self.staging / name
        with self.guard():
            os.rename(target, aside)
        return aside

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """What fails within because the lease was lost raises LeaseLost."""
        try:
            yield
        except LeaseLost:
            raise
        except Exception as error:
            if not self.held():
                raise self.lost() from error
            raise

    def fence_earlier(self) -> None:
        """Takes the staging folders of all earlier generations away; what they had taken out to replace is kept in this one.

        A folder of files that are gone cannot be renamed out of, and one that is removed cannot be written to, not even
        through a handle to it that a network file system has kept.
        """
        root = self.claim.root
        for generation in _generations(root):
            if generation < self.generation:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(_folder(root, generation), root / f"{_DEAD}{generation}-{os.getpid()}-{time.time_ns()}")
        for dead in root.glob(f"{_DEAD}*"):
            for kept in dead.glob(f"{STAGING}/{REPLACED}*"):
                with contextlib.suppress(FileNotFoundError, OSError):
                    os.rename(kept, self.staging / kept.name)
            _remove(dead)
        for begun in root.glob(f"{_NEW}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - begun.stat().st_mtime > _OLD_SECONDS:
                    shutil.rmtree(begun, ignore_errors=True)


def guarded(lease: Lease | None) -> contextlib.AbstractContextManager[None]:
    """`lease.guard()`; without a lease errors are what they are."""
    return lease.guard() if lease else contextlib.nullcontext()


def _folder(root: Path, generation: int) -> Path:
    return root / f"{generation:08d}"


def _generations(root: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(root) if name.isdigit()) if root.is_dir() else []


def _holder(root: Path, generation: int) -> dict[str, Any]:
    try:
        found = json.loads((_folder(root, generation) / HOLDER).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _number(holder: dict[str, Any]) -> int:
    found = holder.get("number")
    return found if isinstance(found, int) else 0


def _words(holder: dict[str, Any]) -> str:
    name = f" (pod {holder['name']})" if holder.get("name") else ""
    return f"attempt {_number(holder)}{name}" if holder else "another attempt"


def _write(path: Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _remove(folder: Path) -> None:
    """Removes a folder although somebody may still be writing in it."""
    for _ in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)
    raise OSError(
        errno.ENOTEMPTY, "an earlier attempt still writes there, and its folder cannot be removed", str(folder)
    )
