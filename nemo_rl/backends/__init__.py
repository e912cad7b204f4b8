"""Where a run happens: what a run consists of, and the choice between this machine and a Kubernetes cluster."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.extras import explained, is_there, missing, require
from nemo_rl.job.names import BACKEND_VARIABLE

if TYPE_CHECKING:
    from nemo_rl.job.spec import RLTrainingJobSpec

BACKENDS = ("auto", "local", "kubernetes")
PROBE_SECONDS = 2.0
_CLUSTER_PACKAGE = "nemo_rl.backends.kubernetes"
_SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True)
class Run:
    """One run as a backend gets it: the specification, and beside it the objects of this process that it cannot hold.

    `dataset`, `validation_dataset` are what the caller gave (rows, DataModule, …) or None where the specification says
    all; likewise `reward_fn`, `model` and `callbacks`. `name` and `namespace` are those of the resource on a cluster.
    """

    spec: RLTrainingJobSpec
    output_dir: Path | str
    """A folder, or the address of an object store."""
    dataset: Any = None
    validation_dataset: Any = None
    reward_fn: Any = None
    callbacks: tuple[Any, ...] = ()
    model: Any = None
    tokenizer: Any = None
    name: str | None = None
    namespace: str | None = None
    wait: bool = True


def choose(backend: str | None = None) -> tuple[str, str]:
    """("local" or "kubernetes", why). `backend` beats the variable NEMO_RL_BACKEND beats "auto".

    "auto" asks the cluster of the current context, if there is one, for at most two seconds. ValueError for an unknown
    backend, RuntimeError where kubernetes is asked for and not available.
    """
    asked = backend if backend not in (None, "auto") else os.environ.get(BACKEND_VARIABLE) or "auto"
    source = "asked for" if backend not in (None, "auto") else f"{BACKEND_VARIABLE}={asked}"
    if asked not in BACKENDS:
        where = "backend" if source == "asked for" else BACKEND_VARIABLE
        raise ValueError(f"{where}={asked!r}: expected one of {', '.join(BACKENDS)}")
    if asked == "local":
        return "local", source
    if asked == "kubernetes":
        kubernetes_backend("backend='kubernetes'")
        return "kubernetes", source
    context = cluster_context()
    if context is None:
        return "local", "no Kubernetes context here"
    if not _has_kubernetes_backend():
        return "local", f"{context} found, but this version of nemo-rl trains only on this machine"
    if not is_there("kubernetes"):
        return "local", f"{context} found, but no client to ask it: {missing('the cluster', 'kubernetes')}"
    return _ask_cluster()


def cluster_context() -> str | None:
    """What hints at a cluster (a kubeconfig file or a pod's service account), in words, or None. Loads no client."""
    for path in filter(None, os.environ.get("KUBECONFIG", "").split(os.pathsep)):
        if Path(path).expanduser().is_file():
            return "KUBECONFIG"
    if not os.environ.get("KUBECONFIG") and (Path.home() / ".kube" / "config").is_file():
        return "~/.kube/config"
    if os.environ.get("KUBERNETES_SERVICE_HOST") and _SERVICE_ACCOUNT_TOKEN.is_file():
        return "a pod's service account"
    return None


def kubernetes_backend(what: str) -> Any:
    """The module of the kubernetes backend; RuntimeError that names `what` needs it where it is not available."""
    if not _has_kubernetes_backend():
        raise RuntimeError(
            f"{what} needs the kubernetes backend, which this version of nemo-rl does not have; "
            f"train on this machine with backend='local'"
        )
    require(what, "kubernetes")
    with explained(what):
        return importlib.import_module(_CLUSTER_PACKAGE)


def _has_kubernetes_backend() -> bool:
    found = importlib.util.find_spec(_CLUSTER_PACKAGE)
    return found is not None and found.origin is not None


def _ask_cluster() -> tuple[str, str]:
    """Asks in a thread, because a client's own time-outs do not bound name resolution or a login helper."""
    answers: list[tuple[bool, str]] = []
    with contextlib.suppress(ImportError):
        importlib.import_module("kubernetes.client")  # may take a second; the time limit is for the cluster

    def ask() -> None:
        try:
            answers.append(kubernetes_backend("backend='auto'").probe(timeout=PROBE_SECONDS))
        except Exception as error:
            answers.append((False, f"the cluster cannot be used: {error}"))

    asking = threading.Thread(target=ask, daemon=True, name="nemo-rl-probe")
    asking.start()
    asking.join(PROBE_SECONDS)
    usable, reason = answers[0] if answers else (False, f"the cluster did not answer within {PROBE_SECONDS:.0f} s")
    return ("kubernetes" if usable else "local"), reason
