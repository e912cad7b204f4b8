"""Certificates and kubeconfigs of a cluster, made with openssl."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab.settings import sh

ADMINISTRATORS = "/O=system:masters"
NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650"]


class Authority:
    """A certificate authority in a folder; every certificate it makes lies beside it as NAME.crt and NAME.key."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder, self.name = folder, name
        if (folder / f"{name}.crt").exists():
            return
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._openssl(name, f"/CN={name}", ["-addext", "keyUsage=critical,keyCertSign,cRLSign"])

    def certificate(self, name: str, subject: str, usage: str, names: Sequence[str] = ()) -> None:
        extensions = ["-CA", f"{self.folder}/{self.name}.crt", "-CAkey", f"{self.folder}/{self.name}.key"]
        wanted = ["basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature"]
        wanted.append(f"extendedKeyUsage={usage}")
        if names:
            wanted.append("subjectAltName=" + ",".join(names))
        for entry in wanted:
            extensions += ["-addext", entry]
        self._openssl(name, subject, extensions)

    def _openssl(self, name: str, subject: str, extensions: list[str]) -> None:
        files = ["-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.crt"]
        sh("openssl", "req", "-x509", *NEW_KEY, "-subj", subject, *files, *extensions, stderr=subprocess.DEVNULL)


def service_account_keys(folder: Path) -> None:
    sh("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", folder / "sa.key")
    sh("openssl", "pkey", "-in", folder / "sa.key", "-pubout", "-out", folder / "sa.pub")


def cluster(folder: Path, server_names: Sequence[str], clients: dict[str, str], kubelet_names: Sequence[str]) -> None:
    """Everything that a whole cluster needs, once per folder. clients: name → subject."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    authority = Authority(folder)
    Authority(folder, "front-proxy-ca").certificate("front-proxy-client", "/CN=front-proxy-client", "clientAuth")
    authority.certificate("apiserver", "/CN=kube-apiserver", "serverAuth", server_names)
    authority.certificate("kubelet-server", clients["kubelet"], "serverAuth", kubelet_names)
    for name, subject in clients.items():
        authority.certificate(name, subject, "clientAuth")
    service_account_keys(folder)
    (folder / "done").touch()


def kubeconfig(folder: Path, name: str, server: str) -> str:
    """A kubeconfig that names the certificate files (JSON is YAML)."""
    user = {"client-certificate": f"{folder}/{name}.crt", "client-key": f"{folder}/{name}.key"}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "clusters": [{"name": "lab", "cluster": {"server": server, "certificate-authority": f"{folder}/ca.crt"}}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": name}}],
    }
    return json.dumps(content, indent=1)
