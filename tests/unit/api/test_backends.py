"""The choice of a backend, and what the local one refuses or ignores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_rl import backends
from nemo_rl.api.keywords import build_spec
from nemo_rl.backends import Run, choose, local
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import CallbackSpec


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KUBECONFIG", "NEMO_RL_BACKEND", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A kubeconfig and a kubernetes backend whose answer the test sets."""
    (tmp_path / "config").write_text("apiVersion: v1\n")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    backend = SimpleNamespace(probe=lambda timeout: (True, "context lab serves rltrainingjobs"))
    monkeypatch.setattr(backends, "_has_kubernetes_backend", lambda: True)
    monkeypatch.setattr(backends, "kubernetes_backend", lambda what: backend)
    return backend


def test_without_a_context_it_is_this_machine():
    assert choose("auto") == ("local", "no Kubernetes context here")


def test_without_a_context_no_cluster_client_is_loaded(tmp_path: Path):
    code = "import sys; from nemo_rl.backends import choose; choose(); print('kubernetes' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k not in ("KUBECONFIG", "NEMO_RL_BACKEND")}
    output = subprocess.check_output([sys.executable, "-c", code], env={**env, "HOME": str(tmp_path)}, text=True)
    assert output.strip() == "False"


def test_a_usable_cluster_is_chosen(cluster: Any):
    assert choose() == ("kubernetes", "context lab serves rltrainingjobs")


def test_a_cluster_that_refuses_leaves_this_machine_and_its_reason(cluster: Any):
    cluster.probe = lambda timeout: (False, "the cluster does not serve rltrainingjobs")
    assert choose() == ("local", "the cluster does not serve rltrainingjobs")


def test_a_cluster_whose_probe_fails_leaves_this_machine(cluster: Any):
    def probe(timeout: float) -> tuple[bool, str]:
        raise OSError("no route to host")

    cluster.probe = probe
    name, reason = choose()
    assert name == "local"
    assert "no route to host" in reason


def test_a_cluster_that_never_answers_leaves_this_machine(cluster: Any, monkeypatch: pytest.MonkeyPatch):
    released = threading.Event()
    monkeypatch.setattr(backends, "PROBE_SECONDS", 0.05)
    cluster.probe = lambda timeout: released.wait()
    try:
        name, reason = choose()
    finally:
        released.set()
    assert name == "local"
    assert "did not answer" in reason


def test_the_argument_beats_the_variable_beats_auto(cluster: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEMO_RL_BACKEND", "local")
    assert choose("auto") == ("local", "NEMO_RL_BACKEND=local")
    assert choose("kubernetes") == ("kubernetes", "asked for")


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NEMO_RL_BACKEND", "slurm")
    with pytest.raises(ValueError, match="NEMO_RL_BACKEND='slurm': expected one of auto, local, kubernetes"):
        choose()


def test_asking_for_a_backend_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "_has_kubernetes_backend", lambda: False)
    with pytest.raises(RuntimeError, match="needs the kubernetes backend"):
        choose("kubernetes")


def test_an_in_cluster_pod_counts_as_a_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "token").write_text("x")
    monkeypatch.setattr(backends, "_SERVICE_ACCOUNT_TOKEN", tmp_path / "token")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert backends.cluster_context() == "a pod's service account"


# --- the local backend


def _run(tmp_path: Path, *, model: str = "org/m", dataset: Any = "org/d", wait: bool = True, **keywords: Any) -> Run:
    return Run(build_spec(model, dataset, "exact_match", **keywords), tmp_path, wait=wait)


def test_only_what_a_cluster_would_use_is_listed_as_ignored(tmp_path: Path):
    run = _run(tmp_path, gpus=8, image="i", max_steps=3, claim="c", env={"A": "b"}, secrets=["HF_TOKEN"])
    assert local.ignored(run) == ["claim (output.claim)", "gpus (resources.gpusPerNode)", "image", "env HF_TOKEN"]
    assert local.ignored(_run(tmp_path, gpus=0)) == []  # the CPU is chosen here too
    assert local.ignored(_run(tmp_path)) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"wait": False}, ValueError, "wait=False needs the kubernetes backend"),
        ({"model": "pvc://claim/m"}, ValueError, "names storage of a cluster"),
        ({"dataset": "pvc://claim/d.jsonl"}, ValueError, "names storage of a cluster"),
        ({"model": "./missing"}, ValueError, "is not a folder on this machine"),
        ({"dataset": "missing.jsonl"}, DatasetError, "is not a file here"),
        ({"validation_dataset": "missing.csv"}, DatasetError, "validation_dataset 'missing.csv'"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_first(tmp_path: Path, arguments: Any, error: type, message: str):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        local.check(_run(tmp_path, **arguments))


def test_literal_environment_variables_last_as_long_as_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KEPT", "before")
    spec = _run(tmp_path, env={"KEPT": "during", "NEW_ONE": "x"}).spec
    with local._environment(spec):
        assert (os.environ["KEPT"], os.environ["NEW_ONE"]) == ("during", "x")
    assert os.environ["KEPT"] == "before"
    assert "NEW_ONE" not in os.environ


def test_a_callback_is_loaded_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_callbacks_module.py").write_text(
        "class Mine:\n    def on_train_begin(self, trainer): ...\ndef factory():\n    return Mine()\nready = Mine()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    kinds = [
        type(local.load_callback(CallbackSpec(function=f"my_callbacks_module:{n}"))).__name__
        for n in ("Mine", "factory", "ready")
    ]
    assert kinds == ["Mine", "Mine", "Mine"]
    with pytest.raises(ValueError, match="cannot be imported"):
        local.load_callback(CallbackSpec(function="my_callbacks_module:Missing"))
