"""Rollouts that run ahead of training: versions, order, what a killed run goes on with, and the time that it saves."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from nemo_rl.rollout.in_process.engine import InProcess
from unit.rollout.fake import TOKEN, FakeServer
from unit.trainers.test_interrupted import STEPS, Runs, Terminate


def ahead(staleness: int, **keywords: Any) -> dict[str, Any]:
    return {"rollout": {"max_staleness": staleness}, **keywords}


def test_on_policy_it_is_the_same_run(tiny_model: str, tmp_path: Path) -> None:
    plain = Runs("grpo", tiny_model)
    expected = plain.outcome(plain.run(tmp_path / "plain"), tmp_path / "plain")
    runs = Runs("grpo", tiny_model, **ahead(0))
    assert runs.outcome(runs.run(tmp_path / "zero"), tmp_path / "zero") == expected


@pytest.mark.parametrize("staleness", [1, 4])
def test_each_step_trains_its_own_prompts_of_weights_that_are_as_old_as_allowed(
    staleness: int, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, list[int]]] = []
    generate = InProcess.generate

    def seen(self: InProcess, requests: Any, sampling: Any, *, step: int, **options: Any) -> Any:
        if step:  # 0 is an evaluation
            asked.append((step, self.version, [request.key for request in requests]))
        return generate(self, requests, sampling, step=step, **options)

    monkeypatch.setattr(InProcess, "generate", seen)
    on_policy = Runs("grpo", tiny_model)
    on_policy.run(tmp_path / "on_policy")
    prompts = {step: keys for step, _, keys in asked}
    asked.clear()
    runs = Runs("grpo", tiny_model, **ahead(staleness))
    result = runs.run(tmp_path / "ahead")
    assert [(step, version) for step, version, _ in asked] == [
        (step, max(0, step - 1 - staleness)) for step in range(1, STEPS + 1)
    ]
    assert {step: keys for step, _, keys in asked} == prompts
    history = [line for line in result.history if line["step"]]
    assert [line["rollout_staleness"] for line in history] == [min(step - 1, staleness) for step in range(1, STEPS + 1)]
    assert history[0]["rollout_logprob_error"] < 1e-5, "the first is on policy"
    assert history[-1]["rollout_logprob_error"] > 1e-3, "and the last is not"
    assert all("importance_bounded_fraction" in line for line in history), "importance correction is on"


class Crash(nemo_rl.Callback):
    """As a process that is killed before a step: nothing is saved then."""

    def on_step_begin(self, trainer: Any, step: int) -> None:
        if step == 5:
            raise ZeroDivisionError


@pytest.mark.parametrize("how", ["stopped in its evaluation", "stopped before a step", "killed"])
def test_a_run_that_ended_trains_what_it_had_sampled(
    how: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs("grpo", tiny_model, **ahead(2))
    expected = runs.outcome(runs.run(tmp_path / "unbroken"), tmp_path / "unbroken")
    output = tmp_path / "broken"
    if how == "killed":
        runs.more_callbacks = lambda: [Crash()]
        with pytest.raises(ZeroDivisionError):
            runs.run(output)
        runs.more_callbacks = list
    else:
        terminate = Terminate(in_evaluation_of=3) if "evaluation" in how else Terminate(before=4)
        assert runs.stopped(output, terminate).step == 3
    state = json.loads((output / "checkpoints" / "step-00000003" / "state.json").read_text())["state"]
    assert [batch["step"] for batch in state["rollouts_ahead"]] == [4, 5]
    sampled: list[int] = []
    generate = InProcess.generate

    def seen(self: InProcess, requests: Any, *arguments: Any, step: int, **options: Any) -> Any:
        sampled.extend(step for _ in requests)
        return generate(self, requests, *arguments, step=step, **options)

    monkeypatch.setattr(InProcess, "generate", seen)
    assert runs.outcome(runs.run(output), output) == expected
    assert not any(sampled), "all that was to train was sampled before"


def wait_for_a_while(prompt: str, response: str) -> float:
    time.sleep(0.02)
    return response.count("a") / 6


def test_slow_rewards_overlap_with_training_and_sampling(tiny_model: str, tmp_path: Path) -> None:
    """16 calls of 0.02 s a step, one after the other: on policy each step waits for them."""
    waited = {}
    for staleness in (0, 1, 2):
        result = nemo_rl.train(
            tiny_model,
            [{"prompt": f"{i}="} for i in range(10, 22)],
            wait_for_a_while,
            output_dir=tmp_path / str(staleness),
            backend="local",
            log_level="warning",
            max_steps=6,
            max_epochs=9,
            batch_size=4,
            num_generations_per_prompt=4,
            max_new_tokens=6,
            callbacks=[Think(0.4)],
            **ahead(staleness),
        )
        waited[staleness] = sum(line["reward_seconds"] for line in result.history[2:])
    assert waited[0] > 4 * 0.2
    assert waited[1] < 0.5 * waited[0]
    assert waited[2] < 0.5 * waited[0]


class Think(nemo_rl.Callback):
    """Takes its time after each step, as training of a larger model does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        time.sleep(self.seconds)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NEMO_RL_ROLLOUT_TOKEN", TOKEN)
    server = FakeServer(tokens=15)
    yield server
    server.close()


def by_server(server: FakeServer, staleness: int) -> dict[str, Any]:
    # the tokens are the fake's, not the model's: what the gate says of them is another test's
    return {"rollout": {"engine": "vllm", "urls": [server.url], "mismatch_limit": 10, "max_staleness": staleness}}


def test_a_server_samples_while_the_trainer_trains(tiny_model: str, tmp_path: Path, server: FakeServer) -> None:
    training = threading.Event()
    overlapped: list[bool] = []
    complete = server.complete

    def seen(handler: Any, content: Any) -> Any:
        if content["n"] > 1:  # else it is of the gate or of an evaluation
            overlapped.append(len(overlapped) >= 4 and training.wait(2))  # the first step has nothing to overlap with
        return complete(handler, content)

    server.complete = seen  # type: ignore[method-assign]

    class Watch(nemo_rl.Callback):
        def on_step_begin(self, trainer: Any, step: int) -> None:
            if step == 1:
                make = trainer.train_on

                def train_on(*arguments: Any) -> Any:
                    training.set()
                    time.sleep(0.3)
                    try:
                        return make(*arguments)
                    finally:
                        training.clear()

                trainer.train_on = train_on

    runs = Runs("grpo", tiny_model, **by_server(server, 1))
    runs.more_callbacks = lambda: [Watch()]
    result = runs.run(tmp_path / "out")
    history = [line for line in result.history if line["step"]]
    assert [line["step"] for line in history] == list(range(1, STEPS + 1))
    assert all(0 <= line["rollout_staleness"] <= 1 for line in history)
    assert any(overlapped)


def test_a_run_by_a_server_that_is_stopped_while_it_samples_trains_each_group_once(
    tiny_model: str, tmp_path: Path, server: FakeServer
) -> None:
    """The fake's tokens depend on prompt, seed and step alone: what was trained shows in the completions."""
    runs = Runs("grpo", tiny_model, **by_server(server, 2))
    expected = runs.outcome(runs.run(tmp_path / "unbroken"), tmp_path / "unbroken")
    output, complete = tmp_path / "broken", server.complete
    counted: list[int] = []

    def seen(handler: Any, content: Any) -> Any:
        if content["n"] > 1:  # else it is of the gate or of an evaluation
            counted.append(1)
            if len(counted) == 14:  # of the fourth batch, while the second or the third is trained
                time.sleep(0.3)  # what was asked before is answered
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
        return complete(handler, content)

    server.complete = seen  # type: ignore[method-assign]
    stopped = runs.stopped(output, Terminate())
    assert stopped.step > 0
    state = json.loads((Path(str(stopped.checkpoint_path)) / "state.json").read_text())["state"]
    groups = sum(len(batch["groups"]) for batch in state["rollouts_ahead"])
    assert groups >= 13 - 4 * stopped.step > 0, "all that was answered is trained or kept"
    before = len(counted)
    found = runs.outcome(runs.run(output), output)
    assert len(counted) - before == 4 * (STEPS - stopped.step) - groups, "no group is sampled twice"
    assert [line["completion"] for line in found["completions"]] == [
        line["completion"] for line in expected["completions"]
    ]
    assert [line["step"] for line in found["history"]] == [line["step"] for line in expected["history"]]


def test_nothing_runs_ahead_of_dynamic_sampling() -> None:
    from nemo_rl.api.keywords import build_spec

    with pytest.raises(ValueError, match="max_staleness=1 with dynamic_sampling_rounds=2"):
        build_spec("model", "data", "exact_match", dynamic_sampling_rounds=2, **ahead(1))
