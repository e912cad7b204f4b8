"""The cluster's part of `nemo-rl doctor`: context, definition and its version, operator, rights, storage, images."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import Any

from nemo_rl.backends.kubernetes.connect import INSTALL, INSTALL_CRD, Cluster, connect, may
from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError
from nemo_rl.backends.kubernetes.installation import installation
from nemo_rl.cli.checks import Check
from nemo_rl.job import names

PYTHON = ".".join(platform.python_version_tuple()[:2])

_SECONDS = 5.0
_OPERATOR_LABEL = "app.kubernetes.io/name=nemo-rl-operator"
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_RIGHTS = (
    ("create", names.PLURAL, names.GROUP, "", "submit jobs"),
    ("patch", names.PLURAL, names.GROUP, "", "submit, cancel and fetch jobs"),
    ("watch", names.PLURAL, names.GROUP, "", "follow jobs"),
    ("delete", names.PLURAL, names.GROUP, "", "delete jobs"),
    ("create", "configmaps", "", "", "ship code and data"),
    ("list", "pods", "", "", "find the pods of a job"),
    ("get", "pods", "", "log", "read logs"),
    ("get", "pods", "", "portforward", "fetch results"),
    ("create", "pods", "", "portforward", "fetch results from newer clusters"),
)


def cluster_checks(namespace: str | None = None) -> list[Check]:
    """The checks, as far as they can be made; those after one that fails may be left out."""
    try:
        cluster = connect(namespace)
        version = cluster.request("GET", "/version", timeout=_SECONDS)
    except ClusterError as error:
        return [Check("bad", "cluster", str(error), "kubectl config get-contexts; train here with backend='local'")]
    found = f"context {cluster.context}, namespace {cluster.namespace}, Kubernetes {version.get('gitVersion', '?')}"
    return [Check("good", "cluster", found), *_all(cluster)]


def _all(cluster: Cluster) -> Iterator[Check]:
    for subject, check in (
        ("definition", _definition),
        ("operator", _operator),
        ("versions", _versions),
        ("rights", _rights),
        ("storage", _storage),
    ):
        try:
            yield check(cluster)
        except ApiError as error:
            yield Check("absent", subject, f"cannot be read ({error.code}); ask the cluster's administrator")
        except ClusterError as error:
            yield Check("bad", subject, str(error))


def _definition(cluster: Cluster) -> Check:
    try:
        crd = _get(cluster, f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{names.CRD_NAME}")
    except ApiError as error:
        if error.code == 403:
            _get(cluster, f"/apis/{names.API_VERSION}")
            return Check("good", "definition", f"{names.CRD_NAME} is served (its content may not be read)")
        if error.code == 404:
            return Check("bad", "definition", f"{names.CRD_NAME} is not there", INSTALL)
        raise
    from nemo_rl.job.crd import crd as ours

    versions = {v["name"]: v for v in crd["spec"]["versions"]}
    if names.VERSION not in versions or not versions[names.VERSION].get("served"):
        return Check("bad", "definition", f"serves {', '.join(versions)}, not {names.VERSION}", INSTALL_CRD)
    there, here = (_spec_fields(v) for v in (versions[names.VERSION], ours()["spec"]["versions"][0]))
    if missing := sorted(here - there):
        text = f"is older than this client: it lacks {', '.join(missing[:4])}"
        return Check("bad", "definition", text, f"{INSTALL_CRD}, then upgrade the operator")
    return Check("good", "definition", f"{names.CRD_NAME} {names.VERSION}")


def _spec_fields(version: dict[str, Any], path: str = "spec") -> set[str]:
    """Dotted names of all fields of the specification."""
    root = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    found: set[str] = set()

    def walk(schema: dict[str, Any], path: str) -> None:
        for name, child in (schema.get("properties") or {}).items():
            found.add(f"{path}.{name}")
            walk(child, f"{path}.{name}")

    walk(root, path)
    return found


def _operator(cluster: Cluster) -> Check:
    deployments = _get(cluster, f"/apis/apps/v1/deployments?labelSelector={_OPERATOR_LABEL}")["items"]
    if not deployments:
        return Check("bad", "operator", "no Deployment of it is there; jobs would wait for ever", INSTALL)
    one = deployments[0]
    where = f"{one['metadata']['namespace']}/{one['metadata']['name']}"
    images = ", ".join(c["image"] for c in one["spec"]["template"]["spec"]["containers"])
    if not one.get("status", {}).get("readyReplicas"):
        cure = f"kubectl -n {one['metadata']['namespace']} describe deployment {one['metadata']['name']}"
        return Check("bad", "operator", f"{where} ({images}) is not ready", cure)
    return Check("good", "operator", f"{where} is ready ({images})")


def _versions(cluster: Cluster) -> Check:
    """Of the installation and its trainer image, beside those here."""
    there, here = installation(cluster), importlib.metadata.version("nemo-rl")
    if not there.version:
        where = f"ConfigMap {names.INFO_CONFIG_MAP} in {names.SYSTEM_NAMESPACE}"
        cure = (
            f"if the operator lives in another namespace, set {names.SYSTEM_NAMESPACE_VARIABLE}; else upgrade its chart"
        )
        return Check("absent", "versions", f"not told: there is no {where}", cure)
    found = (
        f"operator {there.version}, trainer image {there.trainer_image} (Python {there.trainer_python or 'not told'})"
    )
    if there.version != here:
        return Check(
            "bad",
            "versions",
            f"{found}; here is {here}",
            f"install version {there.version} here from its sources, or upgrade the chart",
        )
    if there.trainer_python and there.trainer_python != PYTHON:
        text = f"{found}; here is Python {PYTHON}: rewards travel as source, but not those that only a pickle can hold"
        return Check("absent", "versions", text, f"use Python {there.trainer_python} here to ship any reward")
    return Check("good", "versions", found)


def _rights(cluster: Cluster) -> Check:
    lacking = [
        (f"{verb} {resource}{f'/{part}' if part else ''}", purpose)
        for verb, resource, group, part, purpose in _RIGHTS
        if not may(cluster, verb, resource, group, part, timeout=_SECONDS)
    ]
    if lacking:
        text = "; ".join(f"no {right} (to {purpose})" for right, purpose in lacking)
        return Check("bad", "rights", f"in {cluster.namespace}: {text}", "ask the administrator for the role of users")
    return Check("good", "rights", f"submit, follow, stop and fetch jobs in {cluster.namespace}")


def _storage(cluster: Cluster) -> Check:
    classes = _get(cluster, "/apis/storage.k8s.io/v1/storageclasses")["items"]
    defaults = [
        c["metadata"]["name"] for c in classes if (c["metadata"].get("annotations") or {}).get(_DEFAULT_CLASS) == "true"
    ]
    if defaults:
        return Check("good", "storage", f"default StorageClass {defaults[0]}")
    others = ", ".join(c["metadata"]["name"] for c in classes) or "none"
    cure = "give storage_class_name=… or claim=…, or mark one as default with the annotation " + _DEFAULT_CLASS
    return Check("absent", "storage", f"no default StorageClass (found {others})", cure)


def _get(cluster: Cluster, path: str) -> Any:
    return cluster.request("GET", path, timeout=_SECONDS)
