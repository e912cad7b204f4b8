"""One address of an object store or a folder: objects below it are read, listed, and written with conditions."""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import importlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nemo_rl.errors import StorageError
from nemo_rl.extras import require
from nemo_rl.job import uris
from nemo_rl.storage.errors import Conflict, Missing, Unavailable, in_words

T = TypeVar("T")

PART_BYTES = 8 << 20
"""Of an upload in parts, and of a range that is read at a time."""
PARTS_AT_ONCE = 6
PATIENCE_SECONDS = 300.0
"""How long a store that does not answer is asked again, unless NEMO_RL_STORAGE_PATIENCE (seconds) says otherwise."""
PATIENCE_VARIABLE = "NEMO_RL_STORAGE_PATIENCE"
PROBE = ".nemo-rl-probe"


@dataclass(frozen=True)
class Object:
    """An object: its path below the store's address, its size in bytes, and its version (ETag)."""

    path: str
    size: int
    version: str


class Store:
    """The objects below one address: s3://bucket/folder, gs://…, az://…, https://…, or a local folder.

    Paths are relative, with '/'. Errors are StorageError with the cause and the cure; Unavailable is raised only after the
    store was asked again for `patience` seconds. May be used by several threads.
    """

    def __init__(self, uri: str | os.PathLike[str], patience: float | None = None) -> None:
        self.uri = os.fspath(uri).rstrip("/")
        self.patience = patience if patience is not None else float(os.environ.get(PATIENCE_VARIABLE, PATIENCE_SECONDS))
        self._obstore = _obstore()
        self.is_local = "://" not in self.uri
        self.base = ""
        # What a write on condition is told of the object that it replaces: Google Cloud Storage takes its generation, all others its ETag.
        self._version_of = "version" if self.uri.startswith("gs://") else "e_tag"
        if self.is_local:
            folder = Path(self.uri).expanduser().resolve()
            self._inner = self._obstore.store.LocalStore(str(folder), mkdir=True)
            return
        if (wrong := uris.problem(self.uri, uris.READABLE)) is not None:
            raise ValueError(wrong)
        scheme, bucket, self.base = _parts(self.uri)
        try:
            self._inner = _open(self._obstore, scheme, bucket, min(30.0, self.patience))
        except Exception as error:
            raise in_words(error, "open", self.uri) from None

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def at(self, path: str) -> Store:
        """The store of what lies below `path`; connections are shared."""
        other = object.__new__(Store)
        other.__dict__.update(self.__dict__)
        other.uri = uris.joined(self.uri, path)
        if self.is_local:
            return Store(other.uri, self.patience)
        other.base = self._key(path)
        return other

    # --- reading

    def read(self, path: str) -> tuple[bytes, str] | None:
        """The content of an object and its version, for `swap`; None where there is none."""

        def get() -> tuple[bytes, str]:
            found = self._obstore.get(self._inner, self._key(path))
            content = bytes(found.bytes())
            if len(content) != found.meta["size"]:
                raise Unavailable(f"cannot read {self._name(path)}: {len(content)} of {found.meta['size']} bytes came")
            return content, str(found.meta[self._version_of] or "")

        try:
            return self._patiently("read", path, get)
        except Missing:
            return None

    def read_range(self, path: str, begin: int, end: int, version: str = "") -> memoryview:
        """Bytes [begin, end) of an object, not copied. With a version: Conflict where the object is another one now."""

        def get() -> memoryview:
            options: dict[str, Any] = {"range": (begin, end)}
            if version:
                options["if_match"] = version
            content = memoryview(self._obstore.get(self._inner, self._key(path), options=options).bytes())
            if len(content) != end - begin:
                raise Unavailable(f"cannot read {self._name(path)}: {len(content)} of {end - begin} bytes came")
            return content

        return self._patiently("read", path, get) if end > begin else memoryview(b"")

    def read_into(self, path: str, target: Path, progress: Callable[[int], None] = lambda size: None) -> str:
        """Reads a whole object into a file, in one go; returns the SHA-256 of its content."""

        def get() -> str:
            digest, size = hashlib.sha256(), 0
            found = self._obstore.get(self._inner, self._key(path))
            with open(target, "wb") as stream:
                for piece in found.stream(min_chunk_size=PART_BYTES):
                    stream.write(piece)
                    digest.update(piece)
                    size += len(piece)
                    progress(size)
            if size != found.meta["size"]:
                raise Unavailable(f"cannot read {self._name(path)}: {size} of {found.meta['size']} bytes came")
            return digest.hexdigest()

        return self._patiently("read", path, get)

    def stat(self, path: str) -> Object | None:
        """What is known of an object without reading it; None where there is none."""

        def head() -> Any:
            try:
                return self._obstore.head(self._inner, self._key(path))
            except Exception as error:
                if type(in_words(error, "look at", path)) in (StorageError, Missing):
                    # The answer to HEAD has no body that says why (404: no object, or no bucket?): ask for what has one.
                    self._obstore.get(self._inner, self._key(path), options={"range": (0, 1)})
                raise

        try:
            found = self._patiently("look at", path, head)
        except Missing:
            return None
        return Object(path, int(found["size"]), str(found["e_tag"] or ""))

    def list(self, path: str = "") -> list[Object]:
        """All objects below the folder `path`, by name. A web server cannot list: StorageError."""
        start = len(self.base) + 1 if self.base else 0
        prefix = self._key(path)

        def walk() -> list[Object]:
            found = [
                Object(entry["path"][start:], int(entry["size"]), self._listed(entry["e_tag"]))
                for page in self._obstore.list(self._inner, prefix=prefix or None)
                for entry in page
            ]
            return sorted(found, key=lambda entry: entry.path)

        return [o for o in self._patiently("list", path, walk) if o.path != PROBE]

    # --- writing

    def write(self, path: str, content: bytes | Path) -> None:
        """Writes an object whatever is there; a file in parts, of which few are in memory."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)

        def put() -> None:
            self._obstore.put(
                self._inner, self._key(path), content, chunk_size=_part_size(size), max_concurrency=PARTS_AT_ONCE
            )

        self._patiently("write", path, put)
        if isinstance(content, Path):
            found = self.stat(path)
            if found is None or found.size != size:
                raise StorageError(
                    f"cannot write {self._name(path)}: {size} bytes were sent, the store has "
                    f"{found.size if found else 'none of it'}"
                )

    def create(self, path: str, content: bytes) -> str:
        """Writes an object that does not exist yet; returns its version. Conflict where it exists with another content."""
        return self._conditionally(path, content, "create")

    def swap(self, path: str, content: bytes, version: str) -> str:
        """Replaces the object of that version, which `read`, `create` or `swap` gave; returns the new one. Conflict where
        somebody else wrote it meanwhile."""
        return self._conditionally(path, content, {self._version_of: version})

    def _conditionally(self, path: str, content: bytes, mode: Any) -> str:
        """An answer that was lost is found out by reading: who was refused may have been refused by his own write."""
        end, pause = time.monotonic() + self.patience, 0.2
        while True:
            try:
                written = self._obstore.put(self._inner, self._key(path), content, mode=mode)
                return str(written[self._version_of] or "")
            except Exception as error:
                told = in_words(error, "write", self._name(path))
            if isinstance(told, Conflict | Unavailable | Missing):
                found = self.read(path)
                if found is not None and found[0] == content:
                    return found[1]
                if not isinstance(told, Unavailable):
                    raise Conflict(str(told)) from None
            if not isinstance(told, Unavailable) or time.monotonic() > end:
                raise told
            time.sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, 10.0)

    def delete(self, paths: Iterable[str]) -> None:
        """Deletes objects; one that is not there is no error."""
        for path in paths:
            with contextlib.suppress(Missing):
                self._patiently("delete", path, lambda path=path: self._obstore.delete(self._inner, self._key(path)))  # type: ignore[misc]

    def probe(self) -> None:
        """Proves that objects can be written, read, deleted, and written on condition; StorageError says what cannot."""
        path, content = f"{PROBE}-{os.getpid()}-{random.getrandbits(64):016x}", b"nemo-rl was here"

        def refused(mode: Any) -> bool:
            try:
                self._obstore.put(self._inner, self._key(path), b"another content", mode=mode)
                return False
            except Exception as error:
                if isinstance(in_words(error, "write", self._name(path)), Conflict):
                    return True
                raise

        version = self.create(path, b"")
        try:
            conditions = [("new", "create")]
            if not self.is_local:
                self.swap(path, content, version)
                conditions.append(("unchanged", {self._version_of: version}))
            for condition, mode in conditions:
                if not self._patiently("write", path, lambda mode=mode: refused(mode)):  # type: ignore[misc]
                    raise StorageError(
                        f"{self.uri}: this store has no conditional writes (it overwrote an object that was to be written only if "
                        f"{condition}), so two writers could not be kept apart; expected a store that knows If-None-Match and "
                        "If-Match, as Amazon S3, Google Cloud Storage, Azure, MinIO, Ceph (19.2) and versitygw do"
                    )
            if (found := self.read(path)) is None or found[0] != content:
                raise StorageError(f"{self.uri}: an object that was just written cannot be read")
            self.list()
        finally:
            self.delete([path])

    # --- how it is done

    def _key(self, path: str) -> str:
        return f"{self.base}/{path}".strip("/")

    def _listed(self, tag: str | None) -> str:
        """An ETag as conditions take it: Azure's lists leave out its quotes."""
        return f'"{tag}"' if tag and not self.is_local and not tag.endswith('"') else tag or ""

    def _name(self, path: str) -> str:
        return uris.joined(self.uri, path) if path else self.uri

    def _patiently(self, doing: str, path: str, work: Callable[[], T]) -> T:
        end, pause = time.monotonic() + self.patience, 0.2
        while True:
            try:
                return work()
            except Exception as error:
                told = in_words(error, doing, self._name(path))
                if not isinstance(told, Unavailable) or time.monotonic() > end:
                    raise told from None
            time.sleep(pause * (0.5 + random.random()))
            pause = min(2 * pause, 10.0)


def _part_size(size: int) -> int:
    """Parts of an upload: a store takes at most 10,000 of them."""
    return max(PART_BYTES, -(-size // 9_000))


def _obstore() -> Any:
    require("an object store", "obstore")
    importlib.import_module("obstore.store")
    return importlib.import_module("obstore")


def _parts(uri: str) -> tuple[str, str, str]:
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")
    return scheme, bucket, path.strip("/")


def _open(obstore: Any, scheme: str, bucket: str, retry_seconds: float) -> Any:
    retry = {
        "max_retries": 4,
        "retry_timeout": timedelta(seconds=retry_seconds),
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
    }
    client: dict[str, Any] = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(seconds=120)}
    common = {"retry_config": retry, "client_options": client}
    if scheme in ("http", "https"):
        client["allow_http"] = scheme == "http"
        return obstore.store.HTTPStore.from_url(f"{scheme}://{bucket}", **common)
    if scheme in ("gs", "az"):
        company, kind = ("GOOGLE", obstore.store.GCSStore) if scheme == "gs" else ("AZURE", obstore.store.AzureStore)
        client["allow_http"] = os.environ.get(f"{company}_ALLOW_HTTP", "").lower() in ("1", "true")  # of an emulator
        return kind(bucket, **common)
    config, provider = _s3_settings()
    endpoint = config.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        config["endpoint"] = endpoint
        client["allow_http"] = urlsplit(endpoint).scheme == "http"
    if provider is not None:
        common["credential_provider"] = provider
    return obstore.store.S3Store(bucket, config=config, **common)


_SILENT = (
    *("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
    *("AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE"),
)


def _s3_settings() -> tuple[dict[str, Any], Any]:
    """What the files of the AWS command line say where the environment does not: keys, region, endpoint; or boto3's sign-on."""
    config: dict[str, Any] = {}
    profile = os.environ.get("AWS_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, name, section in (
        ("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(os.environ.get(variable) or f"~/.aws/{name}").expanduser(), encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if parser.has_section(section):
            found |= dict(parser.items(section))
    if not any(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION")) and found.get("region"):
        config["region"] = found["region"]
    if found.get("endpoint_url") and not (os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")):
        config["endpoint"] = found["endpoint_url"]
    if any(os.environ.get(name) for name in _SILENT):
        return config, None
    if found.get("aws_access_key_id") and found.get("aws_secret_access_key"):
        config["access_key_id"] = found["aws_access_key_id"]
        config["secret_access_key"] = found["aws_secret_access_key"]
        if found.get("aws_session_token"):
            config["token"] = found["aws_session_token"]
        return config, None
    if found.keys() & {"sso_session", "sso_start_url", "role_arn", "credential_process"}:
        try:
            boto3, auth = importlib.import_module("boto3"), importlib.import_module("obstore.auth.boto3")
        except ImportError:
            raise StorageError(
                f"the profile {profile!r} of ~/.aws/config signs on by SSO, a role or a program, which needs boto3; pip install "
                "boto3, or set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (aws configure "
                "export-credentials --format env prints them)"
            ) from None
        return config, auth.Boto3CredentialProvider(boto3.Session(profile_name=profile))
    return config, None


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a local folder, each with its path below it, by name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix(), path
