"""Packs files into a deterministic tar.gz and cuts it into immutable ConfigMaps that are named by content."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nemo_rl.backends.kubernetes.ship.errors import ShipError
from nemo_rl.job import names
from nemo_rl.job.spec import BundleSpec
from nemo_rl.worker.bundles import MAX_FILES, TIMES_UNPACKED

_MB = 1_000_000
_LEVEL = 6
_ALTERNATIVES = (
    "for data and models give a name on the hub, or put them on a volume and give pvc://claim/path; for a local "
    "model or data set that is in the image, give its path there"
)


def _alternatives(limit: int) -> str:
    if limit >= names.MAX_STORED_BUNDLE_BYTES:
        return _ALTERNATIVES
    store = f"with output_dir='s3://…' (or gs://, az://) up to {names.MAX_STORED_BUNDLE_BYTES / _MB:.0f} MB travel by that store"
    return f"{_ALTERNATIVES}; {store}"


@dataclass(frozen=True)
class Archive:
    """A tar.gz and its digest."""

    data: bytes
    sha256: str
    prefix: str = "b"
    """Beginning of the names of its ConfigMaps: those of a job begin with the job's name, and belong to it alone."""

    @property
    def stored(self) -> bool:
        """Whether it is too large for ConfigMaps, and goes to the store that the job writes to."""
        return len(self.data) > names.MAX_BUNDLE_BYTES

    @property
    def parts(self) -> list[bytes]:
        """The archive in pieces that each fit a ConfigMap, in order."""
        size = names.BUNDLE_PART_BYTES
        return [self.data[i : i + size] for i in range(0, len(self.data), size)]

    @property
    def config_map_names(self) -> list[str]:
        """<prefix>-<first 12 digits of the sha256>-<index>: the same content has the same names. None where it is stored."""
        if self.stored:
            return []
        return [f"{self.prefix}-{self.sha256[:12]}-{i}" for i in range(len(self.parts))]

    def spec(self, name: str, python: str | None = None) -> BundleSpec:
        """The entry of spec.bundles; `python` where the archive holds pickles."""
        return BundleSpec(name=name, sha256=self.sha256, config_maps=self.config_map_names, python=python)

    def config_maps(self) -> list[dict[str, Any]]:
        """Manifests of the ConfigMaps, without namespace and owners, which the caller adds. None where it is stored."""
        return [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": name, "labels": {names.LABEL_BUNDLE: self.sha256[:12]}},
                "immutable": True,
                "binaryData": {names.BUNDLE_KEY: base64.b64encode(part).decode("ascii")},
            }
            for name, part in zip(self.config_map_names, () if self.stored else self.parts, strict=True)
        ]


class _Limited(io.RawIOBase):
    """Keeps what is written, up to the size of a bundle."""

    def __init__(self, limit: int) -> None:
        self.data, self.limit = bytearray(), limit

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self.data += block
        if len(self.data) > self.limit:
            raise _TooLarge
        return len(block)


class _TooLarge(Exception):
    pass


def pack(files: Mapping[str, bytes | Path], what: str = "the bundle", limit: int | None = None) -> Archive:
    """The archive of `files` (name in the bundle → content, or a file to read); equal files give equal bytes.

    ShipError, naming `what` and the alternatives, above `limit` bytes compressed (default MAX_BUNDLE_BYTES) or eight times as
    many in all; files are read piece by piece, and no further than that.
    """
    limit = limit or names.MAX_BUNDLE_BYTES
    sizes = {name: _size(content) for name, content in files.items()}
    total = sum(sizes.values())
    if total > TIMES_UNPACKED * limit or len(files) > MAX_FILES:
        raise ShipError(
            f"{what}: found {total / _MB:.1f} MB in {len(files)} files, at most {TIMES_UNPACKED * limit / _MB:.0f} MB in "
            f"{MAX_FILES} files can travel; {_alternatives(limit)}"
        )
    out = _Limited(limit)
    try:
        # Level, time and names are fixed, so that the header depends on nothing but the content.
        with (
            gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=out, mtime=0) as deflated,
            tarfile.open(fileobj=deflated, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name in sorted(files):
                _add(archive, name, files[name], sizes[name], what)
    except _TooLarge:
        raise ShipError(
            f"{what}: found {total / _MB:.1f} MB, which is more than {limit / _MB:.1f} MB compressed, the most "
            f"that can travel; {_alternatives(limit)}"
        ) from None
    data = bytes(out.data)
    return Archive(data, hashlib.sha256(data).hexdigest())


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _add(archive: tarfile.TarFile, name: str, content: bytes | Path, size: int, what: str) -> None:
    info = tarfile.TarInfo(name)  # time, owner and group are zero by default
    info.size = size
    info.mode = 0o644
    stream: BinaryIO
    with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as stream:
        try:
            archive.addfile(info, stream)
        except OSError as error:
            raise ShipError(f"{what}: {name} changed while it was read ({error}); try again") from error


def unique_config_maps(archives: Iterable[Archive]) -> list[dict[str, Any]]:
    """ConfigMaps of several archives, each name once (two bundles of a job may have equal content)."""
    found = {manifest["metadata"]["name"]: manifest for archive in archives for manifest in archive.config_maps()}
    return list(found.values())
