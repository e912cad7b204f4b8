"""A small synchronous Kubernetes client for the tests, with the server's own words on errors."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml

from nemo_rl.job import decode, names

Object = dict[str, Any]
Found = TypeVar("Found")

GROUPS = {
    "rltrainingjobs": f"/apis/{names.API_VERSION}",
    "jobs": "/apis/batch/v1",
    "statefulsets": "/apis/apps/v1",
    **{
        kind: "/apis/kueue.x-k8s.io/v1beta2"
        for kind in ("workloads", "localqueues", "clusterqueues", "resourceflavors", "workloadpriorityclasses")
    },
    "customresourcedefinitions": "/apis/apiextensions.k8s.io/v1",
}
CORE = "/api/v1"
MERGE = "application/merge-patch+json"
WAIT_SECONDS = 60.0
"""How long something may take on a machine with much else to do; what is tested takes a second or two."""


class ApiError(Exception):
    """An answer of the API server that is not a success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class Api:
    """A client of one server, by a kubeconfig with client certificates or a token."""

    def __init__(self, kubeconfig: Path) -> None:
        content = yaml.safe_load(kubeconfig.read_text())
        context = next(c["context"] for c in content["contexts"] if c["name"] == content["current-context"])
        cluster = next(c["cluster"] for c in content["clusters"] if c["name"] == context["cluster"])
        user = next(u["user"] for u in content["users"] if u["name"] == context["user"])
        server = urlsplit(cluster["server"])
        self.host, self.port = server.hostname or "", server.port or 443
        self.headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        self.tls = _tls(cluster, user)
        self.local = threading.local()

    def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Any:
        """The parsed answer. Raises ApiError for an answer of 400 or more, OSError when nobody answers."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = self.headers | ({"Content-Type": content_type} if data is not None else {})
        # a kept connection may have ended since, and only a read may be sent twice
        for fresh in (False, True) if method == "GET" else (True,):
            connection = self._connection(fresh)
            try:
                connection.request(method, path, data, headers)
                response = connection.getresponse()
                text = response.read()
                break
            except (OSError, http.client.HTTPException):
                self.local.connection = None
                if fresh:
                    raise
        if response.status >= 400:
            raise ApiError(response.status, _message(text))
        return decode.loads(text) if text[:1] == b"{" else text.decode()

    def get(self, kind: str, namespace: str | None, name: str) -> Object:
        return dict(self.request("GET", path(kind, namespace, name)))

    def find(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """The object, or None when there is none."""
        try:
            return self.get(kind, namespace, name)
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    def list(self, kind: str, namespace: str | None = None, selector: str = "") -> list[Object]:
        query = f"?labelSelector={selector}" if selector else ""
        return list(self.request("GET", path(kind, namespace) + query)["items"])

    def create(self, kind: str, namespace: str | None, body: Object) -> Object:
        return dict(self.request("POST", path(kind, namespace), body))

    def patch(self, kind: str, namespace: str | None, name: str, body: Object, part: str = "") -> Object:
        return dict(self.request("PATCH", path(kind, namespace, name, part), body, MERGE))

    def delete(self, kind: str, namespace: str | None, name: str, **options: Any) -> None:
        """Deletes in the background; an object that is not there is as good as deleted."""
        body = {"propagationPolicy": "Background"} | options
        try:
            self.request("DELETE", path(kind, namespace, name), body)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    def watch(self, kind: str, version: str, seconds: int = 300) -> Iterator[Object]:
        """Events of all namespaces from a resource version on, until the server ends the stream."""
        connection = self._connect(timeout=seconds + 10)
        query = f"?watch=1&resourceVersion={version}&timeoutSeconds={seconds}&allowWatchBookmarks=true"
        connection.request("GET", path(kind) + query, headers=self.headers)
        response = connection.getresponse()
        if response.status >= 400:
            raise ApiError(response.status, _message(response.read()))
        while line := response.readline():
            yield decode.loads(line)

    def _connection(self, fresh: bool) -> http.client.HTTPSConnection:
        if fresh or getattr(self.local, "connection", None) is None:
            self.local.connection = self._connect(timeout=30)
        return self.local.connection

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self.tls)


def path(kind: str, namespace: str | None = None, name: str = "", part: str = "") -> str:
    words = [GROUPS.get(kind, CORE)]
    if namespace:
        words.append(f"namespaces/{namespace}")
    return "/".join(word for word in [*words, kind, name, part] if word)


def eventually(check: Callable[[], Found | None], what: str, seconds: float = WAIT_SECONDS) -> Found:
    """Asks again and again until the answer is true, and returns it; AssertionError with `what` at the deadline."""
    limit = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > limit:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def _tls(cluster: Object, user: Object) -> ssl.SSLContext:
    def file(section: Object, key: str) -> str | None:
        if f"{key}-data" not in section:
            return section.get(key)
        with tempfile.NamedTemporaryFile(delete=False, prefix="kubeconfig-") as written:
            written.write(base64.b64decode(section[f"{key}-data"]))
        return written.name

    context = ssl.create_default_context(cafile=file(cluster, "certificate-authority"))
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    certificate = file(user, "client-certificate")
    if certificate:
        context.load_cert_chain(certificate, file(user, "client-key"))
    return context


def _message(text: bytes) -> str:
    try:
        return str(decode.loads(text).get("message", ""))
    except ValueError:
        return text[:500].decode(errors="replace")
