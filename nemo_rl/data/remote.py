"""Files of rows in object stores and on web servers: which files an address or a pattern means, and their copies here."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from nemo_rl.errors import DatasetError
from nemo_rl.job import names, uris
from nemo_rl.storage.cache import cached
from nemo_rl.storage.store import Object, Store

_MAGIC = re.compile(r"[*?\[]")


def local_files(address: str) -> list[Path]:
    """Copies on this machine of the files that an address means, by name: one file, a pattern (`part-*.parquet`, `**` for
    folders too) or a folder. Read once per machine, and again only what changed. DatasetError where there is none."""
    folder, pattern = _parts(address)
    fixed = address if not _MAGIC.search(address) else folder
    if (wrong := uris.problem(fixed, uris.READABLE)) is not None:
        raise DatasetError(f"found the path {address!r}: {wrong}")
    if fixed.startswith("http"):
        found = [_single(folder, pattern, address)]
    elif _MAGIC.search(pattern):
        matches = re.compile(_regex(pattern))
        everything = Store(folder).list()
        found = [o for o in everything if matches.fullmatch(o.path)]
        if not found:
            raise DatasetError(
                f"found no object that matches {address}; {_there(folder, everything)}; check the pattern"
            )
    elif PurePosixPath(pattern).name.lower().endswith(names.DATA_FILE_NAMES) and not address.endswith("/"):
        found = [_single(folder, pattern, address)]
    else:
        folder = address.rstrip("/")
        everything = Store(folder).list()
        found = [o for o in everything if o.path.lower().endswith(names.DATA_FILE_NAMES)]
        if not found:
            raise DatasetError(
                f"found no file of rows below {address}; {_there(folder, everything)}; expected .jsonl, .json, .parquet or .csv"
            )
    kept = cached(folder, found, keep_others=True)
    return [kept / o.path for o in found]


def _single(folder: str, name: str, address: str) -> Object:
    found = Store(folder).stat(name)
    if found is None:
        try:
            there = _there(folder, Store(folder).list()) if not folder.startswith("http") else "check the address"
        except Exception:  # who may read one object may not be allowed to list
            there = "check the address"
        raise DatasetError(f"found no object {address}; {there}")
    return found


def _parts(address: str) -> tuple[str, str]:
    """The folder without patterns, and what comes behind it."""
    scheme, _, rest = address.partition("://")
    parts = rest.rstrip("/").split("/")
    end = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    return f"{scheme}://{'/'.join(parts[:end])}", "/".join(parts[end:])


def _regex(pattern: str) -> str:
    """A pattern of the shell: `*` and `?` stay within a folder, `**` does not."""
    found = ""
    for piece in re.findall(r"\*\*/?|\*|\?|\[[^\]]+\]|.", pattern):
        if piece.startswith("**"):
            found += "(?:.*/)?" if piece.endswith("/") else ".*"
        elif piece == "*":
            found += "[^/]*"
        elif piece == "?":
            found += "[^/]"
        elif piece.startswith("[") and len(piece) > 1:
            found += f"[{'^' if piece[1] in '!^' else ''}{piece[1:-1].lstrip('!^')}]"
        else:
            found += re.escape(piece)
    return found


def _there(folder: str, found: list[Object]) -> str:
    shown = ", ".join(o.path for o in found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    return f"{folder} holds {shown or 'nothing'}"
