"""The chart's objects: the definition as generated, least rights, restricted pods, several releases side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts import CHART, ROOT, Object, helm, helm_program, program, render
from generated import load
from nemo_rl.job import changes, names

CRD = "nemo-rl.io_rltrainingjobs.yaml"
KEEP = "  annotations:\n    helm.sh/resource-policy: keep\n"
Objects = list[Object]


def of_kind(objects: Objects, kind: str) -> Objects:
    return [found for found in objects if found["kind"] == kind]


def test_helm_finds_nothing_to_complain_about():
    result = helm("lint", "--strict", str(CHART))
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_charts_definition_is_the_generated_one_byte_by_byte():
    assert (CHART / "files" / CRD).read_bytes() == (ROOT / "crds" / CRD).read_bytes(), (
        f"run: cp crds/{CRD} {CHART.relative_to(ROOT)}/files/"
    )


def test_the_rendered_definition_is_the_generated_one_but_for_its_annotations():
    text = helm("template", "rl", str(CHART), "--show-only", "templates/crd.yaml").stdout
    assert text.count(KEEP) == 3, (
        "on the definition, and on the policy and the binding that hold as long as jobs are left"
    )
    generated = list(yaml.safe_load_all((ROOT / "crds" / CRD).read_text()))
    assert list(yaml.safe_load_all(text.replace(KEEP, ""))) == generated


def test_the_definition_can_be_left_to_others():
    left_out = render({"crds": {"enabled": False}, "admissionPolicy": {"enabled": False}})
    for kind in ("CustomResourceDefinition", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"):
        assert of_kind(left_out, kind) == []


def test_what_may_change_is_checked_whatever_else_the_administrator_allows():
    objects = render({"admissionPolicy": {"enabled": False}})
    for kind in ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"):
        assert [found["metadata"]["name"] for found in of_kind(objects, kind)] == [changes.NAME]


def test_versions_are_those_of_the_package():
    import nemo_rl

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (nemo_rl.__version__, nemo_rl.__version__)


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["a", "b"]}])
def test_no_rule_of_the_operator_reaches_secrets_or_runs_commands(values: Any):
    objects = render(values, hooks=True)
    users = of_kind(render({"userRoles": {"create": False}, **values}, hooks=True), "ClusterRole")
    roles = users + of_kind(objects, "Role")
    rules = [rule for role in roles for rule in role["rules"]]
    assert rules
    for rule in rules:
        if rule["resources"] == ["secrets"]:
            assert rule["verbs"] == ["create"], "a token is written once, and never read back"
            continue
        assert not {"secrets", "pods/exec", "pods/attach", "pods/portforward", "*"} & set(rule["resources"]), rule
        assert not {"*", "escalate", "bind", "impersonate"} & set(rule["verbs"]), rule
        assert "*" not in rule["apiGroups"]


def test_with_a_list_of_namespaces_nothing_is_granted_elsewhere():
    objects = render({"watchNamespaces": ["a", "b"], "userRoles": {"create": False}, "tests": {"enabled": False}})
    cluster = of_kind(objects, "ClusterRole")
    assert [r["resources"] for role in cluster for r in role["rules"]] == [
        ["customresourcedefinitions"],
        ["resourceflavors", "workloadpriorityclasses"],
        ["priorityclasses"],
        ["namespaces"],
    ]
    of_clusters = {verb for role in cluster for rule in role["rules"] for verb in rule["verbs"]}
    assert of_clusters == {"get", "list", "watch"}, "kinds without a namespace are read, and nothing else"
    assert {role["metadata"]["namespace"] for role in of_kind(objects, "Role")} == {"a", "b"}
    command = of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert [word for word in command if word.startswith("--")] == ["--namespace=a", "--namespace=b"]


def test_the_operators_pod_is_restricted():
    for kind in ("Deployment", "Pod"):
        found = of_kind(render(hooks=True), kind)[0]
        pod = found["spec"]["template"]["spec"] if kind == "Deployment" else found["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]["memory"]


def test_the_deployment_starts_the_operator_as_its_command_line_wants():
    container = of_kind(render(), "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]
    code = "import sys, typer.main; from nemo_rl_operator.main import app, run\n"
    code += "command = typer.main.get_command(app).commands['run']\n"
    code += "import json; print(json.dumps([[p.envvar, *p.opts] for p in command.params]))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "operator"
    )
    known = {word for words in json.loads(out.stdout) for word in words}
    assert {e["name"] for e in container["env"]} <= known
    assert "--namespace" in known
    ports = {p["name"]: str(p["containerPort"]) for p in container["ports"]}
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert environment["NEMO_RL_OPERATOR_HEALTH_PORT"] == ports["health"]
    assert environment["NEMO_RL_OPERATOR_METRICS_PORT"] == ports["metrics"]


def test_the_page_is_off_and_where_it_is_on_has_no_rights_and_is_started_as_its_command_wants():
    assert not [found for found in render() if "ui" in found["metadata"]["name"].split("-")]
    values = {"ui": {"enabled": True, "hosts": ["jobs.example.com"], "from": [{"podSelector": {}}]}}
    before, objects = render(), render(values)
    added = [found for found in objects if found not in before]
    assert sorted(found["kind"] for found in added) == ["Deployment", "NetworkPolicy", "Service"]
    deployment, policy, service = (of_kind(added, kind)[0] for kind in ("Deployment", "NetworkPolicy", "Service"))
    pod = deployment["spec"]["template"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in pod["spec"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    [container] = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for chooser in (
        deployment["spec"]["selector"]["matchLabels"],
        policy["spec"]["podSelector"]["matchLabels"],
        service["spec"]["selector"],
    ):
        assert chooser.items() <= pod["metadata"]["labels"].items()
    operator = next(found for found in of_kind(before, "Deployment"))["spec"]["selector"]["matchLabels"]
    assert not operator.items() <= pod["metadata"]["labels"].items()
    python, module, program, command, *options = container["command"]
    assert (python, module, program, command) == ("python", "-m", "nemo_rl.cli.main", "ui")
    assert "--viewer-tokens" in options
    assert "--allow-host=jobs.example.com" in options
    from typer.main import get_command

    from nemo_rl.cli.main import app

    known = {word for option in get_command(app).commands["ui"].params for word in option.opts}
    assert {option.split("=")[0] for option in options} <= known
    [authority] = [option.split("=")[1] for option in options if option.startswith("--certificate-authority=")]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert authority == f"{mounts['authority']}/ca.crt"
    assert policy["spec"]["ingress"][0]["from"] == [{"podSelector": {}}]
    closed = [found for found in render({"ui": {"enabled": True}}) if found["kind"] == "NetworkPolicy"]
    assert [found["spec"]["ingress"] for found in closed if found["metadata"]["name"].endswith("-ui")] == [[]]


def test_two_releases_share_no_name():
    def identities(release: str, namespace: str) -> set[tuple[str, str, str]]:
        values = {"watchNamespaces": [namespace], "crds": {"enabled": False}, "userRoles": {"create": False}}
        objects = render(values, release=release, namespace=namespace, hooks=True)
        assert len(objects) > 10
        return {(o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]) for o in objects}

    first = identities("rl", "team-a")
    assert not first & identities("rl", "team-b")
    assert not first & identities("other", "team-a")


def test_policies_select_what_the_operator_really_labels():
    values = {"metrics": {"podMonitor": {"enabled": True}}}
    objects = render(values)
    policies = {p["metadata"]["name"]: p for p in of_kind(objects, "NetworkPolicy")}
    (deployment,) = of_kind(objects, "Deployment")
    environment = {e["name"]: e.get("value") for e in deployment["spec"]["template"]["spec"]["containers"][0]["env"]}
    network = json.loads(environment[names.NETWORK_VARIABLE])
    assert [rule["ports"] for rule in network["ingress"]] == [[{"port": names.TRAINER_PORT, "protocol": "TCP"}]]
    (peer,) = network["ingress"][0]["from"]
    assert peer["podSelector"]["matchLabels"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    to_trainers = policies["rl"]["spec"]["egress"][-1]
    assert to_trainers["ports"] == [{"port": names.TRAINER_PORT}]
    monitor = of_kind(objects, "PodMonitor")[0]["spec"]
    assert set(monitor["podTargetLabels"]) == {names.LABEL_JOB, names.LABEL_ALGORITHM}
    assert monitor["selector"]["matchLabels"][names.LABEL_COMPONENT] == names.COMPONENT_TRAINER


def test_metrics_are_for_those_who_are_named():
    def ingress(**values: object) -> list[dict]:
        (policy,) = of_kind(render({"networkPolicy": values}), "NetworkPolicy")
        return policy["spec"]["ingress"]

    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert ingress() == [{"ports": [{"port": "health"}]}]
    assert ingress(metricsFrom=[peer])[1:] == [{"ports": [{"port": "metrics"}], "from": [peer]}]


def test_the_doctor_finds_the_operator_by_its_label():
    from nemo_rl.cli import cluster_checks

    key, _, value = cluster_checks._OPERATOR_LABEL.partition("=")
    assert of_kind(render(), "Deployment")[0]["metadata"]["labels"][key] == value


def test_the_kustomize_base_is_what_the_chart_renders():
    generate = load(ROOT / "deploy" / "generate.py")
    files = generate.files(helm_program())
    there = {path.name: path.read_text() for path in generate.BASE.glob("*.yaml")}
    assert there == files, "run: python deploy/generate.py"


def test_kustomize_builds_the_base():
    kubectl = program("kubectl")
    result = subprocess.run([kubectl, "kustomize", ROOT / "deploy" / "base"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    objects = [found for found in yaml.safe_load_all(result.stdout) if found]
    assert {"CustomResourceDefinition", "Deployment", "ClusterRole", "Namespace"} <= {o["kind"] for o in objects}
    assert "helm" not in json.dumps([o["metadata"] for o in objects]).lower()


def test_the_model_of_helm_test_is_one_that_trains(tmp_path: Path):
    import nemo_rl

    for name, content in load(CHART / "files" / "helm_test.py").tiny_model().items():
        (tmp_path / name).write_bytes(content)
    rows = [{"prompt": "one two", "completion": "three four"}]
    result = nemo_rl.train(
        str(tmp_path), rows, algorithm="sft", max_steps=1, batch_size=1, backend="local", output_dir=tmp_path / "out"
    )
    assert result.total_steps == 1
