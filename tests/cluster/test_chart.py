"""The chart against a real API server: what it renders is accepted, its rights suffice and no more, its policy speaks."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from charts import CHART, ROOT, Object, helm, render
from cluster.api import eventually
from cluster.manifests import bundle, job
from cluster.operator_process import Operator
from cluster.releases import remove_release
from cluster.scene import Scene
from cluster.server import Cluster
from nemo_rl.job import names

DIGEST = "sha256:" + "0" * 64
COMBINATIONS: dict[str, Object] = {
    "as it comes": {},
    "some namespaces": {"watchNamespaces": ["NAMESPACE"]},
    "without definition and roles": {"crds": {"enabled": False}, "userRoles": {"create": False}},
    "roles of another name": {"userRoles": {"prefix": "ml", "aggregate": False}},
    "images by digest": {
        "image": {"repository": "registry.example.com:5000/ml/op", "digest": DIGEST, "pullPolicy": "Always"},
        "trainerImage": {"repository": "registry.example.com:5000/ml/trainer", "digest": DIGEST},
        "imagePullSecrets": [{"name": "regcred"}],
    },
    "monitoring": {
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "podMonitor": {"enabled": True, "interval": "1m"},
            "rules": {"enabled": True, "stalledMinutes": 5},
            "dashboard": {"enabled": True, "annotations": {"grafana_folder": "ML"}},
        }
    },
    "monitoring of some namespaces": {
        "watchNamespaces": ["NAMESPACE"],
        "metrics": {"service": False, "podMonitor": {"enabled": True}},
    },
    "images of two registries": {"admissionPolicy": {"allowedImages": ["ghcr.io/acme/", "registry.example.com/"]}},
    "policy of Secrets alone": {"admissionPolicy": {"denyLatest": False}},
    "policy that allows what it may": {
        "admissionPolicy": {
            "allowedServiceAccounts": ["trainer"],
            "allowedClaims": ["*"],
            "allowedPriorityClasses": ["training-*"],
            "allowedTolerations": ["nvidia.com/*"],
            "allowedLabels": ["*"],
            "allowedAnnotations": ["example.com/note"],
            "allowedNodeSelectors": ["gpu"],
            "allowedSchedulers": ["kai-scheduler"],
            "allowedResources": ["rdma/hca", "nvidia.com/mig-*"],
            "allowedRuntimeClasses": ["nvidia"],
            "allowedResourceClaimTemplates": ["gpus-*"],
            "allowedVolumes": ["configMap", "secret", "persistentVolumeClaim", "emptyDir", "image"],
            "allowedCapabilities": ["IPC_LOCK"],
            "hostNetwork": True,
            "allowedHubOwners": ["acme", "acme-*"],
            "deniedEnvironment": [],
            "antiAffinityToOtherNamespaces": True,
        }
    },
    "policy of images alone": {
        "admissionPolicy": {"denyLatest": False, "secretsMustBeReadable": False, "allowedImages": ["a/"]}
    },
    "no policy": {"admissionPolicy": {"enabled": False}},
    "network policies": {
        "networkPolicy": {
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
            "trainers": {
                "dns": [{"ipBlock": {"cidr": "169.254.20.10/32"}}],
                "publicHttps": False,
                "extraEgress": [{"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 3128}]}],
            },
        }
    },
    "no network policies": {"networkPolicy": {"operator": False, "trainers": {"enabled": False}}},
    "priority": {
        "priorityClassName": "system-cluster-critical",
        "priorityClasses": [
            {"name": "training-low", "value": -10, "preemptionPolicy": "Never", "description": "Night work."},
            {"name": "training-high", "value": 1000000},
        ],
    },
    "placement": {
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "system", "effect": "NoSchedule"}],
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "DoesNotExist"}]}]
                }
            }
        },
        "podLabels": {"team": "ml"},
        "podAnnotations": {"example.org/note": "x"},
        "serviceAccount": {"name": "operator", "annotations": {"example.org/role": "x"}},
    },
    "the test alone": {
        "tests": {"train": False, "trainSeconds": 60, "namespace": "NAMESPACE", "storageClassName": "fast"},
        "operator": {"workers": 4, "resyncSeconds": 60, "logFormat": "text", "logLevel": "debug"},
        "fullnameOverride": "trainer-operator",
    },
}


@pytest.fixture(scope="module", autouse=True)
def monitoring_definitions(cluster: Cluster) -> Iterator[None]:
    """The least definitions of the kinds of the Prometheus operator, so that the API server knows them."""
    plurals = {"ServiceMonitor": "servicemonitors", "PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}
    for kind, plural in plurals.items():
        schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
        spec = {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version],
        }
        manifest = {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.monitoring.coreos.com"},
            "spec": spec,
        }
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))
    for plural in plurals.values():
        definition = f"crd/{plural}.monitoring.coreos.com"
        cluster.kubectl("wait", "--for=condition=Established", definition, "--timeout=60s")
    yield
    for plural in plurals.values():
        cluster.kubectl("delete", "crd", f"{plural}.monitoring.coreos.com", "--ignore-not-found")


@pytest.fixture
def install(cluster: Cluster, scene: Scene) -> Iterator[Callable[..., list[Object]]]:
    """Renders the chart into the scene's namespace and applies it; takes it away again, but for the definition."""
    made: list[Object] = []

    def apply(values: Object) -> list[Object]:
        values = {"crds": {"enabled": False}, "userRoles": {"prefix": scene.namespace, "aggregate": False}} | values
        objects = render(values, release="rl", namespace=scene.namespace)
        cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))
        made.extend(objects)
        return objects

    yield apply
    remove_release(cluster, made)


@pytest.fixture(scope="module")
def plurals(cluster: Cluster) -> dict[tuple[str, str], str]:
    """(apiVersion, kind) of all that the API server serves → plural, as it says itself."""
    groups = cluster.api.request("GET", "/apis")["groups"]
    versions = ["v1", *(v["groupVersion"] for group in groups for v in group["versions"])]
    found = {}
    for version in versions:
        for resource in cluster.api.request("GET", prefix_of(version))["resources"]:
            if "/" not in resource["name"]:
                found[version, resource["kind"]] = resource["name"]
    return found


def prefix_of(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


@pytest.fixture(scope="module")
def stage(new_scene: Callable[[str], Scene]) -> Iterator[Scene]:
    """A namespace with the accounts that dry pods need."""
    made = new_scene("chart")
    for name in ("rl-test", "trainer-operator-test"):
        made.api.create("serviceaccounts", made.namespace, {"metadata": {"name": name}})
    yield made
    made.close()


@pytest.mark.parametrize("what", COMBINATIONS)
def test_the_api_server_takes_what_the_chart_renders(
    what: str, stage: Scene, cluster: Cluster, plurals: dict[tuple[str, str], str]
):
    """As `kubectl apply --server-side --dry-run=server --validate=strict` would ask it, object by object."""
    values = json.loads(json.dumps(COMBINATIONS[what]).replace("NAMESPACE", stage.namespace))
    objects = render(values, namespace=stage.namespace, hooks=True)
    assert len(objects) > 15
    for found in objects:
        plural = plurals[found["apiVersion"], found["kind"]]
        meta = found["metadata"]
        place = f"/namespaces/{meta['namespace']}" if "namespace" in meta else ""
        query = "?dryRun=All&fieldManager=test&force=true&fieldValidation=Strict"
        path = f"{prefix_of(found['apiVersion'])}{place}/{plural}/{meta['name']}{query}"
        body = json.dumps(found).encode()
        answer = cluster.api.request("PATCH", path, body, "application/apply-patch+yaml")
        assert answer["metadata"]["name"] == meta["name"]


def test_the_notes_name_what_is_there(scene: Scene, cluster: Cluster):
    values = {"crds": {"enabled": False}}
    words = ("install", "rl", str(CHART), "--dry-run=server", "--namespace", scene.namespace)
    result = helm(*words, values=values, kubeconfig=cluster.kubeconfig)
    assert result.returncode == 0, result.stderr
    notes = result.stdout.split("NOTES:\n", 1)[1]
    assert notes.count("\n     kubectl ") == 3
    assert f"kubectl -n {scene.namespace} rollout status deployment/rl" in notes
    assert "--clusterrole=nemo-rl-edit" in notes
    assert "NetworkPolicy" not in notes, "each job has one by default"
    assert "was not installed (crds.enabled=false)" in notes


def test_the_api_server_takes_the_kustomize_base(cluster: Cluster):
    namespace = "nemo-rl-system"
    cluster.kubectl("create", "namespace", namespace)
    try:
        words = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
        out = cluster.kubectl(*words, "-k", str(ROOT / "deploy" / "base"))
    finally:
        cluster.kubectl("delete", "namespace", namespace, "--wait=false")
    for what in ("deployment.apps/nemo-rl-operator", "customresourcedefinition", "clusterrole", "networkpolicy"):
        assert what in out


def test_uninstalling_keeps_the_definition_and_all_jobs(scene: Scene, cluster: Cluster):
    values = {"userRoles": {"prefix": scene.namespace, "aggregate": False}, "watchNamespaces": [scene.namespace]}
    there = ("--namespace", scene.namespace)
    # the definition is there already, made by kubectl
    refused = helm("install", "rl", str(CHART), *there, values=values, kubeconfig=cluster.kubeconfig)
    assert "invalid ownership metadata" in refused.stderr
    owned = ("install", "rl", str(CHART), *there, "--take-ownership")
    installed = helm(*owned, values=values, kubeconfig=cluster.kubeconfig)
    assert installed.returncode == 0, installed.stderr
    uid = scene.submit()["metadata"]["uid"]
    removed = helm("uninstall", "rl", *there, kubeconfig=cluster.kubeconfig)
    assert removed.returncode == 0, removed.stderr
    assert "kept due to the resource policy" in removed.stdout + removed.stderr
    assert scene.job()["metadata"]["uid"] == uid
    assert scene.api.find("serviceaccounts", scene.namespace, "rl") is None


def test_the_rights_of_helms_test_are_gone_when_it_has_ended(scene: Scene, cluster: Cluster):
    """Also after one that failed. The pod's end is played; what it does is tried in tests/e2e."""
    there = ("--namespace", scene.namespace)
    values = {
        "fullnameOverride": scene.namespace,
        "crds": {"enabled": False},
        "userRoles": {"create": False},
        "watchNamespaces": [scene.namespace],
    }
    installed = helm("install", "rl", str(CHART), *there, values=values, kubeconfig=cluster.kubeconfig)
    assert installed.returncode == 0, installed.stderr
    account = f"{scene.namespace}-test"
    subject = f"--as=system:serviceaccount:{scene.namespace}:{account}"

    def left() -> list[str]:
        kinds = "serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings"
        found = scene.kubectl("get", kinds, "-l", "app.kubernetes.io/component=test", "-o", "name").split()
        return [name for name in found if scene.namespace in name]

    assert left() == []
    for phase in ("Succeeded", "Failed"):
        ended: list[subprocess.CompletedProcess[str]] = []
        thread = threading.Thread(
            target=lambda ended=ended: ended.append(helm("test", "rl", *there, kubeconfig=cluster.kubeconfig))
        )
        thread.start()

        def fresh() -> bool:
            pod = scene.api.find("pods", scene.namespace, account)
            return pod is not None and "phase" in pod["status"] and pod["status"]["phase"] == "Pending"

        eventually(fresh, "the test's pod", 60)
        eventually(
            lambda: "yes" in scene.kubectl("auth", "can-i", subject, "create", names.CRD_NAME, check=False),
            "its rights",
        )
        scene.api.patch("pods", scene.namespace, account, {"status": {"phase": phase}}, "status")
        thread.join(60)
        assert ended[0].returncode == (0 if phase == "Succeeded" else 1), ended[0].stderr + ended[0].stdout
        eventually(lambda: left() == [], "nothing is left but the pod with its log")
        eventually(
            lambda: "no" in scene.kubectl("auth", "can-i", subject, "create", names.CRD_NAME, check=False), "no right"
        )
        assert scene.api.find("pods", scene.namespace, account)
    removed = helm("uninstall", "rl", *there, kubeconfig=cluster.kubeconfig)
    assert removed.returncode == 0, removed.stderr


def test_the_rights_of_the_chart_suffice_for_the_life_of_jobs(
    scene: Scene,
    cluster: Cluster,
    install: Callable[..., list[Object]],
    own_operator: Callable[..., Operator],
    tmp_path: Path,
):
    install({"watchNamespaces": [scene.namespace]})
    operator = own_operator(scene.namespace, account_kubeconfig(cluster, scene, "rl", tmp_path)).start().wait_ready()

    later = (datetime.now(UTC) + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    scene.submit("nodes", resources={"nodes": 2}, output={"serveUntil": later})
    for index in (0, 1):
        scene.attempt(1, "nodes", index).run()
    scene.phase("Running", name="nodes")
    eventually(lambda: scene.api.find("pods", scene.namespace, "nodes-files"), "the pod that serves the output")
    scene.change("nodes", suspend=True)
    scene.phase("Suspended", name="nodes")

    scene.submit("shipped", bundles=[bundle("code", 1)], ttlSecondsAfterFinished=0)
    scene.message("bundle", name="shipped")
    part = {"metadata": {"name": "code-part-0"}, "binaryData": {"part": "eA=="}}
    scene.api.create("configmaps", scene.namespace, part)
    scene.attempt(1, "shipped").run().exit(0, json.dumps({"kind": "result", "totalSteps": 1}))
    scene.gone(names.PLURAL, "shipped")

    scene.api.create(
        "persistentvolumeclaims",
        scene.namespace,
        {
            "metadata": {"name": "taken-output"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
        },
    )
    scene.submit("taken")
    scene.message("does not belong to this job", name="taken")
    scene.submit("queued", job_labels={names.LABEL_QUEUE: "team"})
    scene.phase("Queued", name="queued")
    scene.submit("waiting")
    scene.attempt(1, "waiting").unschedulable("0/1 nodes are available: 1 Insufficient cpu.")
    scene.message("cpu", name="waiting")

    eventually(lambda: scene.events("nodes"), "Events about the job")
    forbidden = {name for name, count in operator.metrics().items() if 'code="403"' in name and count}
    assert forbidden == set(), operator.tail()
    assert "orbidden" not in operator.log.read_text()


def account_kubeconfig(cluster: Cluster, scene: Scene, account: str, folder: Path) -> Path:
    """A kubeconfig with a token of a service account of the scene's namespace, and nothing else."""
    content = copy.deepcopy(yaml.safe_load(cluster.kubeconfig.read_text()))
    token = scene.kubectl("create", "token", account).strip()
    content["users"] = [{"name": user["name"], "user": {"token": token}} for user in content["users"]]
    found = folder / f"{account}.kubeconfig"
    found.write_text(yaml.safe_dump(content))
    return found


def test_the_operator_may_not_read_secrets_or_run_commands(scene: Scene, install: Callable[..., list[Object]]):
    install({})
    account = f"--as=system:serviceaccount:{scene.namespace}:rl"

    def may(verb: str, resource: str, part: str = "") -> bool:
        words = ["auth", "can-i", verb, resource, account] + ([f"--subresource={part}"] if part else [])
        return scene.kubectl(*words, check=False).strip().splitlines()[-1] == "yes"

    eventually(lambda: may("create", "jobs.batch"), "the operator has its rights")
    for verb, resource, part in (
        ("get", "secrets", ""),
        ("list", "secrets", ""),
        ("create", "pods", "exec"),
        ("create", "pods", "portforward"),
        ("create", "rltrainingjobs.nemo-rl.io", ""),
        ("update", "rltrainingjobs.nemo-rl.io", ""),
        ("delete", "persistentvolumeclaims", ""),
        ("create", "serviceaccounts", "token"),
        ("get", "nodes", ""),
    ):
        assert not may(verb, resource, part), (verb, resource, part)


def bind(scene: Scene, user: str, role: str) -> None:
    scene.kubectl(
        "create", "rolebinding", f"{user}-{role.rpartition('-')[2]}", f"--clusterrole={role}", f"--user={user}"
    )


def test_editors_submit_and_viewers_only_look(scene: Scene, install: Callable[..., list[Object]]):
    install({})
    bind(scene, "alice", f"{scene.namespace}-edit")
    bind(scene, "victor", f"{scene.namespace}-view")
    manifest = yaml.safe_dump(job("x"))
    eventually(
        lambda: "created" in scene.kubectl("create", "--as=alice", "-f", "-", stdin=manifest, check=False),
        "an editor submits a job",
    )
    assert "x" in scene.kubectl("get", "rlj", "--as=victor")
    refused = scene.kubectl("create", "--as=victor", "-f", "-", stdin=yaml.safe_dump(job("other")), check=False)
    assert "cannot create resource" in refused
    assert "cannot delete" in scene.kubectl("delete", "rlj", "x", "--as=victor", check=False)
    assert "deleted" in scene.kubectl("delete", "rlj", "x", "--as=alice")


def test_an_editor_has_the_rights_that_the_client_asks_for(scene: Scene, install: Callable[..., list[Object]]):
    from nemo_rl.cli.cluster_checks import _RIGHTS

    install({})
    bind(scene, "alice", f"{scene.namespace}-edit")
    for verb, resource, group, part, purpose in _RIGHTS:
        what = f"{resource}.{group}" if group else resource
        words = ["auth", "can-i", verb, what, "--as=alice"] + ([f"--subresource={part}"] if part else [])
        eventually(lambda w=words: "yes" in scene.kubectl(*w, check=False), f"an editor may {verb} {what} to {purpose}")


POLICY: list[tuple[str, Object, str]] = [
    (
        "an image of elsewhere",
        {"image": "docker.io/evil/miner:1"},
        "spec.image is docker.io/evil/miner:1; this cluster runs images that begin with registry.example.com/ml/, "
        "ghcr.io/acme/ only: use one of those, or leave spec.image out for the default",
    ),
    (
        "a moving tag",
        {"image": "ghcr.io/acme/trainer:latest"},
        "spec.image is ghcr.io/acme/trainer:latest, which may be another image tomorrow; name a fixed tag or a digest",
    ),
    ("no tag", {"image": "registry.example.com/ml/trainer"}, "which may be another image tomorrow"),
    (
        "a variable of a Secret",
        {"env": [{"name": "T", "valueFrom": {"secretKeyRef": {"name": "theirs", "key": "k"}}}]},
        "alice may not read the Secrets named in the job (theirs) in namespace NAMESPACE; ask for the right to get them",
    ),
    (
        "all variables of a Secret",
        {"envFrom": [{"secretRef": {"name": "theirs"}}]},
        "alice may not read the Secrets named in the job (theirs)",
    ),
    (
        "a readable and an unreadable one",
        {"envFrom": [{"secretRef": {"name": "mine"}}, {"secretRef": {"name": "theirs"}}]},
        "alice may not read all of the Secrets named in the job (mine, theirs) in namespace NAMESPACE",
    ),
    (
        "a pull secret",
        {"imagePullSecrets": [{"name": "theirs"}]},
        "alice may not read the Secrets named in the job (theirs)",
    ),
    (
        "a device that is not on the list",
        {"resources": {"extra": {"rdma/hca": 1, "vendor.example/fpga": 1}}},
        "this cluster allows nvidia.com/gpu, rdma/*, amd.com/gpu (admissionPolicy.allowedResources of the chart)",
    ),
    (
        "a runtime class that is not on the list",
        {"runtimeClassName": "nvidia-legacy"},
        "spec.runtimeClassName is nvidia-legacy; this cluster allows nvidia (admissionPolicy.allowedRuntimeClasses",
    ),
    (
        "a template that is not on the list",
        {"resources": {"claims": [{"template": "gpus-2"}, {"template": "everything"}]}},
        "spec.resources.claims names the templates gpus-2, everything; this cluster allows gpus-* (admissionPolicy",
    ),
    (
        "a kind of volume that is not on the list",
        {"volumes": [{"name": "a", "emptyDir": {}}]},
        "spec.volumes has volumes of the kinds emptyDir; this cluster allows configMap, secret, persistentVolumeClaim, image",
    ),
    (
        "a Secret as a volume",
        {"volumes": [{"name": "a", "secret": {"secretName": "theirs"}}]},
        "alice may not read the Secrets named in the job (theirs)",
    ),
    (
        "a claim as a volume",
        {"volumes": [{"name": "a", "persistentVolumeClaim": {"claimName": "home-of-bob", "readOnly": False}}]},
        "the job names the claims home-of-bob; this cluster allows hub-*, shared-* (admissionPolicy.allowedClaims",
    ),
    (
        "an image of elsewhere as a volume",
        {"volumes": [{"name": "a", "image": {"reference": "docker.io/evil/weights:1"}}]},
        "spec.volumes mounts the images docker.io/evil/weights:1; name fixed tags or digests of images that begin with "
        "registry.example.com/ml/, ghcr.io/acme/",
    ),
    (
        "a moving image as a volume",
        {"volumes": [{"name": "a", "image": {"reference": "ghcr.io/acme/weights:latest"}}]},
        "spec.volumes mounts the images ghcr.io/acme/weights:latest; name fixed tags or digests",
    ),
]
ALLOWED: list[Object] = [
    {},
    {"image": "ghcr.io/acme/trainer:1.2"},
    {"image": f"registry.example.com/ml/trainer@{DIGEST}"},
    {"env": [{"name": "A", "value": "b"}, {"name": "T", "valueFrom": {"secretKeyRef": {"name": "mine", "key": "k"}}}]},
    {"resources": {"gpuResource": "amd.com/gpu", "gpusPerNode": 8, "extra": {"rdma/hca": 1, "rdma/roce": 2}}},
    {"runtimeClassName": "nvidia", "topologySpreadConstraints": [{"topologyKey": "kubernetes.io/hostname"}]},
    {
        "resources": {"gpusPerNode": 2, "claims": [{"template": "gpus-2", "gpus": True}]},
        "capabilities": ["IPC_LOCK"],
        "hostNetwork": True,
    },
    {
        "volumes": [
            {"name": "a", "secret": {"secretName": "mine"}},
            {"name": "b", "configMap": {"name": "any"}},
            {"name": "c", "persistentVolumeClaim": {"claimName": "shared-rows"}},
            {"name": "d", "image": {"reference": "ghcr.io/acme/weights:2"}},
        ]
    },
]


def test_the_admission_policy_refuses_in_words_and_lets_the_rest_pass(
    scene: Scene, install: Callable[..., list[Object]]
):
    lists = {"allowedResources": ["rdma/*", "amd.com/gpu"], "allowedRuntimeClasses": ["nvidia"]}
    lists |= {"allowedResourceClaimTemplates": ["gpus-*"], "allowedCapabilities": ["IPC_LOCK"], "hostNetwork": True}
    lists |= {"allowedVolumes": ["configMap", "secret", "persistentVolumeClaim", "image"]}
    install({"admissionPolicy": {"allowedImages": ["registry.example.com/ml/", "ghcr.io/acme/"], **lists}})
    bind(scene, "alice", f"{scene.namespace}-edit")
    scene.kubectl("create", "role", "mine", "--verb=get", "--resource=secrets", "--resource-name=mine")
    scene.kubectl("create", "rolebinding", "alice-mine", "--role=mine", "--user=alice")

    def submit(spec: Object) -> str:
        manifest = yaml.safe_dump(job("x", **spec))
        return scene.kubectl("create", "--as=alice", "--dry-run=server", "-f", "-", stdin=manifest, check=False)

    # a new policy is enforced a moment after it is made
    eventually(lambda: "evil" in submit(POLICY[0][1]), "the policy is in force")
    for what, spec, words in POLICY:
        assert words.replace("NAMESPACE", scene.namespace) in submit(spec), what
    for spec in ALLOWED:
        assert "created (server dry run)" in submit(spec), spec


def test_the_policy_of_some_namespaces_leaves_the_others_alone(scene: Scene, install: Callable[..., list[Object]]):
    install({"watchNamespaces": [scene.namespace], "admissionPolicy": {"allowedImages": ["ghcr.io/acme/"]}})
    manifest = yaml.safe_dump(job("x", image="elsewhere/trainer:1"))
    words = ("create", "--dry-run=server", "-f", "-")
    eventually(
        lambda: "this cluster runs images" in scene.kubectl(*words, stdin=manifest, check=False),
        "the policy is in force",
    )
    assert "created" in scene._kubectl("-n", "default", *words, stdin=manifest)


def test_the_default_service_account_of_trainers_needs_no_rights(cluster: Cluster):
    """The chart gives trainer pods nothing: no role of it names a service account but the operator's and the test's."""
    text = "\n".join(path.read_text() for path in sorted((CHART / "templates").rglob("*.yaml")))
    subjects = re.findall(r"subjects: (.*)", text)
    assert subjects
    assert set(subjects) == {"[{{ toJson $subject }}]"}, textwrap.shorten(text, 200)
    assert "kind: RoleBinding" in text
