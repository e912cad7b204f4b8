"""What `rollout=` of a call may be, and what it means."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_rl.api.keywords import build_spec
from nemo_rl.backends.local import ignored
from nemo_rl.rollout.sync import LENGTHS, NEW_TOKENS, Verdict, mean_difference, mismatch, probe_prompts


def spec(**keywords: Any) -> Any:
    return build_spec("model", "data", "exact_match", **keywords)


def test_an_interpreter_or_addresses_mean_vllm() -> None:
    assert spec().rollout is None
    assert spec(rollout_python=Path("/opt/vllm/bin/python")).rollout.python == "/opt/vllm/bin/python"
    for rollout in (spec(rollout={"rollout_python": "/p"}), spec(rollout="vllm", rollout_python="/p")):
        assert (rollout.rollout.engine, rollout.rollout.python) == ("vllm", "/p")
    one = spec(rollout={"engine": "vllm", "urls": "http://10.0.0.7:8000"}).rollout
    assert one.urls == ["http://10.0.0.7:8000"]
    assert spec(rollout="in_process").rollout.engine == "in_process"


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        (
            {"rollout": "vllm"},
            "needs python, an interpreter that has vLLM, urls of servers, or replicas, .* found none of them",
        ),
        ({"rollout": {"engine": "vllm", "urls": ["http://a:1"], "python": "/p"}}, r"found 2 of them \(python, urls\)"),
        ({"rollout": {"engine": "vllm", "replicas": 2, "python": "/p"}}, r"found 2 of them \(python, replicas\)"),
        ({"rollout": {"replicas": 2}}, "replicas belongs to engine vllm, but engine is in_process"),
        ({"rollout": {"engine": "vllm", "replicas": 0}}, r"rollout\.replicas"),
        ({"rollout_python": "/p", "rollout": {"gpus_per_replica": 2}}, "gpus_per_replica belongs to replicas"),
        (
            {"rollout": {"engine": "vllm", "replicas": 2, "weight_transfer": "files"}},
            "share no folder with the trainer",
        ),
        ({"rollout": {"engine": "vllm", "urls": ["http://a:1"], "sleep": True}}, "sleep belongs to python"),
        ({"rollout_python": "/p", "rollout": {"sleep": True, "max_staleness": 1}}, "sleep with max_staleness 1"),
        ({"rollout": {"urls": ["http://a:1"]}}, "urls belongs to engine vllm, but engine is in_process"),
        ({"rollout": {"engine": "sglang"}}, "rollout.engine='sglang'"),
        ({"rollout": {"engine": "vllm", "url": "http://a:1"}}, "rollout.url"),
        ({"rollout": {"engine": "vllm", "urls": ["a:1"]}}, r"rollout\.urls"),
        ({"rollout_python": "/p", "top_k": 5, "temperature": 0.7}, "set temperature to 1"),
        ({"rollout": {"engine": "vllm", "python": "/p", "weight_transfer": "adapter"}}, "no adapter is trained"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(keywords: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec(**keywords)


def test_other_algorithms_sample_nothing() -> None:
    with pytest.raises(TypeError, match="rollout_python belongs to algorithm grpo"):
        build_spec("model", "data", algorithm="sft", rollout_python="/p")


def test_a_rollout_of_another_kind_is_said() -> None:
    with pytest.raises(TypeError, match="rollout has type int; expected a mapping"):
        spec(rollout=3)


def test_this_machine_uses_it() -> None:
    assert ignored(SimpleNamespace(spec=spec(rollout_python="/p", image="i"))) == ["image"]


def test_the_probe_is_ragged_and_fits_the_server() -> None:
    prompts = probe_prompts(97, 40)
    assert [len(prompt) for prompt in prompts] == [min(length, 40 - NEW_TOKENS) for length in LENGTHS]
    assert prompts == probe_prompts(97, 40) and all(0 <= token < 97 for prompt in prompts for token in prompt)


def test_the_difference_is_the_mean_over_tokens_and_never_hides_a_nan() -> None:
    assert mean_difference([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-3.25]]) == pytest.approx(0.25)
    assert mean_difference([[float("nan")]], [[-1.0]]) == float("inf")
    assert not Verdict("a", float("inf"), 0.1).good
    assert not Verdict("a", None, 0.1).good, "what was not measured is not good"


def test_the_message_says_version_server_numbers_and_cause() -> None:
    verdicts = [Verdict("http://a:1", 3.14, 0.001), Verdict("http://b:1", None, 0.001, "it does not answer")]
    text = mismatch(7, verdicts, tied=True, dtype="bfloat16", trained="float32")
    for part in (
        "version 7",
        "http://a:1",
        "3.14",
        "0.001",
        "tied embeddings",
        "another model",
        "bfloat16",
        "b:1: it does not",
    ):
        assert part in text
