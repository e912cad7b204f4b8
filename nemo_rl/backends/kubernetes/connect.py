"""The connection to the cluster of the current context, and whether jobs can be submitted there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError, ConnectionCut
from nemo_rl.job import decode, names

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

Object = dict[str, Any]

JSON = "application/json"
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
FIELD_MANAGER = "nemo-rl"
REQUEST_SECONDS = 30.0
STREAM_SILENCE_SECONDS = 300.0
"""A stream that is silent for so long is opened anew: its connection may have died without a word."""
_TRIES = 4
_PAUSE_SECONDS = 0.2
_SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

INSTALL_CRD = "nemo-rl crd | kubectl apply --server-side -f -"
INSTALL = (
    f"helm install nemo-rl-operator charts/nemo-rl-operator --namespace {names.SYSTEM_NAMESPACE} --create-namespace "
    f"(the definition alone: {INSTALL_CRD})"
)
CHECK_OPERATOR = "kubectl get pods --all-namespaces -l app.kubernetes.io/name=nemo-rl-operator"


@dataclass
class Cluster:
    """One API server, with the caller's rights, and the namespace in which jobs are looked for and made."""

    client: ApiClient
    context: str
    namespace: str

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, Any] | None = None,
        content_type: str = JSON,
        timeout: float = REQUEST_SECONDS,
    ) -> Any:
        """The answer, parsed where it is JSON. ApiError for one that is no success, ClusterError where none comes.

        Asked again where the connection breaks off. So a change may be made twice: every one here says what shall be,
        and takes "exists already" and "not found" for what they are.
        """
        for attempt in range(_TRIES):
            try:
                text = self._send(method, path, body, query or {}, content_type, timeout).read()
                break
            except ConnectionCut:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(_PAUSE_SECONDS * 2**attempt)
        return decode.loads(text) if text[:1] == b"{" else text.decode(errors="replace")

    def stream(
        self, path: str, *, query: Mapping[str, Any] | None = None, silence: float = STREAM_SILENCE_SECONDS
    ) -> Iterator[bytes]:
        """The bytes of a long answer as they come. ApiError at once for a refusal, ClusterError where it breaks off."""
        response = self._send("GET", path, None, query or {}, JSON, (REQUEST_SECONDS, silence))
        return self._chunks(response)

    @staticmethod
    def _chunks(response: Any) -> Iterator[bytes]:
        import urllib3

        try:
            yield from _arriving(response.response)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterError(f"the stream was cut: {error}") from None
        finally:
            response.response.close()

    def _send(
        self, method: str, path: str, body: Any, query: Mapping[str, Any], content_type: str, timeout: Any
    ) -> _Answer:
        """The answer, asked for again where the server says to come back later, for as long as one answer may take."""
        given = {name: value for name, value in query.items() if value is not None}
        url = self.client.configuration.host + path + (f"?{urlencode(given)}" if given else "")
        limit = time.monotonic() + (timeout[0] if isinstance(timeout, tuple) else timeout)
        while True:
            answer = self._send_once(method, path, url, body, content_type, timeout)
            if answer.status < 400:
                return answer
            words = _words(answer.read())
            if answer.retry_after is None or time.monotonic() + answer.retry_after > limit:
                raise ApiError(answer.status, words)
            time.sleep(answer.retry_after)

    def _send_once(self, method: str, path: str, url: str, body: Any, content_type: str, timeout: Any) -> _Answer:
        import urllib3

        headers = {"Accept": JSON, "User-Agent": "nemo-rl"}
        if body is not None:
            headers["Content-Type"] = content_type
        self.client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        try:
            response = self.client.rest_client.pool_manager.request(
                method,
                url,
                body=None if body is None else json.dumps(body).encode(),
                headers=headers,
                timeout=urllib3.Timeout(*timeout) if isinstance(timeout, tuple) else timeout,
                retries=False,
                preload_content=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            kind = ConnectionCut if isinstance(error, urllib3.exceptions.ProtocolError) else ClusterError
            raise kind(
                f"the cluster of context {self.context} does not answer: {_short(error)}; check kubectl cluster-info"
            ) from None
        return _Answer(response)


class _Answer:
    """A response that is read once."""

    def __init__(self, response: Any) -> None:
        self.response = response
        self.status = int(response.status)

    @property
    def retry_after(self) -> float | None:
        """Seconds after which a busy server wants to be asked again: it has not done anything yet."""
        said = self.response.headers.get("Retry-After", "")
        return max(0.1, float(said)) if said.isdecimal() and self.status in (429, 503) else None

    def read(self) -> bytes:
        import urllib3

        try:
            return bytes(self.response.read())
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ConnectionCut(f"the answer was cut: {_short(error)}") from None
        finally:
            self.response.release_conn()


def job_path(namespace: str, name: str = "", part: str = "") -> str:
    return _path(f"/apis/{names.API_VERSION}", namespace, names.PLURAL, name, part)


def core_path(namespace: str, kind: str, name: str = "", part: str = "") -> str:
    return _path("/api/v1", namespace, kind, name, part)


def _path(root: str, namespace: str, kind: str, name: str, part: str) -> str:
    return "/".join(word for word in (root, "namespaces", namespace, kind, name, part) if word)


def connect(namespace: str | None = None) -> Cluster:
    """The cluster that KUBECONFIG, ~/.kube/config or a pod's service account names. ClusterError where none does.

    `namespace` beats the context's beats "default".
    """
    from kubernetes import client, config

    try:
        # Named each time: the client reads KUBECONFIG only when it is imported.
        file = os.environ.get("KUBECONFIG") or "~/.kube/config"
        _, active = config.list_kube_config_contexts(config_file=file)  # type: ignore[no-untyped-call]
        api = config.new_client_from_config(config_file=file)  # type: ignore[no-untyped-call]
        found = (active.get("context") or {}).get("namespace")
        context = str(active.get("name"))
    except config.ConfigException as problem:
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            raise ClusterError(
                f"found no Kubernetes context that can be used ({problem}); set KUBECONFIG, or choose one with "
                f"kubectl config use-context"
            ) from None
        api = client.ApiClient(configuration)
        context = "of this pod"
        found = _SERVICE_ACCOUNT_NAMESPACE.read_text().strip() if _SERVICE_ACCOUNT_NAMESPACE.is_file() else None
    return Cluster(api, context, namespace or found or "default")


def connect_with_token(token: str, server: str | None = None, authority: Path | None = None) -> Cluster:
    """The cluster with the rights of a bearer token, and of nothing else that is here. ClusterError where no address is known.

    `server` and `authority` (a file with certificates) are by default those that a pod is told.
    """
    from kubernetes import client

    if server is None:
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}") for part in ("HOST", "PORT"))
        if not host or not port:
            raise ClusterError(
                "the address of the API server is not known: expected KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT, as "
                "in a pod; give --api-server https://HOST:PORT"
            )
        server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    configuration = client.Configuration()
    configuration.host = server.rstrip("/")
    configuration.ssl_ca_cert = str(authority) if authority is not None else None
    configuration.api_key = {"authorization": token}
    configuration.api_key_prefix = {"authorization": "Bearer"}
    return Cluster(client.ApiClient(configuration), server, "default")


def probe(timeout: float, namespace: str | None = None) -> tuple[bool, str]:
    """(whether jobs can be submitted, one line that says why). Never raises."""
    try:
        cluster = connect(namespace)
        require(cluster, timeout)
    except Exception as error:
        return False, str(error)
    return True, f"context {cluster.context}, namespace {cluster.namespace}"


def require(cluster: Cluster, timeout: float = REQUEST_SECONDS) -> None:
    """ClusterError, with the cure, unless the cluster serves the resource and the caller may create it."""
    served(cluster, timeout)
    if not may(cluster, "create", names.PLURAL, names.GROUP, timeout=timeout):
        raise ClusterError(
            f"you may not create {names.PLURAL} in namespace {cluster.namespace} of context {cluster.context}; ask its "
            f"administrator for the role, or give another namespace; kubectl auth can-i create {names.PLURAL}.{names.GROUP}"
        )


def served(cluster: Cluster, timeout: float = REQUEST_SECONDS) -> None:
    """ClusterError unless the cluster serves our version of the resource."""
    try:
        found = cluster.request("GET", f"/apis/{names.API_VERSION}", timeout=timeout)
    except ApiError as error:
        if error.code == 404:
            raise ClusterError(
                f"context {cluster.context} does not serve {names.PLURAL}.{names.GROUP} {names.VERSION}; install the "
                f"operator: {INSTALL}"
            ) from None
        if error.code in (401, 403):
            raise ClusterError(
                f"context {cluster.context} refuses you ({error.code}: {error.reason}); log in again or choose another "
                f"context with kubectl config use-context"
            ) from None
        raise
    if not any(resource.get("name") == names.PLURAL for resource in found.get("resources", [])):
        raise ClusterError(
            f"context {cluster.context} serves {names.API_VERSION} without {names.PLURAL}; {INSTALL_CRD}"
        )


def may(
    cluster: Cluster, verb: str, resource: str, group: str = "", part: str = "", *, timeout: float = REQUEST_SECONDS
) -> bool:
    """Whether the caller has a right in the namespace, by a SelfSubjectAccessReview."""
    wanted = {"namespace": cluster.namespace, "verb": verb, "resource": resource, "group": group, "subresource": part}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {key: value for key, value in wanted.items() if value}},
    }
    answer = cluster.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review, timeout=timeout)
    return bool(answer.get("status", {}).get("allowed"))


def _words(text: bytes) -> str:
    try:
        return str(decode.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300].decode(errors="replace")


def _short(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _arriving(response: Any) -> Iterator[bytes]:
    """Pieces as they arrive: `stream` with a size would wait until so many bytes are there."""
    if getattr(response, "chunked", False):
        yield from response.stream(decode_content=False)
    while piece := response.read1(65536):
        yield piece
