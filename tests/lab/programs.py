"""The programs of the lab: compiled from Go modules once, into the cache."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from lab.settings import BIN, CNI_BIN, SOURCE, LabError, say

KUBERNETES_VERSION = "v1.34.4"
"""As in build/kubernetes/go.mod."""
HELM_VERSION = "v3.22.0"
"""As in build/helm/go.mod."""

# program -> (module folder under build/, package, output folder)
PROGRAMS: dict[str, tuple[str, str, Path]] = {
    "etcd": ("kubernetes", "go.etcd.io/etcd/server/v3", BIN),
    "kube-apiserver": ("kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver", BIN),
    "kube-controller-manager": ("kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager", BIN),
    "kubectl": ("kubernetes", "k8s.io/kubernetes/cmd/kubectl", BIN),
    "kube-scheduler": ("kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler", BIN),
    "kubelet": ("kubernetes", "k8s.io/kubernetes/cmd/kubelet", BIN),
    "kube-proxy": ("kubernetes", "k8s.io/kubernetes/cmd/kube-proxy", BIN),
    "dra-test-driver": ("kubernetes", "k8s.io/kubernetes/test/e2e/dra/test-driver", BIN),
    "bridge": ("kubernetes", "github.com/containernetworking/plugins/plugins/main/bridge", CNI_BIN),
    "loopback": ("kubernetes", "github.com/containernetworking/plugins/plugins/main/loopback", CNI_BIN),
    "portmap": ("kubernetes", "github.com/containernetworking/plugins/plugins/meta/portmap", CNI_BIN),
    "host-local": ("kubernetes", "github.com/containernetworking/plugins/plugins/ipam/host-local", CNI_BIN),
    "pause": ("pause", "lab/pause", BIN),
    "coredns": ("coredns", "github.com/coredns/coredns", BIN),
    "helm": ("helm", "helm.sh/helm/v3/cmd/helm", BIN),
    "kueue": ("kueue", "sigs.k8s.io/kueue/cmd/kueue", BIN),
    "versitygw": ("versitygw", "github.com/versity/versitygw/cmd/versitygw", BIN),
    "prometheus": ("prometheus", "github.com/prometheus/prometheus/cmd/prometheus", BIN),
    "netpol": ("kube-network-policies", "sigs.k8s.io/kube-network-policies/cmd", BIN),
    "promtool": ("prometheus", "github.com/prometheus/prometheus/cmd/promtool", BIN),
}
TAGS = {"prometheus": "remove_all_sd,enable_kubernetes_sd"}
"""Build tags of a module: Prometheus finds its targets by the API server alone; the clients of clouds cost minutes."""
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
ON_DEMAND = ("dra-test-driver",)
"""Of the module kubernetes, but no part of a node."""
NODE = tuple(
    name
    for name, (module, _, _) in PROGRAMS.items()
    if module in ("kubernetes", "pause", "coredns") and name not in ON_DEMAND
)


def path(name: str) -> Path:
    return PROGRAMS[name][2] / name


def missing(names: Iterable[str]) -> list[str]:
    return [name for name in names if not path(name).exists()]


def build(names: Iterable[str]) -> None:
    """Compiles programs into the cache, one `go build` for each; a lock keeps two builders apart.

    Raises LabError when Go is not installed or a build fails.
    """
    BIN.mkdir(parents=True, exist_ok=True)
    with open(BIN.parent / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in names:
            _build_one(name)


def ensure(names: Iterable[str]) -> None:
    """Compiles what the cache lacks; another builder's result is used."""
    wanted = list(names)
    if not missing(wanted):
        return
    BIN.mkdir(parents=True, exist_ok=True)
    with open(BIN.parent / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lacking = missing(wanted)
        if lacking:
            say(f"compiling {' '.join(lacking)} into {BIN.parent} (minutes, once)")
        for name in lacking:
            _build_one(name)


def _build_one(name: str) -> None:
    if not shutil.which("go"):
        raise LabError(f"{name} is not in {path(name).parent} and Go is not installed; install Go 1.26 or newer")
    module, package, folder = PROGRAMS[name]
    flags = "-s -w" + "".join(f" -X {entry}" for entry in _stamps(module))
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{name}.{os.getpid()}"
    begin = time.monotonic()
    # etcd's main package is in a folder called v3, so every output is named
    command = ["go", "build", "-trimpath", "-buildvcs=false", "-ldflags", flags, f"-tags={TAGS.get(module, '')}"]
    command += ["-o", str(unfinished), package]
    result = subprocess.run(
        command, cwd=SOURCE / "build" / module, env=os.environ | {"CGO_ENABLED": "0"}, stderr=subprocess.PIPE, text=True
    )
    if result.returncode:
        sys.stderr.write(result.stderr)
        raise LabError(f"compiling {name} failed: {result.stderr.strip().splitlines()[-1:] or 'no message'}")
    unfinished.rename(folder / name)
    say(f"{name}: compiled in {time.monotonic() - begin:.0f} s")


def _stamps(module: str) -> list[str]:
    """Version variables for the linker: a Kubernetes of version 0 would refuse its own clients."""
    major, minor, _ = KUBERNETES_VERSION.removeprefix("v").split(".")
    if module == "kubernetes":
        base = "k8s.io/component-base/version"
        return [
            f"{base}.gitVersion={KUBERNETES_VERSION}",
            f"{base}.gitMajor={major}",
            f"{base}.gitMinor={minor}",
            f"k8s.io/client-go/pkg/version.gitVersion={KUBERNETES_VERSION}",
        ]
    if module == "helm":
        charts = "helm.sh/helm/v3/pkg/chartutil"  # the cluster that it assumes where it asks none
        return [
            f"helm.sh/helm/v3/internal/version.version={HELM_VERSION}",
            f"{charts}.k8sVersionMajor={major}",
            f"{charts}.k8sVersionMinor={minor}",
        ]
    return []
