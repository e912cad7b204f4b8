"""The CustomResourceDefinition, generated from the pydantic models: `python -m nemo_rl.job.crd` prints it.

With it comes the policy that says what of a job may change (`changes`).

`structural` turns pydantic's JSON schema into the subset that the API server takes and raises on everything else. Rules
that a schema cannot say (one of several fields) are CEL, in `RULES`, with the words that a user reads.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic.alias_generators import to_camel

from nemo_rl.job import changes, names
from nemo_rl.job.spec import (
    ALGORITHMS,
    CORE_RESOURCES,
    RESOURCE_NAME,
    TAKEN_PATHS,
    VOLUME_KINDS,
    RLTrainingJobSpec,
)
from nemo_rl.job.status import JobStatus

Schema = dict[str, Any]

KEPT = frozenset(
    {"type", "description", "format", "default", "enum", "required", "nullable", "properties", "items"}
    | {"minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
    | {"pattern", "additionalProperties"}
)
FORBIDDEN = ("prefixItems", "patternProperties", "not", "if", "dependentRequired", "propertyNames")


class UnsupportedSchemaError(TypeError):
    """A model uses what a structural schema cannot say; the message gives the path within the model."""


def structural(schema: Schema) -> Schema:
    """pydantic's JSON schema (by alias) as a Kubernetes structural schema. Raises `UnsupportedSchemaError`."""
    return _convert(schema, schema.get("$defs", {}), "$", ())


def _convert(node: Schema, models: Schema, path: str, seen: tuple[str, ...]) -> Schema:
    node, seen = _inline(node, models, path, seen)
    for word in FORBIDDEN:
        if word in node:
            raise UnsupportedSchemaError(f"{path}: {word} is not structural")
    out: Schema = {k: v for k, v in node.items() if k in KEPT or k.startswith("x-kubernetes-")}
    if "const" in node:
        out["enum"] = [node["const"]]
    for bound, sign in (("Minimum", ">"), ("Maximum", "<")):
        if f"exclusive{bound}" in node:  # OpenAPI 3.0 has a boolean beside the bound
            value = out[bound.lower()] = node[f"exclusive{bound}"]
            if value == int(value):
                out[f"exclusive{bound}"] = True
            else:  # the API server rounds the bound towards zero for integers, and so would refuse 0 < 0.5
                out["x-kubernetes-validations"] = [_rule(f"self {sign} {value}", f"must be {sign} {value}")]
    if "default" in out and out["default"] is None:
        del out["default"]
        if "enum" in out:
            # kubectl would refuse a definition with null among words; where null is not allowed, the server drops it
            out.pop("nullable", None)
    if out.get("nullable") and "enum" in out:
        raise UnsupportedSchemaError(f"{path}: one of several words or null, where null is not the default")
    if "properties" in out:
        out["properties"] = {n: _convert(p, models, f"{path}.{n}", seen) for n, p in out["properties"].items()}
        out.pop("additionalProperties", None)
        if isinstance(out.get("default"), dict):
            out["default"] = {}  # the defaults of its fields are applied by the server
    else:
        _free_object(out, models, path, seen)
    if "items" in out:
        out["items"] = _convert(out["items"], models, f"{path}[]", seen)
    if "type" not in out and not out.get("x-kubernetes-preserve-unknown-fields"):
        raise UnsupportedSchemaError(f"{path}: no type")
    return out


def _inline(node: Schema, models: Schema, path: str, seen: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
    """Replace references by what they name, and `X or null` by a nullable X. What stands beside a reference wins."""
    while True:
        if "$ref" in node:
            name = node["$ref"].rsplit("/", 1)[1]
            if name in seen:
                raise UnsupportedSchemaError(f"{path}: model {name} contains itself")
            node = {**models[name], **{k: v for k, v in node.items() if k != "$ref"}}
            seen = (*seen, name)
        elif "anyOf" in node:
            rest = {k: v for k, v in node.items() if k != "anyOf"}
            members = [m for m in node["anyOf"] if m.get("type") != "null"]
            if len(members) != 1:
                raise UnsupportedSchemaError(
                    f"{path}: a union of {len(members)} types; use optional fields and a CEL rule"
                )
            node = {**members[0], **rest, "nullable": True}
        else:
            return node, seen


def _free_object(out: Schema, models: Schema, path: str, seen: tuple[str, ...]) -> None:
    values = out.pop("additionalProperties", None)
    if isinstance(values, dict) and values:
        out["additionalProperties"] = _convert(values, models, f"{path}.*", seen)
    elif values is True or values == {}:
        out["x-kubernetes-preserve-unknown-fields"] = True


def _rule(rule: str, message: str, field: str | None = None) -> Schema:
    return {"rule": rule, "message": message} | ({"fieldPath": field} if field else {})


def _count(*fields: str) -> str:
    return " + ".join(f"(has(self.{f}) ? 1 : 0)" for f in fields)


def _exactly_one(*fields: str) -> Schema:
    return _rule(f"{_count(*fields)} == 1", f"give exactly one of {', '.join(fields)}")


def _add(node: Schema, *rules: Schema) -> None:
    node["x-kubernetes-validations"] = [*node.get("x-kubernetes-validations", ()), *rules]


TOKEN = (
    r"^(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-\S{16,}|nvapi-\S{16,}|AKIA[A-Z0-9]{12,})"
)
"""Literal values of environment variables that are clearly credentials"""

_BUNDLES = "self.bundles.exists(b, b.name == {name})"
_PATH_BUNDLE = "self.{field}.substring(9).split('/')[0]"


def _bundle_rules() -> list[Schema]:
    """Every bundle that is named must be listed."""

    def known(present: str, name: str, where: str) -> Schema:
        return _rule(
            f"!({present}) || ({_BUNDLES.format(name=name)})",
            f"{where} names a bundle that is not listed in spec.bundles",
            "." + where.removeprefix("spec."),
        )

    rules = [
        known("has(self.reward) && has(self.reward.bundle)", "self.reward.bundle", "spec.reward.bundle"),
        known("self.model.startsWith('bundle://')", _PATH_BUNDLE.format(field="model"), "spec.model"),
    ]
    for section, present in (("dataset", ""), ("validationDataset", "has(self.validationDataset) && ")):
        path = f"self.{section}.path"
        rules.append(
            known(
                f"{present}has({path}) && {path}.startsWith('bundle://')",
                _PATH_BUNDLE.format(field=f"{section}.path"),
                f"spec.{section}.path",
            )
        )
    rules.append(
        _rule(
            f"self.callbacks.all(c, !has(c.bundle) || ({_BUNDLES.format(name='c.bundle')}))",
            "spec.callbacks names a bundle that is not listed in spec.bundles",
            ".callbacks",
        )
    )
    rules.append(
        _rule(
            "self.bundles.all(b, size(b.configMaps) > 0) || (has(self.output) && has(self.output.uri))",
            "a bundle without configMaps is read from the store of output.uri; give one",
            ".bundles",
        )
    )
    return rules


def _spec_rules() -> list[Schema]:
    rules = [
        _rule("has(self.reward) || self.algorithm != 'grpo'", "grpo needs a reward; give spec.reward", ".reward"),
        _rule(
            "!has(self.reward) || self.algorithm == 'grpo'",
            "only grpo uses a reward; remove spec.reward or choose algorithm grpo",
            ".reward",
        ),
    ]
    for section in ALGORITHMS:
        rules.append(
            _rule(
                f"!has(self.{section}) || self.algorithm == '{section}'",
                f"section {section} belongs to algorithm {section}, which is not the chosen one; remove it",
                f".{section}",
            )
        )
    return rules + _bundle_rules()


PREFIX_RULE = _rule(
    f"self.all(k, !k.startsWith('{names.GROUP}/') && !k.startsWith('batch.kubernetes.io/'))",
    f"keys that start with {names.GROUP}/ or batch.kubernetes.io/ are set by the operator; use another key",
)

KEY_RULE = _rule(
    "self.all(k, k.matches('^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$'))",
    "keys have at most 63 letters, digits, '-', '_' and '.', after an optional prefix such as example.org/",
)
VALUE_RULE = _rule(
    "self.all(k, self[k].matches('^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$'))",
    "values have at most 63 letters, digits, '-', '_' and '.', and begin and end with a letter or digit",
)

RESOURCE_RULE = _rule(
    f"self.all(k, k.size() <= 253 && k.matches('{RESOURCE_NAME}') && !k.contains('{CORE_RESOURCES}'))",
    "names are those of extended resources, with the domain of the device plugin (rdma/hca, nvidia.com/mig-3g.40gb), "
    "and none of kubernetes.io",
)

RULES: dict[str, list[Schema]] = {
    "dataset": [_exactly_one("name", "inline", "path")],
    "validationDataset": [_exactly_one("name", "inline", "path")],
    "reward": [
        _exactly_one("function", "source", "bundle", "builtin"),
        _rule(
            "!has(self.entrypoint) || has(self.source) || has(self.bundle)",
            "entrypoint belongs to source or bundle; a function carries its own name after the colon",
            ".entrypoint",
        ),
    ],
    "callbacks[]": [_exactly_one("function", "bundle")],
    "rollout": [
        _rule(
            "!has(self.engine) || self.engine != 'vllm' || (has(self.python) ? 1 : 0) + (has(self.urls) && self.urls.size() > 0 ? 1 : 0) + "
            "(has(self.replicas) ? 1 : 0) == 1",
            "engine vllm needs one of python, urls and replicas; give exactly one of them",
        ),
        _rule(
            "!has(self.replicas) || (has(self.engine) && self.engine == 'vllm')",
            "replicas are vLLM servers, but engine is in_process; set engine to vllm",
            ".replicas",
        ),
        _rule(
            "!has(self.replicas) || !has(self.weightTransfer) || self.weightTransfer != 'files'",
            "replicas share no folder with the trainer; use weightTransfer http, or leave it out",
            ".weightTransfer",
        ),
        _rule(
            "has(self.replicas) || (!has(self.image) && (!has(self.gpusPerReplica) || self.gpusPerReplica == 1))",
            "image and gpusPerReplica belong to replicas; give replicas, or leave them out",
        ),
    ],
    "env[]": [
        _exactly_one("value", "valueFrom"),
        _rule(
            f"!has(self.value) || !self.value.matches(r'{TOKEN}')",
            "this value looks like an access token, which everybody who can read the job could read; "
            "put it in a Secret and use valueFrom.secretKeyRef",
            ".value",
        ),
    ],
    "output": [
        _rule(
            "!has(self.uri) || !(has(self.claim) || has(self.storageClassName) || has(self.accessMode))",
            "uri takes the place of a claim: remove claim, storageClassName and accessMode, or remove uri",
            ".uri",
        ),
        _rule(
            "!has(self.uri) || self.uri.matches('^(s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._-]+[A-Za-z0-9](/[^/?#@]+)*/?$')",
            "uri is the address of an object store, without credentials: s3://bucket/folder, gs://bucket/folder or "
            "az://container/folder",
            ".uri",
        ),
    ],
    "resources": [
        _rule(
            "!has(self.extra) || !has(self.gpuResource) || !(self.gpuResource in self.extra)",
            "extra names the resource that gpusPerNode counts; give its number there alone",
            ".extra",
        ),
        _rule(
            "!has(self.gpusPerNode) || !has(self.gpuResource) || self.gpusPerNode <= 1 || "
            "!self.gpuResource.contains('/mig-')",
            "a process sees one MIG slice only; give gpusPerNode 1, and more nodes",
            ".gpusPerNode",
        ),
        _rule(
            "!has(self.claims) || !self.claims.exists(c, c.gpus) || (has(self.gpusPerNode) && self.gpusPerNode > 0)",
            "claims give GPUs (gpus: true), but gpusPerNode is 0; give the number that each pod gets",
            ".gpusPerNode",
        ),
    ],
    "resources.extra": [RESOURCE_RULE],
    "resources.gpuResource": [
        _rule(
            f"!self.contains('{CORE_RESOURCES}')",
            "this is no extended resource; give the name by which the device plugin offers GPUs, such as amd.com/gpu",
        )
    ],
    "topologySpreadConstraints[]": [
        _rule(
            "!has(self.minDomains) || self.whenUnsatisfiable == 'DoNotSchedule'",
            "minDomains belongs to whenUnsatisfiable DoNotSchedule; remove one of them",
            ".minDomains",
        )
    ],
    "volumes[]": [
        _exactly_one(*(to_camel(kind) for kind in VOLUME_KINDS)),
        _rule(
            f"!has(self.mountPath) || {list(TAKEN_PATHS)}.all(p, "
            "!(self.mountPath + '/').startsWith(p + '/') && !(p + '/').startsWith(self.mountPath + '/'))",
            f"mountPath is in the way of what the pod has of its own: {', '.join(TAKEN_PATHS)}; mount it elsewhere",
            ".mountPath",
        ),
    ],
    "labels": [PREFIX_RULE, KEY_RULE, VALUE_RULE],
    "annotations": [PREFIX_RULE, KEY_RULE],
    "nodeSelector": [KEY_RULE, VALUE_RULE],
}
"""CEL rules of sections, by path within the spec."""

COLUMNS = (
    ("Algo", ".spec.algorithm", "string", 0),
    ("Model", ".spec.model", "string", 0),
    ("Phase", ".status.phase", "string", 0),
    ("Step", ".status.progress.text", "string", 0),
    ("Score", ".status.score", "string", 0),
    ("ETA", ".status.progress.eta", "string", 0),
    ("Age", ".metadata.creationTimestamp", "date", 0),
    ("GPUs", ".status.gpus", "integer", 1),
    ("Queue", r".metadata.labels.kueue\.x-k8s\.io/queue-name", "string", 1),
    ("Attempt", ".status.attempt", "integer", 1),
    ("Replicas", ".status.rollout.text", "string", 1),
    ("Waits-For", ".status.bottleneck.phase", "string", 1),
    ("Reason", ".status.reason", "string", 1),
    ("Checkpoint", ".status.checkpoint.latest", "string", 1),
)
"""Columns of `kubectl get`; those with priority 1 only with -o wide."""


def _at(schema: Schema, path: str) -> Schema:
    for part in path.split("."):
        schema = schema["properties"][part.removesuffix("[]")]
        if part.endswith("[]"):
            schema = schema["items"]
    return schema


def spec_schema() -> Schema:
    """Structural schema of `spec`, with its rules."""
    schema = structural(RLTrainingJobSpec.model_json_schema(by_alias=True))
    for path, rules in RULES.items():
        _add(_at(schema, path), *rules)
    for path in ("bundles", "env", "volumes"):
        _at(schema, path).update({"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]})
    _at(schema, "resources.claims").update(
        {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["template"]}
    )
    _add(schema, *_spec_rules())
    return schema


def crd() -> Schema:
    """The CustomResourceDefinition."""
    root = {
        "type": "object",
        "description": "A post-training run (GRPO, SFT or DPO) of a language model on this cluster.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{names.API_VERSION}."},
            "kind": {"type": "string", "description": f"{names.KIND}."},
            "metadata": {"type": "object"},
            "spec": spec_schema(),
            "status": structural(JobStatus.model_json_schema(by_alias=True, mode="validation")),
        },
        "x-kubernetes-validations": [
            _rule(
                f"self.metadata.name.size() <= {names.MAX_NAME_LENGTH} && "
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                f"metadata.name must have at most {names.MAX_NAME_LENGTH} characters, begin with a letter and "
                "consist of a-z, 0-9 and '-' (pods and a Service are named after it)",
            ),
        ],
    }
    columns = [
        {"name": name, "jsonPath": path, "type": kind, **({"priority": wide} if wide else {})}
        for name, path, kind, wide in COLUMNS
    ]
    version = {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": root},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.rollout.replicas",
                "statusReplicasPath": ".status.rollout.replicas",
                "labelSelectorPath": ".status.rollout.selector",
            },
        },
        "additionalPrinterColumns": columns,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": names.CRD_NAME},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME],
                "categories": ["ml"],
            },
            "scope": "Namespaced",
            "versions": [version],
        },
    }


class _Plain(yaml.SafeDumper):
    """Writes equal parts twice rather than as anchor and alias, which few people can read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def documents() -> list[Schema]:
    """All that defines the resource in a cluster, in the order in which it is made."""
    return [crd(), changes.policy(spec_schema()), changes.binding()]


def crd_yaml() -> str:
    """The CustomResourceDefinition, and the policy of what may change, as YAML, as they stand in `crds/`."""
    head = "# Generated from nemo_rl/job by `nemo-rl crd`; do not edit.\n"
    return head + yaml.dump_all(documents(), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    print(crd_yaml(), end="")
