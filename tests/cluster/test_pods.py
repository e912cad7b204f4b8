"""What the operator makes: Jobs, claims, Services and pods, in a namespace that enforces Pod Security `restricted`."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from cluster.api import Object, eventually
from cluster.manifests import result
from cluster.scene import Scene
from nemo_rl.job import names

pytestmark = pytest.mark.usefixtures("operator")


@pytest.fixture
def restricted(scene: Scene) -> Scene:
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    scene.api.patch("namespaces", None, scene.namespace, {"metadata": {"labels": labels}})
    return scene


def pod_spec(scene: Scene, **spec: Any) -> Object:
    scene.submit(**spec)
    return dict(scene.attempt(1).object["spec"])


def test_pods_are_admitted_as_restricted_and_hold_no_token(restricted: Scene) -> None:
    spec = pod_spec(restricted, output={"serveUntil": "2100-01-01T00:00:00Z"})
    assert spec["automountServiceAccountToken"] is False
    assert spec["restartPolicy"] == "Never"
    container = spec["containers"][0]
    assert container["name"] == names.TRAINER_CONTAINER
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert not [v for v in spec["volumes"] if "hostPath" in v]
    restricted.succeed()
    files = restricted.kubelet.named(restricted.namespace, names.files_pod("x"))
    assert files.object["spec"]["automountServiceAccountToken"] is False


def test_several_nodes_are_one_indexed_job_with_a_headless_service(scene: Scene) -> None:
    scene.submit(resources={"nodes": 2, "gpusPerNode": 4})
    pods = [scene.attempt(1, index=i) for i in (0, 1)]
    job = scene.api.get("jobs", scene.namespace, names.attempt_job("x", 1))["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 2, 2, 0)
    service = scene.api.get("services", scene.namespace, "x")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    for pod in pods:
        found = pod.object
        labels = found["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()
        assert found["spec"]["subdomain"] == "x"
        assert found["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    claim = scene.api.get("persistentvolumeclaims", scene.namespace, names.output_claim("x"))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    scene.until(lambda s: s["gpus"] == 8, "the number of GPUs is shown")


def test_one_node_needs_no_service_and_a_claim_of_one_writer(scene: Scene) -> None:
    spec = pod_spec(scene, output={"size": "7Gi", "storageClassName": "slow"})
    assert scene.api.find("services", scene.namespace, "x") is None
    claim = scene.api.get("persistentvolumeclaims", scene.namespace, names.output_claim("x"))["spec"]
    assert claim["accessModes"] == ["ReadWriteOnce"]
    assert claim["resources"]["requests"]["storage"] == "7Gi"
    assert claim["storageClassName"] == "slow"
    assert "nvidia.com/gpu" not in json.dumps(spec)


def test_existing_claim_is_used_and_none_is_made(scene: Scene) -> None:
    spec = pod_spec(scene, output={"claim": "mine"}, cache={"claim": "shared"})
    claims = {v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {"mine", "shared"}
    assert scene.api.find("persistentvolumeclaims", scene.namespace, names.output_claim("x")) is None


def test_resources_of_the_job_reach_the_pod(scene: Scene) -> None:
    spec = pod_spec(scene, resources={"cpu": "2", "memory": "3Gi", "gpusPerNode": 1, "sharedMemory": "512Mi"})
    asked = spec["containers"][0]["resources"]
    expected = {"cpu": "2", "memory": "3Gi", "nvidia.com/gpu": "1"}
    assert {key: asked["limits"][key] for key in expected} == expected
    assert asked["requests"]["memory"] == "3Gi"
    shared = next(v["emptyDir"] for v in spec["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory")
    assert shared["sizeLimit"] == "512Mi"


def test_devices_runtime_and_spread_reach_the_pods_of_each_attempt(scene: Scene) -> None:
    runtime = {"metadata": {"name": scene.namespace}, "handler": "nvidia"}
    scene.api.request("POST", "/apis/node.k8s.io/v1/runtimeclasses", runtime)
    try:
        spread = {"topologyKey": "example.com/rack", "maxSkew": 2, "minDomains": 3}
        scene.submit(
            resources={"nodes": 2, "gpusPerNode": 1, "gpuResource": "nvidia.com/mig-3g.40gb", "extra": {"rdma/hca": 2}},
            runtimeClassName=scene.namespace,
            topologySpreadConstraints=[spread, {"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
            output={"serveUntil": "2100-01-01T00:00:00Z"},
        )
        for attempt in (1, 2):
            pods = [scene.attempt(attempt, index=index) for index in (0, 1)]
            for pod in pods:
                spec = pod.object["spec"]
                asked = spec["containers"][0]["resources"]
                for kind in ("requests", "limits"):
                    assert {k: v for k, v in asked[kind].items() if "/" in k} == {
                        "nvidia.com/mig-3g.40gb": "1",
                        "rdma/hca": "2",
                    }
                assert spec["runtimeClassName"] == scene.namespace
                first, second = spec["topologySpreadConstraints"]
                mine = first.pop("labelSelector")["matchLabels"]
                assert first == spread | {"whenUnsatisfiable": "DoNotSchedule"}
                assert second["whenUnsatisfiable"] == "ScheduleAnyway"
                assert mine.items() <= pod.object["metadata"]["labels"].items()
                assert (mine[names.LABEL_ATTEMPT], len(mine)) == (str(attempt), 4)
            pods[0].unschedulable(
                "0/4 nodes are available: 3 Insufficient rdma/hca, 1 node(s) didn't match pod topology spread constraints."
            )
            scene.message("waiting for 2 × rdma/hca on each of 2 nodes", "1 do not fit spec.topologySpreadConstraints")
            for pod in pods:
                pod.run()
            scene.phase("Running")
            pods[1].evict()
        served = eventually(lambda: scene.api.find("pods", scene.namespace, names.files_pod("x")), "the file server")
        assert not {"runtimeClassName", "topologySpreadConstraints"} & served["spec"].keys()
    finally:
        scene.api.request("DELETE", f"/apis/node.k8s.io/v1/runtimeclasses/{scene.namespace}")


def test_claims_volumes_capability_and_network_reach_the_pods_of_each_attempt(scene: Scene) -> None:
    """As an API server keeps them: what it fills in must not make the operator's own Job look like somebody else's."""
    scene.submit(
        resources={"nodes": 2, "gpusPerNode": 4, "claims": [{"template": "gpus", "gpus": True}, {"template": "nics"}]},
        volumes=[
            {"name": "topology", "configMap": {"name": "fabric"}},
            {"name": "ca", "mountPath": "/etc/ssl/certs", "secret": {"secretName": "bundle"}},
            {"name": "rows", "persistentVolumeClaim": {"claimName": "corpus"}},
            {"name": "scratch", "emptyDir": {"sizeLimit": "10Gi"}},
        ],
        capabilities=["IPC_LOCK"],
        hostNetwork=True,
        env=[{"name": "NCCL_TOPO_FILE", "value": "/volumes/topology/topology.xml"}],
        output={"serveUntil": "2100-01-01T00:00:00Z"},
    )
    for attempt in (1, 2):
        pods = [scene.attempt(attempt, index=index) for index in (0, 1)]
        for pod in pods:
            spec = pod.object["spec"]
            trainer = spec["containers"][0]
            assert [c["resourceClaimTemplateName"] for c in spec["resourceClaims"]] == ["gpus", "nics"]
            assert [c["name"] for c in trainer["resources"]["claims"]] == [c["name"] for c in spec["resourceClaims"]]
            assert "nvidia.com/gpu" not in json.dumps(spec)
            kinds = {v["name"]: set(v) - {"name"} for v in spec["volumes"] if v["name"].startswith("volume-")}
            assert kinds == {
                "volume-topology": {"configMap"},
                "volume-ca": {"secret"},
                "volume-rows": {"persistentVolumeClaim"},
                "volume-scratch": {"emptyDir"},
            }
            mounted = {m["mountPath"]: bool(m.get("readOnly")) for m in trainer["volumeMounts"]}
            assert (mounted["/etc/ssl/certs"], mounted["/volumes/rows"], mounted["/volumes/scratch"]) == (
                True,
                True,
                False,
            )
            assert trainer["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
            assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
            assert trainer["ports"][0]["hostPort"] == names.TRAINER_PORT, "so one such pod runs on a node"
            assert {"name": "NCCL_TOPO_FILE", "value": "/volumes/topology/topology.xml"} in trainer["env"]
            pod.run()
        scene.phase("Running")
        if attempt == 1:
            pods[1].evict()
    served = eventually(lambda: scene.api.find("pods", scene.namespace, names.files_pod("x")), "the file server")
    assert not {"resourceClaims", "hostNetwork"} & {key for key, value in served["spec"].items() if value}


def test_a_volume_of_an_image_is_made_or_refused_in_words(scene: Scene) -> None:
    """They are off by default before Kubernetes 1.35: the API server then takes the Job without the image, in silence."""
    scene.submit(volumes=[{"name": "weights", "image": {"reference": "registry.example/weights:1"}}])
    status = scene.until(lambda s: s.get("phase") in ("Starting", "Failed"), "an answer of the API server")
    if status["phase"] == "Failed":
        assert "spec.volumes asks for (weights): they need Kubernetes 1.35" in status["message"]
        assert not scene.jobs()
    else:
        volumes = scene.attempt(1).object["spec"]["volumes"]
        assert any(v.get("image", {}).get("reference") == "registry.example/weights:1" for v in volumes)


def test_memory_raised_while_suspended_is_that_of_the_next_attempt(scene: Scene) -> None:
    scene.submit(resources={"memory": "3Gi"}, training={"maxSteps": 7})
    first = scene.attempt(1).run()
    assert first.object["spec"]["containers"][0]["resources"]["limits"]["memory"] == "3Gi"
    scene.change(suspend=True)
    scene.phase("Suspended")
    scene.change(resources={"memory": "6Gi"}, training={"tokensPerMicrobatch": 512})
    scene.change(suspend=False)
    pod = scene.attempt(2).object["spec"]
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "6Gi"
    name = next(v["configMap"]["name"] for v in pod["volumes"] if v["name"] == "job")
    frozen = scene.api.get("configmaps", scene.namespace, name)
    text = frozen["data"][names.JOB_KEY]
    assert pod["containers"][0]["args"] == [f"--job-sha256={hashlib.sha256(text.encode()).hexdigest()}"]
    training = json.loads(text)["spec"]["training"]
    assert (training["maxSteps"], training["tokensPerMicrobatch"]) == (7, 512)
    assert frozen["immutable"] is True
    assert frozen["metadata"]["ownerReferences"][0]["name"] == "x"
    scene.succeed(attempt=2)
    later = scene.change(output={"serveUntil": "2100-01-01T00:00:00Z"})
    assert later["spec"]["resources"]["memory"] == "6Gi"
    served = eventually(lambda: scene.api.find("pods", scene.namespace, names.files_pod("x")), "the file server")
    assert next(v["configMap"]["name"] for v in served["spec"]["volumes"] if v["name"] == "job") == name
    digests = [e["value"] for e in served["spec"]["containers"][0]["env"] if e["name"] == names.JOB_DIGEST_VARIABLE]
    assert digests == [hashlib.sha256(text.encode()).hexdigest()]


def test_a_runtime_class_that_does_not_exist_is_worded(scene: Scene) -> None:
    scene.submit(runtimeClassName="nowhere")
    scene.message("RuntimeClass nowhere does not exist; create it or change spec.runtimeClassName")


def test_allow_listed_fields_reach_the_pod(scene: Scene) -> None:
    priority = {"metadata": {"name": scene.namespace}, "value": 7}
    scene.api.request("POST", "/apis/scheduling.k8s.io/v1/priorityclasses", priority)
    scene.api.create("serviceaccounts", scene.namespace, {"metadata": {"name": "trainer"}})
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h200"]}]}]
            }
        }
    }
    toleration = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
    scene.submit(
        image="registry.example/trainer:1",
        imagePullPolicy="Always",
        imagePullSecrets=[{"name": "registry"}],
        serviceAccountName="trainer",
        nodeSelector={"pool": "gpu"},
        tolerations=[toleration],
        affinity=affinity,
        priorityClassName=scene.namespace,
        schedulerName="another",
        labels={"team": "rl"},
        annotations={"example.com/note": "hello"},
        terminationGracePeriodSeconds=77,
    )
    pod = scene.attempt(1).object
    spec = pod["spec"]
    assert spec["containers"][0]["image"] == "registry.example/trainer:1"
    assert spec["containers"][0]["imagePullPolicy"] == "Always"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["serviceAccountName"] == "trainer"
    assert spec["nodeSelector"] == {"pool": "gpu"}
    assert toleration in spec["tolerations"]
    assert spec["affinity"] == affinity
    assert spec["priorityClassName"] == scene.namespace
    assert spec["schedulerName"] == "another"
    assert spec["terminationGracePeriodSeconds"] == 77
    assert pod["metadata"]["labels"]["team"] == "rl"
    assert pod["metadata"]["annotations"]["example.com/note"] == "hello"


def test_secrets_go_by_reference_only(scene: Scene) -> None:
    scene.secret("hub", token="hf_do_not_tell", other="hf_nor_this")
    reference = {"secretKeyRef": {"name": "hub", "key": "token"}}
    scene.submit(env=[{"name": "HF_TOKEN", "valueFrom": reference}], envFrom=[{"secretRef": {"name": "hub"}}])
    container = scene.attempt(1).object["spec"]["containers"][0]
    variable = next(v for v in container["env"] if v["name"] == "HF_TOKEN")
    assert variable["valueFrom"]["secretKeyRef"]["name"] == "hub"
    assert {"secretRef": {"name": "hub"}} in container["envFrom"]
    scene.succeed()
    written = [scene.api.list(kind, scene.namespace) for kind in ("configmaps", "pods", "jobs", "events", names.PLURAL)]
    text = json.dumps(written)
    assert "hf_do_not_tell" not in text
    assert "hf_nor_this" not in text


def test_frozen_job_is_what_was_submitted_and_does_not_change(scene: Scene) -> None:
    scene.submit(training={"maxSteps": 7})
    scene.attempt(1)
    frozen = scene.api.get("configmaps", scene.namespace, names.frozen_job("x"))
    (text,) = frozen["data"].values()
    assert json.loads(text)["spec"]["training"]["maxSteps"] == 7
    scene.change(backoffLimit=9)
    scene.succeed()
    assert scene.api.get("configmaps", scene.namespace, names.frozen_job("x"))["data"] == frozen["data"]


def test_children_are_labelled_and_owned_by_the_job(scene: Scene) -> None:
    created = scene.submit(resources={"nodes": 2})
    scene.attempt(1)
    owned = {
        "jobs": names.attempt_job("x", 1),
        "services": "x",
        "configmaps": names.frozen_job("x"),
    }
    for kind, name in owned.items():
        meta = scene.api.get(kind, scene.namespace, name)["metadata"]
        assert meta["labels"][names.LABEL_JOB] == "x"
        assert [o["uid"] for o in meta["ownerReferences"]] == [created["metadata"]["uid"]]
        assert meta["ownerReferences"][0]["controller"] is True


def test_foreign_object_with_a_childs_name_is_left_alone_and_reported(scene: Scene) -> None:
    other = {"metadata": {"name": names.attempt_job("x", 1)}, "spec": {"suspend": True, "template": {"spec": {}}}}
    container = {"name": "other", "image": "other"}
    other["spec"]["template"]["spec"] = {"restartPolicy": "Never", "containers": [container]}
    uid = scene.api.create("jobs", scene.namespace, other)["metadata"]["uid"]
    scene.submit()
    status = scene.phase("Failed")
    assert names.attempt_job("x", 1) in status["message"]
    assert scene.api.get("jobs", scene.namespace, names.attempt_job("x", 1))["metadata"]["uid"] == uid


def test_a_job_of_the_longest_name_has_all_its_children(scene: Scene) -> None:
    name = "x" * names.MAX_NAME_LENGTH
    scene.submit(name, resources={"nodes": 2}, output={"serveUntil": "2100-01-01T00:00:00Z"}, backoffLimit=0)
    first, second = (scene.attempt(1, name, index) for index in (0, 1))
    first.run()
    second.run().evict()
    again = [scene.attempt(2, name, index).run() for index in (0, 1)]
    for pod in reversed(again):
        pod.exit(0, result(3) if pod is again[0] else "")
    assert scene.phase("Succeeded", name=name)["result"]["totalSteps"] == 3
    eventually(lambda: scene.api.find("pods", scene.namespace, names.files_pod(name)), "the file server")
