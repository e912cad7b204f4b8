"""The objects that the operator makes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl_operator import build
from unit.operator import make


def job(number: int = 1, queue: str = "", priority: str = "", **spec: Any) -> dict[str, Any]:
    found = make.resource(queue=queue, priority=priority)
    return build.attempt_job(found, make.parsed(**spec), number, make.IMAGE)


def pod(**spec: Any) -> dict[str, Any]:
    return job(**spec)["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def container(**spec: Any) -> dict[str, Any]:
    return pod(**spec)["containers"][0]  # type: ignore[no-any-return]


def mounts(**spec: Any) -> dict[str, str]:
    return {mount["mountPath"]: mount["name"] for mount in container(**spec)["volumeMounts"]}


def test_a_job_never_retries_by_itself() -> None:
    spec = job(resources={"nodes": 3})["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (
        "Indexed",
        3,
        3,
        0,
    )
    rules = spec["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in rules} == {"FailJob"}
    assert rules[0]["onExitCodes"]["values"] == [40, 41, 42]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_children_belong_to_the_job_and_carry_its_labels() -> None:
    made = job()
    assert made["metadata"]["ownerReferences"][0]["uid"] == make.UID
    labels = made["spec"]["template"]["metadata"]["labels"]
    expected = {
        names.LABEL_JOB: "x",
        names.LABEL_JOB_UID: make.UID,
        names.LABEL_ATTEMPT: "1",
        names.LABEL_ALGORITHM: "grpo",
    }
    assert expected.items() <= labels.items()
    assert expected.items() <= made["metadata"]["labels"].items()


def test_users_labels_reach_the_pods_but_never_replace_ours() -> None:
    labels = job(labels={"team": "a", names.LABEL_JOB: "y"})["spec"]["template"]["metadata"]["labels"]
    assert (labels["team"], labels[names.LABEL_JOB]) == ("a", "x")


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"gpusPerNode": 0}, ["python", "-m", "nemo_rl.worker"]),
        ({"gpusPerNode": 1}, ["python", "-m", "nemo_rl.worker"]),
    ],
)
def test_one_process_needs_no_torchrun(resources: dict[str, Any], expected: list[str]) -> None:
    assert container(resources=resources)["command"] == expected


def test_several_processes_are_started_by_the_launcher() -> None:
    command = container(resources={"gpusPerNode": 8}, terminationGracePeriodSeconds=60)["command"]
    assert command == [
        *("python", "-m", "nemo_rl.worker.launch", "--nodes=1", "--processes=8", "--shutdown-timeout=45"),
    ]


def test_several_nodes_meet_at_index_0_for_as_long_as_the_job_says() -> None:
    made = pod(resources={"nodes": 2, "gpusPerNode": 0}, startupTimeoutSeconds=77)
    command = made["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "nemo_rl.worker.launch"]
    assert {"--nodes=2", "--processes=1", "--startup-timeout=77"} <= set(command)
    assert {"--node=$(JOB_COMPLETION_INDEX)", "--attempt-job=x-1", "--service=x"} <= set(command)
    assert made["subdomain"] == "x"
    service = build.service(make.resource(), make.parsed(resources={"nodes": 2}))
    assert service is not None
    assert (service["metadata"]["name"], service["spec"]["clusterIP"]) == ("x", "None")
    assert service["spec"]["publishNotReadyAddresses"]


def test_probes_come_after_the_limits_of_the_trainer_itself() -> None:
    made = container(startupTimeoutSeconds=3600, stallTimeoutSeconds=1800)
    for kind, seconds in (("startupProbe", 5400), ("livenessProbe", 1800)):
        assert made[kind]["exec"]["command"] == ["python", "-m", "nemo_rl.worker.probe"]
        assert made[kind]["periodSeconds"] * made[kind]["failureThreshold"] >= seconds
    short = container(stallTimeoutSeconds=10)["livenessProbe"]
    assert short["periodSeconds"] * short["failureThreshold"] >= 60, "one slow answer is no hang"


def test_pods_know_their_attempt_whatever_the_user_sets() -> None:
    env = container(env=[{"name": names.ATTEMPT_VARIABLE, "value": "9"}])["env"]
    assert [e["value"] for e in env if e["name"] == names.ATTEMPT_VARIABLE][-1] == "1", "the last one counts"


def test_pods_are_restricted() -> None:
    made = pod()
    assert made["automountServiceAccountToken"] is False
    assert made["securityContext"]["runAsNonRoot"] is True
    assert made["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert made["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not any("hostPath" in volume for volume in made["volumes"])


def test_what_a_trainer_writes_has_a_place() -> None:
    found = mounts()
    assert {"/output", "/tmp", "/cache", "/dev/shm", names.HOME_DIR, names.JOB_DIR} <= set(found)
    shm = next(v for v in pod(resources={"sharedMemory": "2Gi"})["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    made = container()
    assert (made["terminationMessagePath"], made["terminationMessagePolicy"]) == (names.TERMINATION_LOG, "File")


def test_resources_are_requests_and_limits() -> None:
    made = container(resources={"gpusPerNode": 2, "cpu": "4", "memory": "8Gi"})["resources"]
    assert made["limits"] == {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "2"}
    assert made["requests"] == made["limits"] | {"ephemeral-storage": "1Gi"}


def test_a_pod_that_asks_for_nothing_is_not_the_first_to_be_evicted() -> None:
    made = container(resources={"gpusPerNode": 0})["resources"]
    assert made == {"requests": {"memory": "1Gi", "ephemeral-storage": "1Gi"}}, "no limit that the job did not ask for"
    given = container(resources={"gpusPerNode": 0, "memory": "64Mi", "ephemeralStorage": "200Gi"})["resources"]
    assert given["requests"] == given["limits"] == {"memory": "64Mi", "ephemeral-storage": "200Gi"}


def test_what_is_not_given_is_not_written() -> None:
    allowed = {
        *("imagePullSecrets", "serviceAccountName", "nodeSelector", "tolerations", "affinity"),
        *("priorityClassName", "schedulerName", "runtimeClassName", "topologySpreadConstraints"),
    }
    assert not allowed & set(pod())
    given = pod(
        imagePullSecrets=[{"name": "r"}],
        serviceAccountName="s",
        nodeSelector={"a": "b"},
        tolerations=[{"key": "k", "operator": "Exists", "effect": "NoSchedule"}],
        affinity={"nodeAffinity": {}},
        priorityClassName="high",
        schedulerName="mine",
        runtimeClassName="nvidia",
        topologySpreadConstraints=[{"topologyKey": "zone"}],
    )
    assert allowed <= set(given)
    assert given["tolerations"] == [{"key": "k", "operator": "Exists", "effect": "NoSchedule"}]


def test_devices_are_requests_and_limits_by_their_names() -> None:
    asked = container(resources={"gpusPerNode": 8, "gpuResource": "amd.com/gpu", "extra": {"rdma/hca": 1}})["resources"]
    assert asked["limits"] == {"amd.com/gpu": "8", "rdma/hca": "1"}
    assert asked["requests"].items() >= asked["limits"].items()
    assert "rdma/hca" in container(resources={"gpusPerNode": 0, "extra": {"rdma/hca": 1}})["resources"]["limits"]


def test_the_pods_of_an_attempt_are_spread_and_no_others_counted() -> None:
    given = pod(number=2, runtimeClassName="nvidia", topologySpreadConstraints=[{"topologyKey": "rack"}])
    assert given["runtimeClassName"] == "nvidia"
    (spread,) = given["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["maxSkew"], spread["whenUnsatisfiable"]) == ("rack", 1, "DoNotSchedule")
    assert spread["labelSelector"]["matchLabels"][names.LABEL_ATTEMPT] == "2"


def test_claims_of_devices_are_made_from_templates_for_each_pod() -> None:
    fields = {"resources": {"gpusPerNode": 8, "claims": [{"template": "h200", "gpus": True}, {"template": "nics"}]}}
    made = pod(**fields)
    assert made["resourceClaims"] == [
        {"name": "devices-0", "resourceClaimTemplateName": "h200"},
        {"name": "devices-1", "resourceClaimTemplateName": "nics"},
    ]
    asked = made["containers"][0]["resources"]
    assert asked["claims"] == [{"name": "devices-0"}, {"name": "devices-1"}]
    assert "limits" not in asked, "the GPUs come by the claim, and by no device plugin besides"
    assert "--processes=8" in made["containers"][0]["command"]
    beside = container(resources={"gpusPerNode": 8, "claims": [{"template": "nics"}]})["resources"]
    assert beside["limits"] == {"nvidia.com/gpu": "8"}
    queued = build._asking(made)
    assert queued["resourceClaims"] == made["resourceClaims"]
    assert queued["containers"][0]["resources"]["claims"] == asked["claims"]


VOLUMES: list[dict[str, Any]] = [
    {"name": "topology", "configMap": {"name": "fabric"}},
    {"name": "ca", "mountPath": "/etc/ssl/certs", "secret": {"secretName": "bundle"}},
    {"name": "rows", "persistentVolumeClaim": {"claimName": "corpus"}},
    {"name": "mine", "persistentVolumeClaim": {"claimName": "work", "readOnly": False}},
    {"name": "scratch", "mountPath": "/scratch", "emptyDir": {"sizeLimit": "10Gi", "medium": "Memory"}},
    {"name": "weights", "image": {"reference": "registry.example/weights:1"}},
]


def test_volumes_are_mounted_where_they_are_asked_for_and_written_only_where_that_is_said() -> None:
    made = pod(volumes=VOLUMES)
    ours = {v["name"]: {k: s for k, s in v.items() if k != "name"} for v in made["volumes"]}
    assert {n: s for n, s in ours.items() if n.startswith("volume-")} == {
        "volume-topology": {"configMap": {"name": "fabric"}},
        "volume-ca": {"secret": {"secretName": "bundle", "defaultMode": 0o440}},
        "volume-rows": {"persistentVolumeClaim": {"claimName": "corpus", "readOnly": True}},
        "volume-mine": {"persistentVolumeClaim": {"claimName": "work"}},
        "volume-scratch": {"emptyDir": {"sizeLimit": "10Gi", "medium": "Memory"}},
        "volume-weights": {"image": {"reference": "registry.example/weights:1", "pullPolicy": "IfNotPresent"}},
    }
    mounted = {m["mountPath"]: m for m in made["containers"][0]["volumeMounts"] if m["name"].startswith("volume-")}
    writable = {path for path, mount in mounted.items() if not mount.get("readOnly")}
    assert set(mounted) == {
        *("/volumes/topology", "/etc/ssl/certs", "/volumes/rows", "/volumes/mine", "/scratch", "/volumes/weights"),
    }
    assert writable == {"/volumes/mine", "/scratch"}
    served = build.files_pod(make.resource(), make.parsed(volumes=VOLUMES), make.IMAGE)["spec"]["volumes"]
    assert not any(v["name"].startswith("volume-") for v in served), "the file server needs none of them"


def test_locked_memory_and_the_network_of_the_node_are_asked_for_and_nothing_besides() -> None:
    made = pod(capabilities=["IPC_LOCK"], hostNetwork=True, env=[{"name": "NCCL_IB_HCA", "value": "mlx5"}])
    security = made["containers"][0]["securityContext"]
    assert security == container()["securityContext"] | {"capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}
    assert made["securityContext"] == pod()["securityContext"], "still not root, and with the runtime's seccomp profile"
    assert (made["hostNetwork"], made["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in made["containers"][0]["env"]
    assert not {"hostNetwork", "dnsPolicy", "resourceClaims"} & set(pod())
    served = build.files_pod(make.resource(), make.parsed(capabilities=["IPC_LOCK"], hostNetwork=True), make.IMAGE)
    assert "hostNetwork" not in served["spec"]
    assert served["spec"]["containers"][0]["securityContext"] == container()["securityContext"]


def test_a_model_may_lie_in_a_volume_of_an_image() -> None:
    made = pod(model="/volumes/weights/qwen", volumes=[VOLUMES[-1]])
    (volume,) = (v for v in made["volumes"] if "image" in v)
    assert volume["image"] == {"reference": "registry.example/weights:1", "pullPolicy": "IfNotPresent"}
    (mount,) = (m for m in made["containers"][0]["volumeMounts"] if m["name"] == volume["name"])
    assert (mount["mountPath"], mount["readOnly"]) == ("/volumes/weights", True)


def test_secrets_are_only_referred_to() -> None:
    made = container(
        env=[
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
            {"name": "A", "value": "1"},
        ],
        envFrom=[{"secretRef": {"name": "all"}}],
    )
    by_name = {e["name"]: e for e in made["env"]}
    assert by_name["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": "token", "optional": False}
    assert by_name["A"]["value"] == "1"
    assert made["envFrom"] == [{"secretRef": {"name": "all"}}]


def test_a_variable_that_the_user_sets_replaces_ours() -> None:
    env = container(env=[{"name": "HF_HOME", "value": "/cache/mine"}])["env"]
    assert [e["value"] for e in env if e["name"] == "HF_HOME"] == ["/cache/mine"]


def test_bundles_are_mounted_part_by_part_in_order() -> None:
    made = pod(bundles=[{"name": "code", "sha256": "0" * 64, "configMaps": ["b-0", "b-1"]}])
    volume = next(v for v in made["volumes"] if v["name"] == "bundle-0")
    assert volume["projected"]["sources"] == [
        {"configMap": {"name": "b-0", "items": [{"key": names.BUNDLE_KEY, "path": "000"}]}},
        {"configMap": {"name": "b-1", "items": [{"key": names.BUNDLE_KEY, "path": "001"}]}},
    ]
    assert f"{names.BUNDLE_DIR}/code" in mounts(bundles=[{"name": "code", "sha256": "0" * 64, "configMaps": ["b-0"]}])


def test_a_bundle_in_the_store_is_not_mounted() -> None:
    made = pod(bundles=[{"name": "code", "sha256": "0" * 64}], output={"uri": "s3://bucket/results"})
    assert not [v for v in made["volumes"] if v["name"].startswith("bundle")]


def test_claims_of_model_and_data_are_mounted_once_and_read_only() -> None:
    made = container(model="pvc://data/model", dataset={"path": "pvc://data/rows.jsonl"})
    found = [m for m in made["volumeMounts"] if m["mountPath"].startswith(names.CLAIMS_DIR)]
    assert found == [{"name": "claim-0", "mountPath": f"{names.CLAIMS_DIR}/data", "readOnly": True}]


@pytest.mark.parametrize(
    ("output", "resources", "mode"),
    [
        ({}, {}, "ReadWriteOnce"),
        ({}, {"nodes": 2}, "ReadWriteMany"),
        ({"accessMode": "ReadWriteOncePod"}, {"nodes": 2}, "ReadWriteOncePod"),
    ],
)
def test_the_access_mode_follows_the_nodes(output: dict[str, Any], resources: dict[str, Any], mode: str) -> None:
    claim = build.output_claim(make.resource(), make.parsed(output=output, resources=resources))
    assert claim is not None
    assert claim["spec"]["accessModes"] == [mode]


def test_a_claim_that_is_kept_has_no_owner() -> None:
    kept = build.output_claim(make.resource(), make.parsed())
    dropped = build.output_claim(make.resource(), make.parsed(output={"retain": False}))
    assert kept is not None
    assert dropped is not None
    assert "ownerReferences" not in kept["metadata"]
    assert dropped["metadata"]["ownerReferences"][0]["uid"] == make.UID


def test_no_claim_is_made_beside_the_users() -> None:
    assert build.output_claim(make.resource(), make.parsed(output={"claim": "mine"})) is None
    volume = next(v for v in pod(output={"claim": "mine"})["volumes"] if v["name"] == "output")
    assert volume["persistentVolumeClaim"] == {"claimName": "mine"}


def test_a_job_with_a_store_needs_no_claim_on_any_number_of_nodes() -> None:
    """Its pods publish from folders of their own; what they read is kept with the other caches."""
    spec = {"output": {"uri": "s3://bucket/runs"}, "resources": {"nodes": 2, "ephemeralStorage": "40Gi"}}
    assert build.output_claim(make.resource(), make.parsed(**spec)) is None
    volumes = {v["name"]: v for v in pod(**spec)["volumes"]}
    assert volumes["output"] == {"name": "output", "emptyDir": {}}
    assert not any("persistentVolumeClaim" in v for v in volumes.values())
    made = container(**spec)
    assert made["resources"]["limits"]["ephemeral-storage"] == "40Gi"
    assert {"name": "NEMO_RL_CACHE", "value": f"{names.CACHE_DIR}/nemo-rl"} in made["env"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"output": {"uri": "s3://bucket/runs", "claim": "mine"}}, "takes the place of a claim, so claim"),
        ({"output": {"uri": "s3://key:word@bucket/runs"}}, "holds credentials"),
        ({"output": {"uri": "gcs://bucket/runs"}}, "write gs://"),
        ({"output": {"uri": "/data/runs"}}, "an address such as s3://bucket/folder"),
        ({"model": "s4://bucket/model"}, "model: found the scheme s4://"),
    ],
)
def test_addresses_that_cannot_work_are_refused_in_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make.parsed(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"resources": {"extra": {"hca": 1}}}, "with its domain"),
        ({"resources": {"extra": {"requests.kubernetes.io/a": 1}}}, "none of kubernetes.io"),
        ({"resources": {"gpuResource": "kubernetes.io/gpu"}}, "none of kubernetes.io"),
        ({"resources": {"extra": {"nvidia.com/gpu": 1}}}, "which gpusPerNode counts"),
        (
            {"resources": {"gpuResource": "nvidia.com/mig-1g.5gb", "gpusPerNode": 2}},
            "a process sees one MIG slice only",
        ),
        (
            {
                "topologySpreadConstraints": [
                    {"topologyKey": "a", "minDomains": 2, "whenUnsatisfiable": "ScheduleAnyway"}
                ]
            },
            "minDomains belongs to whenUnsatisfiable DoNotSchedule",
        ),
        ({"resources": {"claims": [{"template": "a"}, {"template": "a"}]}}, "claims name a template twice"),
        ({"resources": {"gpusPerNode": 0, "claims": [{"template": "a", "gpus": True}]}}, "but gpusPerNode is 0"),
        ({"volumes": [{"name": "a"}]}, "found none of them; give exactly one of configMap, secret"),
        ({"volumes": [{"name": "a", "emptyDir": {}, "secret": {"secretName": "b"}}]}, "found secret and emptyDir"),
        ({"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "hostPath"),
        ({"volumes": [{"name": "a", "mountPath": "/etc", "emptyDir": {}}]}, "in the way of /etc/nemo-rl"),
        ({"volumes": [{"name": "a", "mountPath": "/output/b", "emptyDir": {}}]}, "in the way of /output"),
        ({"volumes": [{"name": "a", "mountPath": "/a/../output", "emptyDir": {}}]}, "mountPath"),
        ({"volumes": [{"name": "a", "mountPath": "/", "emptyDir": {}}]}, "mountPath"),
        (
            {
                "volumes": [
                    {"name": "a", "mountPath": "/data", "emptyDir": {}},
                    {"name": "b", "mountPath": "/data/b", "emptyDir": {}},
                ]
            },
            "volumes a and b are mounted at /data and /data/b, one within the other",
        ),
        ({"volumes": [{"name": "a", "emptyDir": {}}, {"name": "a", "mountPath": "/b", "emptyDir": {}}]}, "the name a"),
        ({"capabilities": ["SYS_ADMIN"]}, "IPC_LOCK"),
    ],
)
def test_devices_and_spreads_that_cannot_work_are_refused_in_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make.parsed(**fields)


def frozen_spec(**fields: Any) -> dict[str, Any]:
    made = build.frozen_job(make.resource(**fields), make.parsed(**fields))
    return json.loads(made["data"]["job.json"])["spec"]


def test_the_frozen_job_says_what_its_author_said_and_the_learning_rate_but_no_other_defaults() -> None:
    spec = make.parsed(training={"maxSteps": 7})
    made = build.frozen_job(make.resource(training={"maxSteps": 7}), spec)
    found = json.loads(made["data"]["job.json"])
    assert made["immutable"] is True
    assert found["metadata"] == {"name": "x", "namespace": "ns", "uid": make.UID}
    assert RLTrainingJobSpec.model_validate(found["spec"]) == spec
    assert found["spec"]["training"] == {"maxSteps": 7, "learningRate": 1e-6}


@pytest.mark.parametrize(("given", "frozen"), [({}, 2e-5), ({"loraRank": 4}, 1e-4), ({"learningRate": 1e-6}, 1e-6)])
def test_the_learning_rate_of_the_algorithm_is_frozen_also_where_the_author_gave_that_of_another(
    given: dict[str, Any], frozen: float
) -> None:
    sft = {"algorithm": "sft", "reward": None, "training": given}
    assert frozen_spec(**sft)["training"]["learningRate"] == frozen


def test_defaults_that_the_api_server_filled_in_are_not_frozen() -> None:
    filled = make.parsed().model_dump(mode="json", by_alias=True, exclude_none=True)
    assert frozen_spec(**filled) == {**make.spec(), "training": {"learningRate": 1e-6}}


def test_a_field_that_this_operator_does_not_know_reaches_a_newer_image() -> None:
    resource = make.resource(training={"maxSteps": 7, "fp8": True})
    made = build.frozen_job(resource, make.parsed(training={"maxSteps": 7}))
    assert json.loads(made["data"]["job.json"])["spec"]["training"] == {
        "maxSteps": 7,
        "learningRate": 1e-6,
        "fp8": True,
    }


def test_what_may_change_in_a_live_job_is_not_frozen() -> None:
    changeable = {"suspend": True, "backoffLimit": 9, "activeDeadlineSeconds": 5, "ttlSecondsAfterFinished": 5}
    assert frozen_spec(**changeable, output={"serveUntil": "2030-01-01T00:00:00Z"}) == {
        **make.spec(),
        "training": {"learningRate": 1e-6},
    }


def test_pods_name_the_digest_of_the_frozen_job() -> None:
    fields = {"training": {"maxSteps": 7}}
    text = build.frozen_job(make.resource(**fields), make.parsed(**fields))["data"]["job.json"]
    wanted = hashlib.sha256(text.encode()).hexdigest()
    trainer = build.attempt_job(make.resource(**fields), make.parsed(**fields), 1, make.IMAGE)
    files = build.files_pod(make.resource(**fields), make.parsed(**fields), make.IMAGE)
    assert trainer["spec"]["template"]["spec"]["containers"][0]["args"] == [f"--job-sha256={wanted}"]
    assert {"name": "NEMO_RL_JOB_SHA256", "value": wanted} in files["spec"]["containers"][0]["env"]


def test_the_file_server_reads_the_output_near_the_trainer() -> None:
    made = build.files_pod(make.resource(), make.parsed(), make.IMAGE)
    output = next(m for m in made["spec"]["containers"][0]["volumeMounts"] if m["mountPath"] == names.OUTPUT_DIR)
    assert output["readOnly"] is True
    assert made["metadata"]["name"] == "x-files"
    assert "ports" not in made["spec"]["containers"][0]
    assert "podAffinity" in made["spec"]["affinity"]
    assert names.LABEL_ATTEMPT not in made["metadata"]["labels"]


def test_the_file_server_of_a_store_reads_it_as_the_trainer_does_and_has_nothing_else() -> None:
    given = {"output": {"uri": "s3://bucket/runs"}, "envFrom": [{"secretRef": {"name": "keys"}}], "volumes": VOLUMES}
    given |= {"env": [{"name": "AWS_REGION", "value": "eu-1"}], "serviceAccountName": "reader", "labels": {"team": "a"}}
    made = build.files_pod(make.resource(**given), make.parsed(**given), make.IMAGE)
    (server,) = made["spec"]["containers"]
    assert server["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert {"name": "AWS_REGION", "value": "eu-1"} in server["env"]
    assert made["spec"]["serviceAccountName"] == "reader"
    assert made["metadata"]["labels"].items() >= {"team": "a", names.LABEL_COMPONENT: "files"}.items()
    assert not any("persistentVolumeClaim" in volume for volume in made["spec"]["volumes"])
    further = {m["mountPath"]: m for m in server["volumeMounts"] if m["name"].startswith("volume-")}
    assert set(further) == {"/volumes/topology", "/etc/ssl/certs"}, (
        "Secrets and ConfigMaps may hold keys and certificates"
    )
    assert all(mount["readOnly"] for mount in further.values())
    assert "affinity" not in made["spec"], "there is no claim to be near to"
    on_a_claim = make.parsed(**(given | {"output": {}}))
    assert "envFrom" not in build.files_pod(make.resource(), on_a_claim, make.IMAGE)["spec"]["containers"][0]


def test_no_name_of_a_child_is_too_long() -> None:
    longest = "x" * names.MAX_NAME_LENGTH
    children = (names.output_claim, names.files_pod, names.frozen_job, lambda job: names.attempt_job(job, 9999))
    assert max(len(name(longest)) for name in children) <= 63
