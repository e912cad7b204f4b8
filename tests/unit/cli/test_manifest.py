"""The YAML form of a job: what is read, what is refused with file, line and field, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nemo_rl.job.manifest import ManifestError, load_manifest, name_problem, parse_manifest

JOB = """\
apiVersion: nemo-rl.io/v1alpha1
kind: RLTrainingJob
metadata:
  name: sums
  labels: {kueue.x-k8s.io/queue-name: team}
spec:
  model: org/model
  dataset:
    inline:
      - {prompt: "1+1=", answer: "2"}
  reward:
    source: |
      def reward(prompt, response, answer):
          return float(answer in response)
  training:
    maxSteps: 3
    learningRate: 1e-5
"""


def test_a_job_is_read():
    job = parse_manifest(JOB)
    assert (job.name, job.namespace, job.labels) == ("sums", None, {"kueue.x-k8s.io/queue-name": "team"})
    assert (job.spec.training.max_steps, job.spec.training.learning_rate) == (3, 1e-5)
    assert job.spec.reward is not None
    assert "answer in response" in (job.spec.reward.source or "")


def test_what_is_printed_reads_back_the_same_and_holds_only_what_was_given():
    job = parse_manifest(JOB)
    printed = job.to_yaml()
    assert parse_manifest(printed) == job
    assert yaml.safe_load(printed)["spec"]["training"] == {"maxSteps": 3, "learningRate": 1e-5}
    assert "source: |" in printed


def test_json_is_read_too_even_with_tabs():
    text = json.dumps(parse_manifest(JOB).to_dict(), indent="\t")
    assert parse_manifest(text) == parse_manifest(JOB)


def test_what_the_api_server_adds_is_passed_over():
    added = (
        JOB.replace("  name: sums", "  name: sums\n  uid: abc\n  resourceVersion: '7'") + "status: {phase: Running}\n"
    )
    assert parse_manifest(added) == parse_manifest(JOB)


def test_the_job_is_found_among_other_documents():
    text = "kind: ConfigMap\n---\n" + JOB
    assert parse_manifest(text) == parse_manifest(JOB)
    with pytest.raises(ManifestError, match=r"job.yaml:18: spec.training.maxStep: unknown"):
        parse_manifest(text.replace("maxSteps", "maxStep"))


def test_a_date_is_text_as_kubernetes_reads_it():
    text = JOB + "  output: {serveUntil: 2030-01-01T00:00:00Z}\n"
    assert parse_manifest(text).spec.output.serve_until == "2030-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("maxSteps: 3", "maxStep: 3", "job.yaml:16: spec.training.maxStep: unknown field; did you mean maxSteps?"),
        ("maxSteps: 3", "max_steps: 3", "job.yaml:16: spec.training.max_steps: unknown field; did you mean maxSteps?"),
        ("maxSteps: 3", "maxSteps: 0", "job.yaml:16: spec.training.maxSteps: found 0, must be greater than or equal"),
        ("maxSteps: 3", "maxSteps: many", "job.yaml:16: spec.training.maxSteps: found 'many', must be a valid integer"),
        ("maxSteps: 3", "zzz: 3", "spec.training.zzz: unknown field; expected one of maxSteps"),
        ("maxSteps: 3", "maxSteps: 3\n    maxSteps: 4", ":17: spec.training.maxSteps: given twice, first in line 16"),
        ("  training:", "  trainin:", "job.yaml:15: spec.trainin: unknown field; did you mean training?"),
        ("    source: |", "    surce: |", "job.yaml:12: spec.reward.surce: unknown field; did you mean source?"),
        ("  model: org/model\n", "", "job.yaml:6: spec.model: missing; it is required"),
        ("  model: org/model", "  model: org/model\n  algorithm: GRPO", "spec.algorithm: found 'GRPO', must be 'grpo'"),
        ("  model: org/model", "  model: org/model\n  algorithm: sft", ":6: spec: sft uses no reward; remove"),
        ("  model: org/model", "  model: org/model\n  dpo: {beta: 1}", "section dpo belongs to algorithm dpo"),
        ("  model: org/model", "  model: org/model\n  resources: 3", "job.yaml:8: spec.resources: found 3"),
        ("    inline:", "    name: org/d\n    inline:", "spec.dataset: found name and inline; give exactly one of"),
        ("  name: sums", "  name: Sums", "job.yaml:4: metadata.name: 'Sums' must be lower-case"),
        ("  name: sums", "  nam: sums", "job.yaml:4: metadata.nam: unknown field; did you mean name?"),
        ("  name: sums\n", "", "metadata.name: missing"),
        ("  name: sums", "  name: sums\n  namespace: A", "job.yaml:5: metadata.namespace: 'A' must be"),
        (": team}", ": 3}", "job.yaml:5: metadata.labels: must map names to texts"),
        ("kind: RLTrainingJob", "kind: RLTraining", "found 0 documents of kind RLTrainingJob (of kinds: RLTraining)"),
        ("v1alpha1", "v1", "job.yaml:1: apiVersion: found 'nemo-rl.io/v1', expected 'nemo-rl.io/v1alpha1'"),
        ("spec:", "spce:", "job.yaml:6: spce: unknown field; did you mean spec?"),
        ("  dataset:", "  dataset: [", "job.yaml:10: no valid YAML"),
    ],
)  # fmt: skip
def test_an_error_says_file_line_field_and_cure(old: str, new: str, message: str):
    with pytest.raises(ManifestError) as caught:
        parse_manifest(JOB.replace(old, new, 1))
    assert message in str(caught.value)


def test_all_problems_are_said_at_once():
    with pytest.raises(ManifestError) as caught:
        parse_manifest(JOB.replace("maxSteps: 3", "maxSteps: 0\n    bachSize: 1"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", JOB + "---\n" + JOB, "[1, 2]", "text"])
def test_anything_but_exactly_one_job_is_refused(text: str):
    with pytest.raises(ManifestError, match=r"found [02] documents of kind RLTrainingJob .*expected exactly one"):
        parse_manifest(text)


def test_the_value_of_an_environment_variable_is_not_repeated():
    with pytest.raises(ManifestError, match="env") as caught:
        parse_manifest(JOB + "  env: [{name: 'a b', value: hunter2}]\n")
    assert "hunter2" not in str(caught.value)


def test_a_document_that_contains_itself_is_refused_or_read_but_never_hangs():
    with pytest.raises(ManifestError):
        parse_manifest(JOB + "  affinity: &a {x: *a}\n  zzz: 1\n")


# --- overrides


def test_overrides_are_yaml_values_and_make_missing_sections():
    job = parse_manifest(
        JOB,
        overrides=[
            *("training.maxSteps=10", "grpo.temperature=0.5", "metadata.name=other", "training.saveEvery=null"),
            *("dataset.inline.0.prompt='2+2='", "spec.model=a/b", "reward.source=null", "reward.builtin=exact_match"),
        ],
    )
    assert (job.name, job.spec.model, job.spec.training.max_steps, job.spec.training.save_every) == (
        "other",
        "a/b",
        10,
        None,
    )
    assert job.spec.dataset.inline == [{"prompt": "2+2=", "answer": "2"}]
    assert job.spec.reward is not None
    assert job.spec.reward.builtin == "exact_match"
    assert job.spec.settings.temperature == 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.maxStep=1", "--set: spec.training.maxStep: unknown field; did you mean maxSteps?"),
        ("training.maxSteps=0", "--set: spec.training.maxSteps: found 0"),
        ("training.maxSteps", "expected path=value"),
        ("=3", "expected path=value"),
        ("training..x=3", "expected path=value"),
        ("model.x=3", "spec.model has no fields"),
        ("dataset.inline.7.prompt=x", "there is no spec.dataset.inline[7]"),
        ("training.maxSteps=[", "the value is no YAML"),
        ("metadata.name=UP", "--set: metadata.name: 'UP'"),
    ],
)
def test_an_override_that_cannot_be_is_refused(override: str, message: str):
    with pytest.raises(ManifestError) as caught:
        parse_manifest(JOB, overrides=[override])
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ManifestError, match=r"missing.yaml: cannot be read"):
        load_manifest(tmp_path / "missing.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="is not UTF-8"):
        load_manifest(tmp_path / "binary")


@pytest.mark.parametrize("name", ["a", "a-b1", "a" * 50])
def test_good_names(name: str):
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", "A", "1a", "a-", "a.b", "a_b", "a" * 51, 3, None, "a\n"])
def test_bad_names(name: object):
    assert name_problem(name)
