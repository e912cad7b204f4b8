"""What of a job may change after its creation, as the ValidatingAdmissionPolicy that is installed with the definition.

The rules are no part of the definition: those are evaluated at each write of a status too, which changes nothing of a
specification, and were half of what it cost the API server. Where somebody removed the policy, the operator trains the
job as it was when it started, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nemo_rl.job import names

Schema = dict[str, Any]

MUTABLE = frozenset(
    {"spec.suspend", "spec.backoffLimit", "spec.activeDeadlineSeconds", "spec.ttlSecondsAfterFinished"}
    | {"spec.output.serveUntil", "spec.rollout.replicas", "spec.budget"}
)
"""All that may change after creation, at any time."""

MUTABLE_WHILE_SUSPENDED = (
    "spec.resources",
    "spec.training.tokensPerMicrobatch",
    "spec.training.activationCheckpointing",
)
"""What may change besides once no pod of the job runs: the next attempt has it."""

NAME = f"changes.{names.CRD_NAME}"
"""Of the policy and of its binding."""

FIXED_MESSAGE = "cannot change after creation; delete the job and create a new one"
SUSPENDED_MESSAGE = (
    "may change only while the job is suspended: set spec.suspend to true, wait for the phase Suspended, "
    "change it, and set spec.suspend to false"
)
NODES_MESSAGE = (
    "spec.resources.nodes cannot go from one to several, or back: the claim that was made for the output can be "
    "mounted by one node only, or by several; a job that names output.uri, output.claim or output.accessMode may"
)
REPLICAS_MESSAGE = "spec.rollout.replicas may change, but neither come nor go; set spec.suspend to free all pods"


def policy(spec: Schema) -> Schema:
    """The policy of a specification with this structural schema. It compares values as they are, whatever their types, so
    that a field of another version of the definition is compared too. Null is the same as nothing."""
    sections = [
        name
        for name, node in spec["properties"].items()
        if "properties" in node and f"spec.{name}" not in {*MUTABLE, *MUTABLE_WHILE_SUSPENDED}
    ]
    top = _changed("variables.now", "variables.before", "'spec.'", " && !(k in variables.sections)")
    within = _changed("variables.now[s]", "variables.before[s]", "'spec.' + s + '.'")
    both = " && ".join(f"s in variables.{root} && type(variables.{root}[s]) == map" for root in ("now", "before"))
    picked = (
        "([variables.top] + variables.within).map(paths, paths.filter(p, {which}).join(', ')).filter(text, text != '')"
    )
    suspended = _listed(MUTABLE_WHILE_SUSPENDED)
    variables = {
        "now": "dyn(object.spec)",
        "before": "dyn(oldObject.spec)",
        "sections": f"{_listed(sections)}.filter(s, {both})",
        "top": top,
        "within": f"variables.sections.map(s, {within})",
        "fixed": picked.format(which=f"!(p in {_listed(MUTABLE)}) && !(p in {suspended})"),
        "ofSuspended": picked.format(which=f"p in {suspended}"),
        "suspended": "'suspend' in variables.before && variables.before.suspend && has(oldObject.status) "
        "&& has(oldObject.status.phase) && dyn(oldObject.status.phase) == 'Suspended'",
        "sizes": "[variables.now, variables.before].map(spec, 'resources' in spec && 'nodes' in spec.resources && spec.resources.nodes > 1)",
        "replicas": "[variables.now, variables.before].map(spec, 'replicas' in spec.rollout && spec.rollout.replicas != null)",
    }
    given = "['uri', 'claim', 'accessMode'].exists(k, k in variables.now.output && variables.now.output[k] != null)"
    validations = [  # the first that fails is what the user reads
        ("!('rollout' in variables.sections) || variables.replicas[0] == variables.replicas[1]", REPLICAS_MESSAGE, ""),
        ("size(variables.fixed) == 0", FIXED_MESSAGE, "variables.fixed"),
        ("size(variables.ofSuspended) == 0 || variables.suspended", SUSPENDED_MESSAGE, "variables.ofSuspended"),
        (f"variables.sizes[0] == variables.sizes[1] || ('output' in variables.sections && {given})", NODES_MESSAGE, ""),
    ]
    rule = {
        "apiGroups": [names.GROUP],
        "apiVersions": ["*"],
        "operations": ["UPDATE"],
        "resources": [names.PLURAL],  # not the status; of kubectl scale, the definition refuses what cannot be
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": NAME},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [rule]},
            "matchConditions": [{"name": "changed", "expression": "object.spec != oldObject.spec"}],
            "variables": [{"name": name, "expression": text} for name, text in variables.items()],
            "validations": [_validation(*validation) for validation in validations],
        },
    }


def _changed(now: str, before: str, prefix: str, condition: str = "") -> str:
    """CEL: paths of the values of a map that are not as before."""
    keys = f"({now}.map(k, k) + {before}.filter(k, !(k in {now})))"
    differs = f"(k in {now} ? {now}[k] : null) != (k in {before} ? {before}[k] : null)"
    return f"{keys}.filter(k, {differs}{condition}).map(k, {prefix} + k)"


def _listed(words: Iterable[str]) -> str:
    return "[" + ", ".join(f"'{word}'" for word in sorted(words)) + "]"


def _validation(rule: str, message: str, paths: str) -> Schema:
    if not paths:
        return {"expression": rule, "message": message}
    return {
        "expression": rule,
        "message": f"what was changed {message}",  # where the names of all fields are too long
        "messageExpression": f"{paths}.join(', ') + ' {message}'",
    }


def binding() -> Schema:
    """What puts the policy in force, in all namespaces."""
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": NAME},
        "spec": {"policyName": NAME, "validationActions": ["Deny"]},
    }
