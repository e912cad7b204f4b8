"""Runs of `train()` whose completions a real vLLM server samples."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import nemo_rl
from nemo_rl.errors import WeightSyncMismatch
from nemo_rl.rollout.vllm.client import COMPLETIONS, Client
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.server import ServerProcess
from nemo_rl.rollout.vllm.weights import Published, Publisher
from real_vllm.conftest import STARTUP_SECONDS, WIDE, served_alone
from real_vllm.test_agreement import move
from unit.trainers.conftest import write_model

pytestmark = pytest.mark.timeout(3600)
SLEEP = "/sleep?level=2"
ROWS = [{"prompt": f"{i % 10}={i // 10}"} for i in range(16)]
STEPS = 12


def many_a(prompt: str, response: str) -> float:
    return response.count("a") / 8


def train(model: str, output: Path, rollout: dict[str, Any], **keywords: Any) -> Any:
    return nemo_rl.train(
        model,
        ROWS,
        many_a,
        algorithm="grpo",
        output_dir=output,
        backend="local",
        **{
            "max_steps": STEPS,
            "max_epochs": STEPS,
            "batch_size": 4,
            "num_generations_per_prompt": 8,
            "max_new_tokens": 8,
            "learning_rate": 1e-2,
            "rollout": {"engine": "vllm", "timeout_seconds": STARTUP_SECONDS, **rollout},
            **keywords,
        },
    )


def check(result: Any) -> None:
    """A run that learned, and of which every step has passed the gate."""
    history = result.history
    assert [record["step"] for record in history] == list(range(1, STEPS + 1))
    assert all(record["rollout_probe"] <= 1e-4 for record in history if "rollout_probe" in record)
    assert history[-1]["reward"] > history[0]["reward"] + 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its embeddings are tied."""
    return write_model(tmp_path_factory.mktemp("model"), hidden_size=WIDE)


def decided(folder: Path, seed: int = 0) -> str:
    """A model whose tokens are not all as likely, so that weights of another one show as they do in practice."""
    return write_model(folder, hidden_size=WIDE, seed=seed, initializer_range=0.2)


@pytest.fixture(scope="module")
def serve(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server as somebody else would, for `urls`; ends it with the tests of this module."""
    started: list[ServerProcess] = []

    def start(model: str, *options: str) -> ServerProcess:
        started.append(served_alone(vllm_python, model, tmp_path_factory.mktemp("server") / "vllm.log", *options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def served(serve: Callable[..., ServerProcess], model: str) -> ServerProcess:
    return serve(model, "--load-format", "dummy")


@pytest.fixture
def urls(served: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv(TOKEN_VARIABLE, served.token)
    return {"urls": [served.client.url]}


@pytest.mark.vllm_short
def test_an_interpreter_with_vllm_is_all_that_a_run_needs(cold_python: str, model: str, tmp_path: Path) -> None:
    result = train(model, tmp_path / "out", {"rollout_python": cold_python})
    check(result)
    assert all(record["weight_sync_seconds"] > 0 for record in result.history)
    assert "Traceback" not in (tmp_path / "out" / "rollout" / "vllm.log").read_text()


def test_a_server_that_sleeps_while_the_model_trains(
    vllm_python: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU build sleeps, too, though it has no memory to give back: it samples nothing until it is woken."""
    asked: list[str] = []
    request = Client._request

    def watched(client: Client, method: str, path: str, *arguments: Any) -> Any:
        asked.append(path)
        return request(client, method, path, *arguments)

    monkeypatch.setattr(Client, "_request", watched)
    check(train(model, tmp_path / "out", {"rollout_python": vllm_python, "sleep": True}))
    awake = True
    for path in asked:
        if path in (SLEEP, "/wake_up"):
            assert awake == (path == SLEEP)
            awake = not awake
        else:
            assert awake or path not in (COMPLETIONS, "/update_weights")
    assert asked.count(SLEEP) == STEPS


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_a_server_of_somebody_else_gets_weights_by_http_and_may_run_ahead(
    staleness: int, urls: dict[str, Any], model: str, tmp_path: Path
) -> None:
    result = train(model, tmp_path / "out", {**urls, "max_staleness": staleness})
    check(result)
    found = [record.get("rollout_staleness") for record in result.history]
    # of a step whose rewards are all equal nothing is trained, and nothing measured
    errors = [record["rollout_logprob_error"] for record in result.history if "rollout_logprob_error" in record]
    if staleness == 0:
        assert found == [None] * STEPS
        assert max(errors) <= 1e-4
    else:
        assert all(0 <= value <= staleness for value in found)
        assert max(found) > 0
        assert max(errors) > 1e-3, "it is measured"


# --- faults of an update: each is caught at the first one, before anything is trained


def without_ties(published: Published, model: Any) -> Published:
    """As vLLM reloads a checkpoint of tied embeddings: lm_head.weight is not among its names."""
    return dataclasses.replace(published, tied={})


def of_another_version(published: Published, model: Any) -> Published:
    later = copy.deepcopy(model)
    move(later, 3)
    return _other(published, later)


def truncated(published: Published, model: Any) -> Published:
    file = published.folder / published.files[0]["name"]
    file.write_bytes(file.read_bytes()[:-64])
    return published


def of_another_model(published: Published, model: Any) -> Published:
    folder = decided(published.folder.parent / "another", seed=5)
    return _other(published, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def _other(published: Published, model: Any) -> Published:
    other = Publisher(published.folder.parent, torch.float32).publish(model, published.version)
    assert other is not None
    return dataclasses.replace(other, name=published.name)


FAULTS = {
    without_ties: "tied embeddings",
    of_another_version: "the weights of another version",
    truncated: r"ended after \d+ of \d+ bytes",
    of_another_model: "the server holds another model",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_the_first_update_stops_the_run_before_anything_is_trained(
    fault: Any, urls: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Publisher.publish

    def faulty(self: Publisher, trained: Any, version: int, **options: Any) -> Any:
        published = publish(self, trained, version, **options)
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr(Publisher, "publish", publish)
            return fault(published, trained)

    monkeypatch.setattr(Publisher, "publish", faulty)
    with pytest.raises(WeightSyncMismatch, match="no rollout server samples with version 0 of the weights") as raised:
        train(decided(tmp_path / "model"), tmp_path / "out", urls)
    monkeypatch.undo()
    assert raised.match(FAULTS[fault])
    metrics = tmp_path / "out" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()


def test_an_adapter_on_a_server_of_another_base_stops_the_run(
    serve: Callable[..., ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here nothing but the gate can see it: the server's own weights never travel."""
    options = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "1")
    other = serve(decided(tmp_path / "other", seed=5), *options)
    monkeypatch.setenv(TOKEN_VARIABLE, other.token)
    with pytest.raises(WeightSyncMismatch, match=r"differ by .* nats a token .* another model"):
        train(decided(tmp_path / "model"), tmp_path / "out", {"urls": [other.client.url]}, lora_rank=8)


def test_an_interpreter_without_vllm_is_said_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no vLLM; install it there, for example: .* -m pip install 'vllm>=0.30,<0.34'"
    ):
        nemo_rl.train(
            write_model(tmp_path / "model"),
            [{"prompt": "1"}],
            many_a,
            output_dir=tmp_path / "out",
            max_new_tokens=4,
            rollout_python=sys.executable,
        )
