"""Tokens of large data sets on disk: made once, shared by the processes of a machine and by later runs."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nemo_rl.data.encode import Encoded, Encoder
from nemo_rl.data.examples import TokenArrays
from nemo_rl.data.spool import cache_home

CACHED_ROWS = 10_000
"""Below this number of rows tokenising takes a moment, and nothing is kept on disk."""
UNUSED_DAYS = 30
"""Entries that nobody has opened for this long are removed when another one is made."""
FORMAT = 2


def cache_folder() -> Path:
    """Where the tokens are kept: nemo-rl/tokens in the user's cache folder (XDG_CACHE_HOME)."""
    return cache_home() / "tokens"


def cache_key(encoder: Encoder, fingerprint: str) -> str | None:
    """SHA-256 of all that decides the tokens: rows, tokenizer, template, settings, and the time where the template writes
    it. None where they cannot be known again: a template that asks for the time of a clock that nobody has set.
    """
    import transformers

    tokenizer, training = encoder.tokenizer, encoder.training
    template = str(getattr(tokenizer, "chat_template", None) or "")
    clock = getattr(tokenizer, "_nemo_rl_started", None) if "strftime_now" in template else None
    if "strftime_now" in template and clock is None:
        return None
    if not getattr(tokenizer, "is_fast", False):
        return None  # what such a tokenizer does is not all in its files
    parts = [
        FORMAT,
        _code(),
        transformers.__version__,
        fingerprint,
        encoder.algorithm,
        tokenizer.backend_tokenizer.to_str(),
        type(tokenizer).__qualname__,
        str(sorted((str(k), str(v)) for k, v in tokenizer.init_kwargs.items())),
        str(tokenizer.special_tokens_map),
        template,
        str(clock),
        training.chat_template_kwargs,
        [training.max_sequence_length, training.overlong_rows],
        [getattr(encoder.settings, name, None) for name in ("max_new_tokens", "train_on_prompt")],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """SHA-256 of the modules that turn rows into tokens: another version of them makes its own."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def cached(key: str, make: Callable[[], Iterable[Encoded]]) -> Encoded:
    """What `make` gives, joined and mapped from disk; made by the first process that asks, while others wait.

    Raises OSError where the folder cannot be written.
    """
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    entry = root / key
    with _alone(root / f"{key}.lock"):
        if not (entry / "report.json").exists():
            _remove_unused(root)
            folder = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=root))
            try:
                _write(folder, make())
                shutil.rmtree(entry, ignore_errors=True)
                folder.rename(entry)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        os.utime(entry)
        return _open(entry)


def join(chunks: Iterable[Encoded]) -> Encoded:
    """All chunks as one, in memory."""
    found = list(chunks)
    whole = Encoded(TokenArrays.join([chunk.arrays for chunk in found]))
    for chunk in found:
        _count(whole, chunk)
    return whole


def _count(whole: Encoded, chunk: Encoded) -> None:
    whole.dropped.update(chunk.dropped)
    whole.notes.update(chunk.notes)
    whole.truncated += chunk.truncated
    whole.split += chunk.split


def _write(folder: Path, chunks: Iterable[Encoded]) -> None:
    """Writes the arrays as the chunks come, so that memory never holds them all."""
    whole = Encoded(TokenArrays.pack([], None, 1))
    lengths, kept, masked, total = [], [], False, 0
    with (folder / "ids.raw").open("wb") as ids, (folder / "mask.raw").open("wb") as mask:
        for chunk in chunks:
            chunk.arrays.ids.tofile(ids)
            if chunk.arrays.mask is not None:
                chunk.arrays.mask.tofile(mask)
                masked = True
            total += len(chunk.arrays.ids)
            lengths.append(chunk.arrays.lengths)
            kept.append(chunk.arrays.kept)
            _count(whole, chunk)
    _as_array(folder, "ids", np.dtype(np.int32), total)
    if masked:
        _as_array(folder, "mask", np.dtype(np.uint8), total)
    (folder / "mask.raw").unlink(missing_ok=True)
    np.save(folder / "lengths.npy", np.concatenate(lengths))
    np.save(folder / "kept.npy", np.concatenate(kept))
    report = {"dropped": whole.dropped, "notes": whole.notes, "truncated": whole.truncated, "split": whole.split}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _as_array(folder: Path, name: str, dtype: np.dtype[Any], total: int) -> None:
    """Puts NumPy's header before raw numbers, block by block."""
    raw = folder / f"{name}.raw"
    with raw.open("rb") as source, (folder / f"{name}.npy").open("wb") as target:
        np.lib.format.write_array_header_1_0(
            target, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (total,)}
        )
        shutil.copyfileobj(source, target, 16 * 2**20)
    raw.unlink()


def _open(entry: Path) -> Encoded:
    report = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    counts = {name: Counter(report[name]) for name in ("dropped", "notes")}
    return Encoded(TokenArrays.open(entry), **counts, truncated=report["truncated"], split=report["split"])


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_unused(root: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86400
    for entry in root.iterdir():
        if entry.is_dir() and entry.stat().st_mtime < oldest:
            shutil.rmtree(entry, ignore_errors=True)
