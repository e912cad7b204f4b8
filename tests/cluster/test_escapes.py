"""What a user who holds nemo-rl-edit in a namespace, and nothing else, tries to get at more; he gets none of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from charts import Object
from cluster.api import eventually
from cluster.manifests import job
from cluster.operator_process import Operator
from cluster.scene import USER, Scene
from nemo_rl.job import names


def network_of(objects: list[Object]) -> str:
    """What the chart tells the operator of the network."""
    (deployment,) = [o for o in objects if o["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return str(next(e["value"] for e in container["env"] if e["name"] == names.NETWORK_VARIABLE))


AFFINITY = {
    "podAntiAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {}, "namespaceSelector": {}}
        ]
    }
}
SUBMITTED: dict[str, tuple[Object, str]] = {
    "another's output claim": ({"output": {"claim": "victim-output"}}, "admissionPolicy.allowedClaims"),
    "a database's claim as cache": ({"cache": {"claim": "postgres-data-0"}}, "admissionPolicy.allowedClaims"),
    "another's claim as model": ({"model": "pvc://home-of-bob/model"}, "admissionPolicy.allowedClaims"),
    "another's claim as data": (
        {"dataset": {"inline": None, "path": "pvc://bob/rows.jsonl"}},
        "admissionPolicy.allowedClaims",
    ),
    "a service account with rights of a cloud": (
        {"serviceAccountName": "cloud-admin"},
        "admissionPolicy.allowedServiceAccounts",
    ),
    "a priority of the system": (
        {"priorityClassName": "system-node-critical"},
        "admissionPolicy.allowedPriorityClasses",
    ),
    "all taints": ({"tolerations": [{"operator": "Exists"}]}, "admissionPolicy.allowedTolerations"),
    "the taint of the control plane": (
        {"tolerations": [{"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}]},
        "admissionPolicy.allowedTolerations",
    ),
    "nodes of the control plane": (
        {"nodeSelector": {"node-role.kubernetes.io/control-plane": ""}},
        "admissionPolicy.allowedNodeSelectors",
    ),
    "another scheduler": ({"schedulerName": "mine"}, "admissionPolicy.allowedSchedulers"),
    "a device that is not for all": (
        {"resources": {"extra": {"rdma/hca": 1}}},
        "spec.resources asks for nvidia.com/gpu, rdma/hca; this cluster allows nvidia.com/gpu (admissionPolicy.allowedResources",
    ),
    "a device in place of GPUs": (
        {"resources": {"gpuResource": "smarter-devices/fuse", "gpusPerNode": 1}},
        "admissionPolicy.allowedResources",
    ),
    "a runtime of its own": (
        {"runtimeClassName": "privileged-vm"},
        "spec.runtimeClassName is privileged-vm; this cluster allows none (admissionPolicy.allowedRuntimeClasses",
    ),
    "devices by a template of others": (
        {"resources": {"claims": [{"template": "all-gpus"}]}},
        "spec.resources.claims names the templates all-gpus; this cluster allows none "
        "(admissionPolicy.allowedResourceClaimTemplates",
    ),
    "another's Secret as a file": (
        {"volumes": [{"name": "a", "secret": {"secretName": "victims"}}]},
        "may not read",
    ),
    **{
        f"a volume of the kind {next(iter(kind))}": (
            {"volumes": [{"name": "a", **kind}]},
            f"spec.volumes has volumes of the kinds {next(iter(kind))}; this cluster allows none (admissionPolicy.allowedVolumes",
        )
        for kind in (
            {"configMap": {"name": "kube-root-ca.crt"}},
            {"persistentVolumeClaim": {"claimName": "shared-rows"}},
            {"emptyDir": {"medium": "Memory"}},
            {"image": {"reference": "registry.example.com/weights:1"}},
        )
    },
    "the nodes' file system": ({"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "hostPath"),
    "a capability": ({"capabilities": ["IPC_LOCK"]}, "admissionPolicy.allowedCapabilities"),
    "all capabilities": ({"capabilities": ["ALL"]}, "IPC_LOCK"),
    "the nodes' network": ({"hostNetwork": True}, "admissionPolicy.hostNetwork"),
    "a label of another's Service": ({"labels": {"app": "payments"}}, "admissionPolicy.allowedLabels"),
    "the labels of the operator": (
        {"labels": {"app.kubernetes.io/name": "nemo-rl-operator"}},
        "admissionPolicy.allowedLabels",
    ),
    "a label of another job": ({"labels": {names.LABEL_JOB_UID: "victim"}}, "nemo-rl.io/"),
    "an annotation of a cloud": (
        {"annotations": {"iam.amazonaws.com/role": "admin"}},
        "admissionPolicy.allowedAnnotations",
    ),
    "an annotation of a vault": (
        {"annotations": {"vault.hashicorp.com/agent-inject-secret-db": "db/creds/root"}},
        "admissionPolicy.allowedAnnotations",
    ),
    "an annotation of a mesh": (
        {"annotations": {"sidecar.istio.io/inject": "false"}},
        "admissionPolicy.allowedAnnotations",
    ),
    "distance from all others": ({"affinity": AFFINITY}, "admissionPolicy.antiAffinityToOtherNamespaces"),
    "a variable for the operator's side": (
        {"env": [{"name": "NEMO_RL_POD_ROOT", "value": "/"}]},
        "admissionPolicy.deniedEnvironment",
    ),
    "another's Secret": ({"envFrom": [{"secretRef": {"name": "victims"}}]}, "may not read"),
    "an image that moves": ({"image": "elsewhere/trainer:latest"}, "which may be another image tomorrow"),
}


def test_nothing_of_others_can_be_named_in_a_job(scene: Scene, release: list[Object]) -> None:
    def submit(spec: Object) -> str:
        manifest = yaml.safe_dump(job("evil", **spec))
        return scene.kubectl("create", f"--as={USER}", "--dry-run=server", "-f", "-", stdin=manifest, check=False)

    eventually(lambda: "allowedServiceAccounts" in submit({"serviceAccountName": "x"}), "the policy is in force")
    assert len(SUBMITTED) >= 23
    got = {}
    for what, (spec, words) in SUBMITTED.items():
        answer = submit(copy.deepcopy(spec))
        if words not in answer or "created" in answer:
            got[what] = answer
    assert not got, json.dumps(got, indent=1)
    mount = ("--verb=create", "--resource=persistentvolumeclaims/mount", "--resource-name=corpora")
    scene.kubectl("create", "role", "mount", *mount)
    scene.kubectl("create", "rolebinding", "mount", "--role=mount", f"--user={USER}")
    eventually(lambda: "created" in submit({"model": "pvc://corpora/m"}), "a claim that he may mount")
    for spec in ({}, {"labels": {"team": "a"}}, {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}):
        assert "created" in submit(spec), submit(spec)


CHANGED: dict[str, tuple[Object, str]] = {
    "a device": ({"extra": {"rdma/hca": 1}}, "admissionPolicy.allowedResources"),
    "another kind of GPU": ({"gpuResource": "smarter-devices/fuse"}, "admissionPolicy.allowedResources"),
    "a template": ({"claims": [{"template": "all-gpus"}]}, "admissionPolicy.allowedResourceClaimTemplates"),
}


def test_nothing_comes_into_a_job_by_a_change(scene: Scene, release: list[Object], operator: Operator) -> None:
    def change(name: str, patch: Object) -> str:
        words = ("patch", names.SHORT_NAME, name, f"--as={USER}", "--type=merge", "-p", json.dumps({"spec": patch}))
        return scene.kubectl(*words, check=False)

    refused = yaml.safe_dump(job("other", resources={"extra": {"rdma/hca": 1}}))
    ask = ("create", f"--as={USER}", "--dry-run=server", "-f", "-")
    eventually(lambda: "allowedResources" in scene.kubectl(*ask, stdin=refused, check=False), "the policy is in force")
    scene.secret("others", token="x")
    secret = {"secretKeyRef": {"name": "others", "key": "token"}}
    scene.submit("plain", suspend=True)
    scene.submit("secret", suspend=True, env=[{"name": "A", "valueFrom": secret}])
    for name in ("plain", "secret"):
        scene.phase("Suspended", name=name)
    for what, (resources, words) in CHANGED.items():
        answer = change("plain", {"resources": resources})
        assert words in answer, f"{what}: {answer}"
    assert "patched" in change("plain", {"resources": {"memory": "64Gi"}})
    more = change("secret", {"resources": {"memory": "64Gi"}})
    assert "may not read the Secrets named in the job (others)" in more, "a change is a new job's, by who makes it"
    assert "patched" in change("secret", {"backoffLimit": 5}), "what names nothing is asked of nobody"


@pytest.mark.parametrize("release", [{"admissionPolicy": {"allowedHubOwners": ["acme", "lab-*"]}}], indirect=True)
def test_results_go_to_those_owners_on_the_hub_that_the_chart_allows(scene: Scene, release: list[Object]) -> None:
    def submit(hub: str) -> str:
        manifest = yaml.safe_dump(job("mine", output={"hub": hub}))
        return scene.kubectl("create", f"--as={USER}", "--dry-run=server", "-f", "-", stdin=manifest, check=False)

    refusal = (
        "spec.output.hub is eve/model; this cluster allows acme, lab-* (admissionPolicy.allowedHubOwners of the chart)"
    )
    eventually(lambda: refusal in submit("eve/model"), "the policy is in force")
    assert "acmee/model; this cluster allows" in submit("acmee/model")
    for allowed in ("acme/model", "lab-7/model"):
        assert "created" in submit(allowed)
    assert "spec.output.hub" in submit("no-owner")  # by the definition


VERBS: list[tuple[str, ...]] = [
    ("update", "configmaps"),
    ("patch", "configmaps"),
    ("delete", "configmaps"),
    ("get", "secrets"),
    ("create", "secrets"),
    ("create", "pods"),
    ("create", "pods", "--subresource=exec"),
    ("create", "jobs.batch"),
    ("update", "jobs.batch"),
    ("delete", "jobs.batch"),
    ("create", "services"),
    ("create", "endpointslices.discovery.k8s.io"),
    ("create", "networkpolicies.networking.k8s.io"),
    ("delete", "networkpolicies.networking.k8s.io"),
    ("create", "persistentvolumeclaims"),
    ("patch", "rltrainingjobs.nemo-rl.io", "--subresource=status"),
    ("create", "serviceaccounts", "--subresource=token"),
    ("create", "rolebindings.rbac.authorization.k8s.io"),
]


def test_the_role_of_users_has_no_right_to_what_is_the_operators(scene: Scene, release: list[Object]) -> None:
    ask = ("auth", "can-i", f"--as={USER}")
    eventually(lambda: "yes" in scene.kubectl(*ask, "create", "configmaps", check=False), "the role is in force")
    got = [words for words in VERBS if "yes" in scene.kubectl(*ask, *words, check=False).split()]
    assert not got


def test_a_frozen_job_made_beforehand_is_no_way_into_anothers_pods(
    scene: Scene, release: list[Object], operator: Operator
) -> None:
    """Of all that the role may, making ConfigMaps comes nearest: of the victim's name, with his job's uid as owner."""
    scene.submit("victim", suspend=True)
    scene.phase("Suspended", name="victim")
    found = scene.job("victim")
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": "victim", "uid": found["metadata"]["uid"]}
    spec = found["spec"] | {"reward": {"source": "def reward(prompt, response): return 1.0"}}
    forged = {
        "metadata": {"name": "victim", "namespace": scene.namespace, "uid": found["metadata"]["uid"]},
        "spec": spec,
    }
    meta = {"name": "victim-job", "ownerReferences": [owner | {"controller": True}]}
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"job.json": json.dumps(forged)}}
    made = scene.kubectl("create", f"--as={USER}", "-f", "-", stdin=json.dumps(body), check=False)
    assert "created" in made, made
    scene.change("victim", suspend=False)
    scene.message("ConfigMap victim-job exists with other content (spec.reward", name="victim")
    assert not scene.jobs("victim")


def test_each_job_has_a_network_policy_that_lets_in_its_own_pods_alone(
    scene: Scene, release: list[Object], own_operator: Callable[..., Operator]
) -> None:
    own_operator(scene.namespace, **{names.NETWORK_VARIABLE: network_of(release)}).start().wait_ready()
    scene.submit(resources={"nodes": 2})
    scene.attempt(1)
    uid = scene.job()["metadata"]["uid"]
    (policy,) = [
        p["spec"]
        for p in scene.api.request("GET", f"/apis/networking.k8s.io/v1/namespaces/{scene.namespace}/networkpolicies")[
            "items"
        ]
        if p["metadata"]["name"].startswith("x-net-")
    ]
    mine = {"matchLabels": {names.LABEL_JOB_UID: uid}}
    assert policy["podSelector"] == mine
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    first, progress = policy["ingress"]
    assert first == {"from": [{"podSelector": mine}]}
    assert [port["port"] for port in progress["ports"]] == [names.TRAINER_PORT]
    assert all("podSelector" in peer and "namespaceSelector" in peer for peer in progress["from"])
    assert all(rule.get("to") for rule in policy["egress"]), "no rule is open to everywhere"


def test_each_job_of_several_nodes_has_a_secret_that_the_operator_cannot_read(scene: Scene, operator: Operator) -> None:
    tokens: set[Any] = set()
    for name in ("one", "two"):
        scene.submit(name, resources={"nodes": 2})
        pod = scene.attempt(1, name)
        secret = names.run_secret(name, scene.job(name)["metadata"]["uid"])
        tokens.add(scene.api.get("secrets", scene.namespace, secret)["data"][names.TOKEN_KEY])
        volumes = scene.api.get("pods", scene.namespace, pod.name)["spec"]["volumes"]
        assert any(v.get("secret", {}).get("secretName") == secret for v in volumes)
    assert len(tokens) == 2
