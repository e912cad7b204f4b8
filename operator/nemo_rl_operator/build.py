"""The objects that the operator makes for a job, as plain dicts. Pure: the same job gives the same objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nemo_rl.job import names
from nemo_rl.job.names import ExitCode
from nemo_rl.job.spec import (
    DEFAULT_REQUESTS,
    DatasetSpec,
    EnvVar,
    RLTrainingJobSpec,
    RolloutSpec,
    Toleration,
    VolumeSpec,
)
from nemo_rl_operator import frozen
from nemo_rl_operator.fingerprint import fingerprint
from nemo_rl_operator.observe import MAIN_POD_SET, Assignment, Queueing, Resource

Object = dict[str, Any]

NOTHING = Assignment()
ASKING = (
    *("restartPolicy", "nodeSelector", "tolerations", "affinity", "topologySpreadConstraints", "priorityClassName"),
    *("schedulerName", "runtimeClassName", "overhead", "hostNetwork", "resourceClaims", "resources"),
)
TOPOLOGY_WORDS = ("required", "preferred", "unconstrained")

USER = 1000
"""User and group of trainer pods; volumes get the group, so that the pods can write to them."""
EXIT_BARRIER_SECONDS = 15
"""Of the grace period, what torchrun keeps for itself after its processes have ended."""

VOLUME_PREFIX = "volume-"
"""How the names of a job's own volumes begin in its pods, apart from those that each pod has."""
REPLICA_PROBES = 6
"""Probes in a row that a rollout replica may leave unanswered, once it has served: while it loads weights it is busy."""
REPLICA_GRACE_SECONDS = 10
"""A rollout replica has nothing to save; what was asked of it is asked of another."""

PROBE_SECONDS = 30
"""Between two probes of a trainer; each is a small program in its container."""


def owner(resource: Resource) -> Object:
    """Ownership by the RLTrainingJob: its children go with it."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": resource.name,
        "uid": resource.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def labels(resource: Resource, component: str | None = None) -> dict[str, str]:
    found = {names.LABEL_JOB: resource.name, names.LABEL_JOB_UID: resource.uid}
    return found | {names.LABEL_COMPONENT: component} if component else found


def _meta(resource: Resource, name: str, *, component: str | None = None, owned: bool = True) -> Object:
    meta: Object = {"name": name, "namespace": resource.namespace, "labels": labels(resource, component)}
    if owned:
        meta["ownerReferences"] = [owner(resource)]
    return meta


def frozen_job(resource: Resource, spec: RLTrainingJobSpec) -> Object:
    """ConfigMap with the job as the pods read it; later changes of the resource do not reach a running attempt."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _meta(resource, names.frozen_job(resource.name)),
        "immutable": True,
        "data": {names.JOB_KEY: frozen.text(resource, spec)},
    }


def output_claim(resource: Resource, spec: RLTrainingJobSpec) -> Object | None:
    """The claim for checkpoints, or None where the job brings its own or writes to a store. A retained claim outlives the job: no owner."""
    output = spec.output
    if output.claim or output.uri:
        return None
    mode = output.access_mode or ("ReadWriteOnce" if spec.resources.nodes == 1 else "ReadWriteMany")
    claim: Object = {"accessModes": [mode], "resources": {"requests": {"storage": output.size}}}
    if output.storage_class_name is not None:
        claim["storageClassName"] = output.storage_class_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _meta(resource, names.output_claim(resource.name), owned=not output.retain),
        "spec": claim,
    }


def network_policy(resource: Resource, network: str) -> Object | None:
    """Who reaches the pods of this job, and what they reach: each other, and what the installation adds.

    `network` is that addition: JSON of the rules "ingress" and "egress" as in the core API; empty for no policy at all.
    Its name has the job's uid, so that it needs not be told from one of an earlier job.
    """
    if not network:
        return None
    added = json.loads(network)
    peers = [{"podSelector": {"matchLabels": {names.LABEL_JOB_UID: resource.uid}}}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _meta(resource, names.network_policy(resource.name, resource.uid)),
        "spec": {
            "podSelector": {"matchLabels": {names.LABEL_JOB_UID: resource.uid}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers}, *added.get("ingress", ())],
            "egress": [{"to": peers}, *added.get("egress", ())],
        },
    }


def run_secret(resource: Resource, spec: RLTrainingJobSpec) -> Object | None:
    """The Secret by which the pods of a job of several nodes, or with rollout replicas, know each other; whoever makes it
    draws the tokens.

    It is written once and never read back: the operator may create Secrets, and nothing else.
    """
    if not _has_secret(spec):
        return None
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _meta(resource, names.run_secret(resource.name, resource.uid)),
        "type": "Opaque",
        "immutable": True,
    }


def _has_secret(spec: RLTrainingJobSpec) -> bool:
    return spec.resources.nodes > 1 or num_replicas(spec) > 0


def num_replicas(spec: RLTrainingJobSpec) -> int:
    """Rollout replicas that the job asks for; 0 where something else samples."""
    return (spec.rollout.replicas or 0) if spec.rollout is not None else 0


def service(resource: Resource, spec: RLTrainingJobSpec) -> Object | None:
    """Headless Service that gives the pods of a multi-node job their host names; None for one node."""
    if spec.resources.nodes == 1:
        return None
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(resource, resource.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the pods look for each other before any of them is ready
            "selector": labels(resource, names.COMPONENT_TRAINER),
            "ports": [{"name": "rendezvous", "port": names.RENDEZVOUS_PORT}],
        },
    }


def attempt_job(
    resource: Resource,
    spec: RLTrainingJobSpec,
    number: int,
    image: str,
    workload: str = "",
    assignment: Assignment = NOTHING,
) -> Object:
    """The Indexed Job of one attempt. It never retries by itself: the operator decides, by the cause.

    With a queue, `workload` is the job's Workload and `assignment` what Kueue adds to the pods. The Job itself names no
    queue: it runs on the quota of that Workload.
    """
    meta = _meta(resource, names.attempt_job(resource.name, number), component=names.COMPONENT_TRAINER)
    meta["labels"] |= {names.LABEL_ATTEMPT: str(number), names.LABEL_ALGORITHM: spec.algorithm}
    pod_labels = spec.labels | meta["labels"]
    if workload:
        meta["annotations"] = {names.ANNOTATION_WORKLOAD: workload}
    nodes = spec.resources.nodes
    job: Object = {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": _assigned(
            {
                "metadata": {"labels": pod_labels, **({"annotations": spec.annotations} if spec.annotations else {})},
                "spec": trainer_pod(resource, spec, number, image),
            },
            assignment,
        ),
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": job}


def _assigned(template: Object, assignment: Assignment) -> Object:
    """The pod template with what Kueue adds to the pods that it admits: where they may run, and what tells them apart."""
    meta, spec = template["metadata"], template["spec"]
    if assignment.labels:
        meta["labels"] = meta["labels"] | dict(assignment.labels)
    if assignment.annotations:
        meta["annotations"] = meta.get("annotations", {}) | dict(assignment.annotations)
    if assignment.node_selector:
        spec["nodeSelector"] = spec.get("nodeSelector", {}) | dict(assignment.node_selector)
    if added := [json.loads(t) for t in assignment.tolerations]:
        given = spec.get("tolerations", [])
        spec["tolerations"] = given + [t for t in added if t not in given]
    if assignment.gates:
        spec["schedulingGates"] = [{"name": gate} for gate in assignment.gates]
    return template


def workload(resource: Resource, spec: RLTrainingJobSpec, queueing: Queueing, image: str, version: str) -> Object:
    """Kueue's Workload of the job: its queue, its priority, and what its pods ask for."""
    pods: Object = {
        "name": MAIN_POD_SET,
        "count": spec.resources.nodes,
        "template": {
            "metadata": {"labels": spec.labels, "annotations": spec.annotations},
            "spec": _asking(trainer_pod(resource, spec, 1, image)),
        },
    }
    if topology := _topology(spec.annotations):
        pods["topologyRequest"] = topology
    asks: Object = {"queueName": queueing.queue, "priority": queueing.priority, "podSets": [pods]}
    if queueing.priority_class:
        kind = "PriorityClass" if queueing.pod_priority else "WorkloadPriorityClass"
        group = "scheduling.k8s.io" if queueing.pod_priority else names.KUEUE_GROUP
        if version == "v1beta1":
            asks |= {"priorityClassName": queueing.priority_class, "priorityClassSource": f"{group}/{kind.lower()}"}
        else:
            asks["priorityClassRef"] = {"group": group, "kind": kind, "name": queueing.priority_class}
    return {
        "apiVersion": f"{names.KUEUE_GROUP}/{version}",
        "kind": "Workload",
        "metadata": _meta(resource, names.workload(resource.name)),
        "spec": asks,
    }


def _asking(pod: Object) -> Object:
    """Of a pod's spec, what decides where it may run and what it takes: all that Kueue looks at.

    Only what the job itself asks for counts against the quota, which has a limit too. Requests that every pod gets are
    left out: a queue without quota for local storage, which few have, would admit nothing.
    """
    found = {name: pod[name] for name in ASKING if name in pod}
    for kind in ("initContainers", "containers"):
        if kind in pod:
            found[kind] = [{n: c[n] for n in ("name", "image", "restartPolicy") if n in c} for c in pod[kind]]
            for container, asking in zip(pod[kind], found[kind], strict=True):
                given = container.get("resources", {})
                if limits := given.get("limits"):
                    asking["resources"] = {"requests": limits, "limits": limits}
                if claims := given.get("claims"):
                    asking.setdefault("resources", {})["claims"] = claims
    return found


def _topology(annotations: dict[str, str]) -> Object:
    """What the annotations of topology-aware scheduling ask for, as Kueue's own integrations read them."""
    levels = {word: annotations.get(f"{names.KUEUE_GROUP}/podset-{word}-topology") for word in TOPOLOGY_WORDS}
    found: Object = {}
    for word in TOPOLOGY_WORDS:
        if value := levels[word]:
            found[word] = value.lower() == "true" if word == "unconstrained" else value
            break
    level = annotations.get(f"{names.KUEUE_GROUP}/podset-slice-required-topology")
    size = annotations.get(f"{names.KUEUE_GROUP}/podset-slice-size", "")
    if level and size.isdigit():
        found |= {"podSetSliceRequiredTopology": level, "podSetSliceSize": int(size)}
    return found | {"podIndexLabel": names.ANNOTATION_JOB_INDEX} if found else {}


def attempt_content(resource: Resource, spec: RLTrainingJobSpec, number: int, image: str) -> str:
    """Fingerprint of the Job of an attempt, as the operator makes it."""
    return fingerprint(attempt_job(resource, spec, number, image)["spec"])


def _failure_rules() -> list[Object]:
    """All end the Job; the rule that matched stays in the Job's condition when the pods are gone.

    Not the code of a saved checkpoint: pods that end because Kueue suspends the Job must not make it fail.
    """
    codes = sorted(code for code in ExitCode if code not in (ExitCode.DONE, ExitCode.PREEMPTED))
    return [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": names.TRAINER_CONTAINER, "operator": "In", "values": codes},
        },
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def command(resource: Resource, spec: RLTrainingJobSpec, number: int) -> list[str]:
    """What a trainer pod runs: the worker; where there is more than one process, what starts them once all pods run."""
    gpus, nodes = spec.resources.gpus_per_node, spec.resources.nodes
    if nodes == 1 and gpus <= 1:
        return ["python", "-m", names.WORKER_MODULE]
    grace = max(1, spec.termination_grace_period_seconds - EXIT_BARRIER_SECONDS)
    run = [
        *("python", "-m", names.LAUNCH_MODULE),
        f"--nodes={nodes}",
        f"--processes={max(1, gpus)}",
        f"--shutdown-timeout={grace}",
    ]
    if nodes > 1:
        run += [
            "--node=$(JOB_COMPLETION_INDEX)",
            f"--attempt-job={names.attempt_job(resource.name, number)}",
            f"--service={resource.name}",
            f"--startup-timeout={spec.startup_timeout_seconds}",
        ]
    return run


def trainer_pod(resource: Resource, spec: RLTrainingJobSpec, number: int, image: str) -> Object:
    """Spec of a trainer pod."""
    volumes, mounts = _volumes(resource, spec)
    container = {
        "name": names.TRAINER_CONTAINER,
        "image": spec.image or image,
        "imagePullPolicy": spec.image_pull_policy or "IfNotPresent",
        "command": command(resource, spec, number),
        "args": [f"{names.JOB_DIGEST_OPTION}={frozen.digest(frozen.text(resource, spec))}"],
        "env": [
            *_environment(spec),
            {"name": names.ATTEMPT_VARIABLE, "value": str(number)},
            *_replica_addresses(resource, spec),
        ],
        "ports": [{"name": "progress", "containerPort": names.TRAINER_PORT}],
        **_probes(spec),
        "resources": _resources(spec),
        "volumeMounts": mounts,
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "securityContext": _container_security(spec.capabilities),
    }
    if spec.env_from:
        container["envFrom"] = [e.model_dump(mode="json", by_alias=True) for e in spec.env_from]
    pod: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.termination_grace_period_seconds,
        **_pod_security(),
        "containers": [container],
        "volumes": volumes,
    }
    if spec.resources.nodes > 1:
        pod["subdomain"] = resource.name
    if spec.resources.claims:
        pod["resourceClaims"] = [
            {"name": names.device_claim(number), "resourceClaimTemplateName": claim.template}
            for number, claim in enumerate(spec.resources.claims)
        ]
    if spec.host_network:
        pod |= {
            "hostNetwork": True,
            "dnsPolicy": "ClusterFirstWithHostNet",
        }  # pods still find each other by their Service
    if spec.runtime_class_name:
        pod["runtimeClassName"] = spec.runtime_class_name
    if spec.topology_spread_constraints:
        mine = labels(resource, names.COMPONENT_TRAINER) | {names.LABEL_ATTEMPT: str(number)}
        pod["topologySpreadConstraints"] = [
            s.model_dump(mode="json", by_alias=True, exclude_none=True) | {"labelSelector": {"matchLabels": mine}}
            for s in spec.topology_spread_constraints
        ]
    return pod | _placement(spec)


def _probes(spec: RLTrainingJobSpec) -> Object:
    """What the kubelet asks the pod. A process that hangs ends itself; these are for one that cannot even do that."""
    ask = {"exec": {"command": ["python", "-m", names.PROBE_MODULE]}, "timeoutSeconds": 20}
    startup = spec.startup_timeout_seconds + spec.stall_timeout_seconds
    return {
        "startupProbe": {**ask, "periodSeconds": PROBE_SECONDS, "failureThreshold": -(-startup // PROBE_SECONDS) + 1},
        "livenessProbe": {
            **ask,
            "periodSeconds": PROBE_SECONDS,
            "failureThreshold": max(3, -(-spec.stall_timeout_seconds // PROBE_SECONDS)),
        },
    }


def files_pod(resource: Resource, spec: RLTrainingJobSpec, image: str) -> Object:
    """Pod that serves the output, read-only, on its loopback; clients come by port-forward. From a store it reads as the trainers do."""
    in_store = spec.output.uri is not None
    container: Object = {
        "name": names.COMPONENT_FILES,
        "image": spec.image or image,
        "imagePullPolicy": spec.image_pull_policy or "IfNotPresent",
        "command": ["python", "-m", names.FILES_MODULE],
        "env": [
            *(_environment(spec) if in_store else _scratch_environment()),
            {"name": names.JOB_DIGEST_VARIABLE, "value": frozen.digest(frozen.text(resource, spec))},
        ],
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "volumeMounts": [
            {"name": "output", "mountPath": names.OUTPUT_DIR, "readOnly": True},
            {"name": frozen.JOB_VOLUME, "mountPath": names.JOB_DIR, "readOnly": True},
            {"name": "home", "mountPath": names.HOME_DIR},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
        "securityContext": _container_security(),
    }
    further = [v for v in spec.volumes if in_store and (v.secret or v.config_map)]  # keys of the store, certificates
    container["volumeMounts"] += [
        {"name": VOLUME_PREFIX + volume.name, "mountPath": volume.path, "readOnly": True} for volume in further
    ]
    if in_store and spec.env_from:
        container["envFrom"] = [e.model_dump(mode="json", by_alias=True) for e in spec.env_from]
    near = {  # a ReadWriteOnce claim can be mounted by two pods of one node only
        "podAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 100,
                    "podAffinityTerm": {
                        "labelSelector": {"matchLabels": labels(resource, names.COMPONENT_TRAINER)},
                        "topologyKey": "kubernetes.io/hostname",
                    },
                }
            ]
        }
    }
    pod = {
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": 5,
        **_pod_security(),
        "containers": [container],
        "volumes": [
            _output_volume(resource, spec),
            {"name": frozen.JOB_VOLUME, "configMap": {"name": names.frozen_job(resource.name)}},
            {"name": "home", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            *map(_given_volume, further),
        ],
    }
    placement = _placement(spec) | ({} if in_store else {"affinity": near})
    meta = _meta(resource, names.files_pod(resource.name), component=names.COMPONENT_FILES)
    if in_store:  # by some of them clouds give a pod its identity
        meta["labels"] = spec.labels | meta["labels"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod | placement}


# --- rollout replicas


def _replica_addresses(resource: Resource, spec: RLTrainingJobSpec) -> list[Object]:
    """Where the trainer finds the replicas: it asks DNS, for it has no access to the API."""
    if not num_replicas(spec):
        return []
    value = f"{names.rollout(resource.name)}:{names.ROLLOUT_PORT}"
    return [{"name": names.ROLLOUT_ADDRESSES_VARIABLE, "value": value}]


def replica_selector(resource: Resource) -> dict[str, str]:
    return {names.LABEL_JOB_UID: resource.uid, names.LABEL_COMPONENT: names.COMPONENT_ROLLOUT}


def replica_service(resource: Resource) -> Object:
    """Headless Service whose name has the addresses of all replicas, ready or not: the trainer knows best which are."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(resource, names.rollout(resource.name)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": replica_selector(resource),
            "ports": [{"name": "rollout", "port": names.ROLLOUT_PORT}],
        },
    }


def replica_set(resource: Resource, spec: RLTrainingJobSpec, image: str) -> Object:
    """StatefulSet of the rollout replicas. It outlives attempts; its pods hold nothing that the trainer does not give them."""
    name = names.rollout(resource.name)
    pod_labels = spec.labels | labels(resource, names.COMPONENT_ROLLOUT)
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _meta(resource, name, component=names.COMPONENT_ROLLOUT),
        "spec": {
            "serviceName": name,
            "replicas": num_replicas(spec),
            "podManagementPolicy": "Parallel",
            "revisionHistoryLimit": 1,
            "selector": {"matchLabels": replica_selector(resource)},
            "template": {
                "metadata": {"labels": pod_labels, **({"annotations": spec.annotations} if spec.annotations else {})},
                "spec": replica_pod(resource, spec, image),
            },
        },
    }


def replica_pod(resource: Resource, spec: RLTrainingJobSpec, image: str) -> Object:
    """Spec of a rollout replica: it waits until a trainer of its job tells it which model to serve."""
    rollout = spec.rollout or RolloutSpec()
    ask = rollout.resources
    wanted = {
        "cpu": ask.cpu,
        "memory": ask.memory,
        "ephemeral-storage": ask.ephemeral_storage,
        spec.resources.gpu_resource: str(rollout.gpus_per_replica) if rollout.gpus_per_replica else None,
    }
    given = {name: amount for name, amount in wanted.items() if amount}
    program = ["python3", "-m", names.ROLLOUT_MODULE, f"--token-file={names.ROLLOUT_TOKEN_FILE}"]
    ask_it = {"exec": {"command": [*program, "--probe"]}, "timeoutSeconds": 20, "periodSeconds": PROBE_SECONDS}
    secret = {
        "secretName": names.run_secret(resource.name, resource.uid),
        "items": [{"key": names.ROLLOUT_TOKEN_KEY, "path": names.ROLLOUT_TOKEN_KEY}],
        "defaultMode": 0o440,
    }
    volumes: list[tuple[Object, str, bool]] = [
        ({"name": "run", "secret": secret}, names.TOKEN_DIR, True),
        ({"name": "home", "emptyDir": {}}, names.HOME_DIR, False),
        ({"name": "tmp", "emptyDir": {}}, "/tmp", False),
        ({"name": "cache", "emptyDir": {}}, names.CACHE_DIR, False),
        ({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": ask.shared_memory}}, "/dev/shm", False),
    ]
    container = {
        "name": names.ROLLOUT_CONTAINER,
        "image": rollout.image or image,
        "imagePullPolicy": spec.image_pull_policy or "IfNotPresent",
        "command": program,
        "env": [
            *_scratch_environment(),
            {"name": "HF_HOME", "value": f"{names.CACHE_DIR}/huggingface"},
            {"name": "XDG_CACHE_HOME", "value": f"{names.CACHE_DIR}/xdg"},
            {"name": "PYTHONUNBUFFERED", "value": "1"},
        ],
        "ports": [{"name": "rollout", "containerPort": names.ROLLOUT_PORT}],
        # while it waits or loads it is not healthy yet, and that takes as long as the trainer takes
        "startupProbe": {**ask_it, "failureThreshold": -(-spec.startup_timeout_seconds // PROBE_SECONDS) + 1},
        "livenessProbe": {**ask_it, "failureThreshold": REPLICA_PROBES},
        "resources": {"requests": DEFAULT_REQUESTS | given, **({"limits": given} if given else {})},
        "volumeMounts": [
            {"name": volume["name"], "mountPath": path, **({"readOnly": True} if read_only else {})}
            for volume, path, read_only in volumes
        ],
        "securityContext": _container_security(),
    }
    pod: Object = {
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": REPLICA_GRACE_SECONDS,
        **_pod_security(),
        "containers": [container],
        "volumes": [volume for volume, _, _ in volumes],
    }
    if spec.runtime_class_name:
        pod["runtimeClassName"] = spec.runtime_class_name
    return pod | _placement(spec)


def replica_content(resource: Resource, spec: RLTrainingJobSpec, image: str) -> str:
    """Fingerprint of the StatefulSet of replicas, as the operator makes it."""
    return fingerprint(replica_set(resource, spec, image)["spec"])


def _pod_security() -> Object:
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _container_security(capabilities: Sequence[str] = ()) -> Object:
    """Without any right but what is asked for: a program whose file carries such a capability then has it, and no other."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], **({"add": list(capabilities)} if capabilities else {})},
    }


def _placement(spec: RLTrainingJobSpec) -> Object:
    """The allow-listed fields of the pod that say where and as whom it runs; only those that are given."""
    found: Object = {
        "imagePullSecrets": [{"name": s.name} for s in spec.image_pull_secrets],
        "serviceAccountName": spec.service_account_name,
        "nodeSelector": spec.node_selector,
        "tolerations": [_toleration(t) for t in spec.tolerations],
        "affinity": spec.affinity,
        "priorityClassName": spec.priority_class_name,
        "schedulerName": spec.scheduler_name,
    }
    return {name: value for name, value in found.items() if value}


def _toleration(toleration: Toleration) -> Object:
    return toleration.model_dump(mode="json", by_alias=True, exclude_none=True)


def _resources(spec: RLTrainingJobSpec) -> Object:
    ask = spec.resources
    wanted = {
        "cpu": ask.cpu,
        "memory": ask.memory,
        "ephemeral-storage": ask.ephemeral_storage,
        ask.gpu_resource: str(ask.gpus_per_node) if ask.gpus_per_node and not ask.gpus_are_claimed else None,
        **{name: str(count) for name, count in ask.extra.items()},
    }
    given = {name: amount for name, amount in wanted.items() if amount}
    found: Object = {"requests": DEFAULT_REQUESTS | given, **({"limits": given} if given else {})}
    if ask.claims:
        found["claims"] = [{"name": names.device_claim(number)} for number in range(len(ask.claims))]
    return found


def _scratch_environment() -> list[Object]:
    return [{"name": "HOME", "value": names.HOME_DIR}, {"name": "TMPDIR", "value": "/tmp"}]


def _environment(spec: RLTrainingJobSpec) -> list[Object]:
    """The user's variables, after ours: what a user sets wins."""
    ours = [
        *_scratch_environment(),
        {"name": "HF_HOME", "value": f"{names.CACHE_DIR}/huggingface"},
        {"name": "XDG_CACHE_HOME", "value": f"{names.CACHE_DIR}/xdg"},
        {"name": names.CACHE_VARIABLE, "value": f"{names.CACHE_DIR}/nemo-rl"},
        {"name": "PYTHONUNBUFFERED", "value": "1"},
    ]
    theirs = {e.name for e in spec.env}
    return [e for e in ours if e["name"] not in theirs] + [_variable(e) for e in spec.env]


def _variable(variable: EnvVar) -> Object:
    return variable.model_dump(mode="json", by_alias=True, exclude_none=True)


def _claim_volume(name: str, claim: str, read_only: bool = False) -> Object:
    source: Object = {"claimName": claim}
    if read_only:
        source["readOnly"] = True
    return {"name": name, "persistentVolumeClaim": source}


def _output_volume(resource: Resource, spec: RLTrainingJobSpec) -> Object:
    """The claim; with a store a folder of the pod, from which the worker publishes."""
    if spec.output.uri:
        return {"name": "output", "emptyDir": {}}
    return _claim_volume("output", spec.output.claim or names.output_claim(resource.name))


def _volumes(resource: Resource, spec: RLTrainingJobSpec) -> tuple[list[Object], list[Object]]:
    """Volumes of a trainer pod and where they are mounted."""
    found: list[tuple[Object, str, bool]] = [
        (_output_volume(resource, spec), names.OUTPUT_DIR, False),
        ({"name": frozen.JOB_VOLUME, "configMap": {"name": names.frozen_job(resource.name)}}, names.JOB_DIR, True),
        ({"name": "home", "emptyDir": {}}, names.HOME_DIR, False),
        ({"name": "tmp", "emptyDir": {}}, "/tmp", False),
        (_cache_volume(spec), names.CACHE_DIR, False),
        (
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": spec.resources.shared_memory}},
            "/dev/shm",
            False,
        ),
    ]
    if _has_secret(spec):
        secret = {"secretName": names.run_secret(resource.name, resource.uid), "defaultMode": 0o440}
        found.append(({"name": "run", "secret": secret}, names.TOKEN_DIR, True))
    for number, bundle in enumerate(spec.bundles):
        if not bundle.config_maps:
            continue  # the pod reads it from the store
        parts = [
            {"configMap": {"name": part, "items": [{"key": names.BUNDLE_KEY, "path": names.bundle_part(index)}]}}
            for index, part in enumerate(bundle.config_maps)
        ]
        volume = {"name": f"bundle-{number}", "projected": {"sources": parts}}
        found.append((volume, f"{names.BUNDLE_DIR}/{bundle.name}", True))
    for number, claim in enumerate(read_claims(spec)):
        found.append((_claim_volume(f"claim-{number}", claim, True), f"{names.CLAIMS_DIR}/{claim}", True))
    found += [(_given_volume(given), given.path, given.read_only) for given in spec.volumes]
    mounts = [
        {"name": volume["name"], "mountPath": path, **({"readOnly": True} if read_only else {})}
        for volume, path, read_only in found
    ]
    return [volume for volume, _, _ in found], mounts


def _given_volume(given: VolumeSpec) -> Object:
    """A volume that the job names."""
    name = VOLUME_PREFIX + given.name
    if claim := given.persistent_volume_claim:
        return _claim_volume(name, claim.claim_name, claim.read_only)
    source: Object = {}
    if given.config_map:
        source = {"configMap": {"name": given.config_map.name}}
    elif given.secret:
        source = {"secret": {"secretName": given.secret.secret_name, "defaultMode": 0o440}}
    elif given.image:
        source = {"image": given.image.model_dump(mode="json", by_alias=True)}
    elif given.empty_dir:
        sizes = given.empty_dir.model_dump(mode="json", by_alias=True, exclude_none=True)
        source = {"emptyDir": {key: value for key, value in sizes.items() if value}}
    return {"name": name, **source}


def _cache_volume(spec: RLTrainingJobSpec) -> Object:
    return _claim_volume("cache", spec.cache.claim) if spec.cache.claim else {"name": "cache", "emptyDir": {}}


def read_claims(spec: RLTrainingJobSpec) -> list[str]:
    """Claims that pvc:// references of model and data name, each once."""
    sets: list[DatasetSpec | None] = [spec.dataset, spec.validation_dataset]
    paths = [spec.model, *(s.path for s in sets if s and s.path)]
    claims = [path.removeprefix("pvc://").split("/")[0] for path in paths if path.startswith("pvc://")]
    return list(dict.fromkeys(claims))
