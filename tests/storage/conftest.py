from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.gcs import Gcs
from storage.server import S3, Faults, serving


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server for the session."""
    with serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def store_environment(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """The server, and the variables that make it the one that everything here finds."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NEMO_RL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NEMO_RL_STORAGE_PATIENCE", "20")
    return s3


@pytest.fixture
def faults(store_environment: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """A proxy before the server, which the variables name; it lets everything pass until told otherwise."""
    proxy = Faults(store_environment)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture
def gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gcs]:
    """A server like Google Cloud Storage with the bucket `bucket`, which the variables name."""
    server = Gcs()
    server.write_account(tmp_path / "account.json")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    yield server
    server.close()
