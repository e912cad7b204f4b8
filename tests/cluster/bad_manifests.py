"""Manifests that must be refused, each with words that its refusal must have: the field, and what to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.api import Object
from cluster.manifests import bundle

DIGEST = "0" * 64
LONG = "a" * 51


@dataclass(frozen=True)
class Bad:
    """spec: changes to the smallest valid manifest of the algorithm. expected: fragments of the refusal."""

    why: str
    expected: tuple[str, ...]
    spec: Object = field(default_factory=dict)
    algorithm: str = "grpo"
    name: str | None = None


def bad(why: str, *expected: str, algorithm: str = "grpo", name: str | None = None, **spec: Any) -> Bad:
    return Bad(why, expected, spec, algorithm, name)


def deep(levels: int) -> Object:
    value: Any = {"key": "zone"}
    for _ in range(levels):
        value = {"nodeAffinity": value}
    return dict(value)


ANY_OF = "give exactly one of"
BAD = [
    # what is missing, or too much
    bad("no time to start", "spec.startupTimeoutSeconds", "greater than or equal to 1", startupTimeoutSeconds=0),
    bad("a stall of seconds", "spec.stallTimeoutSeconds", "greater than or equal to 10", stallTimeoutSeconds=9),
    bad("an unknown policy for nodes", "spec.onNodeLost", '"replace"', onNodeLost="recreate"),
    bad("no model", "spec.model", "Required", model=None),
    bad("empty model", "spec.model", "at least 1", model=""),
    bad("model of another type", "spec.model", "string", model=7),
    bad("no data", "spec.dataset", "Required", dataset=None),
    bad("no source of data", "spec.dataset", ANY_OF, "name, inline, path", dataset={"inline": None}),
    bad("two sources of data", "spec.dataset", ANY_OF, dataset={"name": "a/b"}),
    bad("no rows", "spec.dataset.inline", "at least 1", dataset={"inline": []}),
    bad("rows that are no mappings", "spec.dataset.inline", "object", dataset={"inline": ["2+2="]}),
    bad("no rows wanted", "spec.dataset.maxRows", "greater than or equal to 1", dataset={"maxRows": 0}),
    bad(
        "two sources of validation data", "spec.validationDataset", ANY_OF, validationDataset={"name": "a", "path": "b"}
    ),
    bad("grpo without reward", "grpo needs a reward", "spec.reward", reward=None),
    bad(
        "reward without a source", "spec.reward", ANY_OF, "function, source, bundle, builtin", reward={"builtin": None}
    ),
    bad("two rewards in one", "spec.reward", ANY_OF, reward={"source": "def reward(): ..."}),
    bad("unknown builtin", "spec.reward.builtin", '"math_answer"', reward={"builtin": "exact"}),
    bad("function without module", "spec.reward.function", "match", reward={"builtin": None, "function": "reward"}),
    bad("entrypoint of a builtin", "spec.reward", "entrypoint belongs to", reward={"entrypoint": "f"}),
    bad("source over 64 kB", "spec.reward.source", "65536", reward={"builtin": None, "source": "#" * 65537}),
    bad("impossible timeout", "spec.reward.timeoutSeconds", "greater than 0", reward={"timeoutSeconds": 0}),
    bad("unknown policy", "spec.reward.onError", '"raise", "zero", "drop"', reward={"onError": "ignore"}),
    bad("reward for sft", "remove spec.reward", algorithm="sft", reward={"builtin": "length"}),
    bad("unknown algorithm", "spec.algorithm", '"grpo", "sft", "dpo"', algorithm="sft", **{"algorithm_": "ppo"}),
    bad("section of another algorithm", "section dpo", "remove it", dpo={"beta": 0.2}),
    bad("section of grpo for sft", "section grpo", "remove it", algorithm="sft", grpo={}),
    bad("callback without code", "spec.callbacks[0]", ANY_OF, "function, bundle", callbacks=[{}]),
    # bundles
    bad(
        "reward of an unknown bundle", "spec.reward.bundle", "spec.bundles", reward={"builtin": None, "bundle": "code"}
    ),
    bad(
        "data of an unknown bundle",
        "spec.dataset.path",
        "spec.bundles",
        dataset={"inline": None, "path": "bundle://d/f"},
    ),
    bad(
        "a store and a claim", "spec.output.uri", "takes the place", output={"uri": "s3://bucket/run", "claim": "mine"}
    ),
    bad("a store that is none", "spec.output.uri", "address of an object store", output={"uri": "/data/run"}),
    bad("a store with a password", "spec.output.uri", "credentials", output={"uri": "s3://key:word@bucket/run"}),
    bad("model of an unknown bundle", "spec.model", "spec.bundles", model="bundle://weights"),
    bad("callback of an unknown bundle", "spec.callbacks", "spec.bundles", callbacks=[{"bundle": "code"}]),
    bad(
        "bundle that lies nowhere",
        "spec.bundles",
        "output.uri",
        bundles=[{"name": "c", "sha256": DIGEST, "configMaps": []}],
    ),
    bad("bundle of no digest", "sha256", "match", bundles=[{"name": "c", "sha256": "abc", "configMaps": ["p"]}]),
    bad("two bundles of one name", "spec.bundles[1]", "Duplicate value", bundles=[bundle("c", 1), bundle("c", 2)]),
    # numbers
    bad("no steps", "spec.training.maxSteps", "greater than or equal to 1", training={"maxSteps": 0}),
    bad("steps as text", "spec.training.maxSteps", "integer", training={"maxSteps": "many"}),
    bad("half a step", "spec.training.maxSteps", "integer", training={"maxSteps": 1.5}),
    bad("negative learning rate", "spec.training.learningRate", "greater than 0", training={"learningRate": -1}),
    bad("seed too large", "spec.training.seed", "4294967296", training={"seed": 2**32}),
    bad("unknown schedule", "spec.training.lrSchedule", '"cosine"', training={"lrSchedule": "step"}),
    bad(
        "group of one",
        "spec.grpo.numGenerationsPerPrompt",
        "greater than or equal to 2",
        grpo={"numGenerationsPerPrompt": 1},
    ),
    bad("temperature zero", "spec.grpo.temperature", "greater than 0", grpo={"temperature": 0}),
    bad("topP above one", "spec.grpo.topP", "less than or equal to 1", grpo={"topP": 1.1}),
    bad("label smoothing of a half", "spec.dpo.labelSmoothing", "0.5", algorithm="dpo", dpo={"labelSmoothing": 0.5}),
    bad("negative back-off limit", "spec.backoffLimit", "greater than or equal to 0", backoffLimit=-1),
    bad("no time at all", "spec.activeDeadlineSeconds", "greater than or equal to 1", activeDeadlineSeconds=0),
    bad(
        "negative time to live",
        "spec.ttlSecondsAfterFinished",
        "greater than or equal to 0",
        ttlSecondsAfterFinished=-1,
    ),
    # resources and pods
    bad("no nodes", "spec.resources.nodes", "greater than or equal to 1", resources={"nodes": 0}),
    bad("negative GPUs", "spec.resources.gpusPerNode", "greater than or equal to 0", resources={"gpusPerNode": -1}),
    bad("memory without sense", "spec.resources.memory", "match", resources={"memory": "lots"}),
    bad("memory of another unit", "spec.resources.memory", "match", resources={"memory": "4GB"}),
    bad("size without sense", "spec.output.size", "match", output={"size": "-1Gi"}),
    bad(
        "access mode that cannot write",
        "spec.output.accessMode",
        '"ReadWriteMany"',
        output={"accessMode": "ReadOnlyMany"},
    ),
    bad("time of no date", "spec.output.serveUntil", "date-time", output={"serveUntil": "tomorrow"}),
    bad("repository without owner", "spec.output.hub", "match", output={"hub": "my-model"}),
    bad("no step between lines", "spec.training.logEvery", "greater than or equal to 1", training={"logEvery": 0}),
    bad("pull policy of another case", "spec.imagePullPolicy", '"Always"', imagePullPolicy="always"),
    bad("variable without value", "spec.env[0]", ANY_OF, "value, valueFrom", env=[{"name": "A"}]),
    bad("variable of no name", "spec.env[0].name", "match", env=[{"name": "1 A", "value": "b"}]),
    bad("token in clear", "spec.env[0]", "Secret", env=[{"name": "HF_TOKEN", "value": "hf_" + "a" * 30}]),
    bad("operator's label", "spec.labels", "use another key", labels={"nemo-rl.io/job": "another"}),
    bad("device of no domain", "spec.resources.extra", "none of kubernetes.io", resources={"extra": {"hca": 1}}),
    bad(
        "device of the core",
        "spec.resources.extra",
        "none of kubernetes.io",
        resources={"extra": {"kubernetes.io/a": 1}},
    ),
    bad("no device", "spec.resources.extra", "greater than or equal to 1", resources={"extra": {"rdma/hca": 0}}),
    bad(
        "GPU of the core",
        "spec.resources.gpuResource",
        "no extended resource",
        resources={"gpuResource": "kubernetes.io/a"},
    ),
    bad(
        *("GPUs twice", "spec.resources.extra", "that gpusPerNode counts"),
        resources={"gpuResource": "amd.com/gpu", "extra": {"amd.com/gpu": 1}},
    ),
    bad(
        *("several slices", "spec.resources.gpusPerNode", "one MIG slice only"),
        resources={"gpusPerNode": 2, "gpuResource": "nvidia.com/mig-3g.40gb"},
    ),
    bad(
        *("least places of a wish", "spec.topologySpreadConstraints[0].minDomains", "DoNotSchedule"),
        topologySpreadConstraints=[{"topologyKey": "a", "minDomains": 2, "whenUnsatisfiable": "ScheduleAnyway"}],
    ),
    bad(
        *("GPUs of a claim, but none", "spec.resources.gpusPerNode", "but gpusPerNode is 0"),
        resources={"gpusPerNode": 0, "claims": [{"template": "a", "gpus": True}]},
    ),
    bad("template twice", "spec.resources.claims", resources={"claims": [{"template": "a"}, {"template": "a"}]}),
    bad("volume of the node", "spec.volumes", "hostPath", volumes=[{"name": "a", "hostPath": {"path": "/"}}]),
    bad("volume of nothing", "spec.volumes[0]", "exactly one of configMap, secret", volumes=[{"name": "a"}]),
    bad(
        *("volume of two kinds", "spec.volumes[0]", "exactly one of configMap, secret"),
        volumes=[{"name": "a", "emptyDir": {}, "secret": {"secretName": "b"}}],
    ),
    bad(
        *("volume over the output", "spec.volumes[0].mountPath", "/output", "mount it elsewhere"),
        volumes=[{"name": "a", "mountPath": "/output", "emptyDir": {}}],
    ),
    bad(
        *("volume over the frozen job", "spec.volumes[0].mountPath", "/etc/nemo-rl", "mount it elsewhere"),
        volumes=[{"name": "a", "mountPath": "/etc", "configMap": {"name": "b"}}],
    ),
    bad(
        *("volume on a way up", "spec.volumes[0].mountPath", "match"),
        volumes=[{"name": "a", "mountPath": "/a/../output", "emptyDir": {}}],
    ),
    bad(
        *("volumes within each other", "mounted at /a and /a/b", "mount them apart"),
        volumes=[
            {"name": "a", "mountPath": "/a", "emptyDir": {}},
            {"name": "b", "mountPath": "/a/b", "emptyDir": {}},
        ],
    ),
    bad("another capability", "spec.capabilities[0]", '"IPC_LOCK"', capabilities=["SYS_ADMIN"]),
    bad("unknown effect", "spec.tolerations[0].effect", '"NoSchedule"', tolerations=[{"key": "a", "effect": "Never"}]),
    bad("affinity of no sense", "affinity", affinity={"nodeAffinity": "any"}),
    bad("affinity without an end", "affinity", affinity=deep(30)),
    bad("label value with spaces", "labels", labels={"team": "not a label value"}),
    bad("selector of no label", "nodeSelector", nodeSelector={"a b": "c"}),
    bad("claim of no name", "claim", output={"claim": "Not A Name"}),
    bad("service account of no name", "serviceAccountName", serviceAccountName="Not A Name"),
    # names
    bad("name too long for its children", "at most 50 characters", name=LONG),
    bad("name with a dot", "metadata.name", name="a.b"),
    bad("name that begins with a digit", "metadata.name", "begin with a letter", name="1a"),
    # words that do not exist
    bad("misspelt field", "training.maxStep", "unknown field", training={"maxStep": 1}),
    bad("field of Python", "training.max_steps", "unknown field", training={"max_steps": 1}),
    bad("a pod spec", "spec.template", "unknown field", template={"spec": {}}),
]
