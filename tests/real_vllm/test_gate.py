"""Planted faults of a weight update, with a real vLLM server: each stops the run at the first update, and none trains."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rl.errors import WeightSyncMismatch
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.engine import InProcess
from nemo_rl.rollout.protocol import Sampling
from nemo_rl.rollout.vllm.engine import VLLMRollouts
from nemo_rl.rollout.vllm.weights import Publisher
from real_vllm.conftest import ENDS, WIDE, Start
from real_vllm.test_agreement import REQUESTS, difference, move, plain_logprobs
from unit.engine.tiny import make_model
from unit.rollout.test_server import gone

pytestmark = pytest.mark.timeout(3600)
_versions = iter(range(1, 10**6))


@pytest.fixture
def server(tied: tuple[VLLMRollouts, Policy]) -> Iterator[tuple[VLLMRollouts, Policy]]:
    """The shared server; after a fault it is brought back to the weights of the trainer."""
    yield tied
    engine, policy = tied
    engine.update(policy, next(_versions))


def plant(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    original = Publisher.publish

    def publish(self: Publisher, *arguments: Any, **further: Any) -> Any:
        return change(original(self, *arguments, **further))

    monkeypatch.setattr(Publisher, "publish", publish)


@pytest.mark.vllm_short
def test_reloading_tied_embeddings_as_vllm_does_it_is_caught(
    server: tuple[VLLMRollouts, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a tied model has no lm_head.weight; this build of vLLM then keeps the old one, and reports success."""
    engine, policy = server
    engine.update(policy, next(_versions))
    move(policy.model, 11)
    with monkeypatch.context() as planted:
        plant(planted, lambda published: dataclasses.replace(published, tied={}))
        version = next(_versions)
        with pytest.raises(
            WeightSyncMismatch, match=rf"version {version} of the weights.*differ by .* tied embeddings"
        ):
            engine.update(policy, version)


@pytest.mark.vllm_short
def test_weights_of_another_version_are_caught(
    server: tuple[VLLMRollouts, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, policy = server
    kept: list[Any] = []

    def older(published: Any) -> Any:
        kept.append(published)
        return dataclasses.replace(kept[0], version=published.version, name=published.name)

    with monkeypatch.context() as planted:
        plant(planted, older)
        engine.update(policy, next(_versions))
        move(policy.model, 12)
        with pytest.raises(WeightSyncMismatch, match="the weights of another version"):
            engine.update(policy, next(_versions))


@pytest.mark.vllm_short
def test_a_truncated_shard_is_caught(server: tuple[VLLMRollouts, Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, policy = server

    def truncate(published: Any) -> Any:
        file: Path = published.folder / published.files[0]["name"]
        file.write_bytes(file.read_bytes()[:-64])
        return published

    monkeypatch.setattr(engine, "process", None)  # as with servers of others: no new one is started for it
    with monkeypatch.context() as planted:
        plant(planted, truncate)
        with pytest.raises(WeightSyncMismatch, match="no rollout server samples with version"):
            engine.update(policy, next(_versions))


@pytest.mark.vllm_short
def test_another_model_is_caught(server: tuple[VLLMRollouts, Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, policy = server
    other = Publisher(engine.folder / "other", torch.float32).publish(make_model("qwen2", seed=5, hidden_size=WIDE), 0)
    assert other is not None
    with monkeypatch.context() as planted:
        plant(planted, lambda published: dataclasses.replace(other, name=published.name))
        with pytest.raises(WeightSyncMismatch, match="the server holds another model"):
            engine.update(policy, next(_versions))


@pytest.mark.vllm_short
def test_a_single_wrong_tensor_is_caught(server: tuple[VLLMRollouts, Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer that did not arrive, as where a name is not mapped."""
    engine, policy = server

    def damage(published: Any) -> Any:
        from nemo_rl.rollout.vllm.weights import _about

        file: Path = published.folder / published.files[0]["name"]
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros_like(
            tensors["model.layers.1.mlp.down_proj.weight"]
        )
        save_file(tensors, file)
        return dataclasses.replace(published, files=[_about(file)])

    with monkeypatch.context() as planted:
        plant(planted, damage)
        with pytest.raises(WeightSyncMismatch, match="differ by"):
            engine.update(policy, next(_versions))


@pytest.mark.vllm_short
def test_after_an_update_all_tokens_agree(server: tuple[VLLMRollouts, Policy]) -> None:
    """Of the server that the other tests share; test_agreement asks the same of other models, each with its own."""
    engine, policy = server
    move(policy.model, 13)
    assert difference(engine, InProcess(ENDS), policy, next(_versions)) <= 1e-4


@pytest.mark.parametrize("level", [1, 2])
def test_after_a_sleep_it_samples_with_the_weights_of_now(
    server: tuple[VLLMRollouts, Policy], monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    """The CPU build has no memory to give back; what it is asked, and in which order, is the same."""
    engine, policy = server
    monkeypatch.setattr(engine, "sleep_level", level)
    version = next(_versions)
    engine.update(policy, version)
    client = engine.members[0].client
    engine.rest()
    assert client.get("/is_sleeping").content == {"is_sleeping": True}
    assert difference(engine, InProcess(ENDS), policy, version) <= 1e-4, "no step changed the weights"
    assert client.get("/is_sleeping").content == {"is_sleeping": False}
    engine.rest()
    move(policy.model, 14)
    assert difference(engine, InProcess(ENDS), policy, next(_versions)) <= 1e-4


def test_right_updates_are_never_refused(server: tuple[VLLMRollouts, Policy]) -> None:
    engine, policy = server
    probes = []
    for i in range(200):
        move(policy.model, 100 + i)
        with torch.no_grad():  # as weight decay does, so that 200 of them do not blow the model up
            for parameter in policy.model.parameters():
                parameter *= 0.97
        probes.append(engine.update(policy, next(_versions))["rollout_probe"])
    print(f"200 updates: the probe differs by at most {max(probes):.1e} nats a token on average")
    assert max(probes) <= 1e-4


def test_a_killed_server_is_replaced_and_the_data_are_the_same(server: tuple[VLLMRollouts, Policy]) -> None:
    engine, policy = server
    engine.update(policy, next(_versions))
    sampling = Sampling(4, 24)
    undisturbed = engine.generate(REQUESTS, sampling, seed=9, step=1)
    assert engine.process is not None and engine.process.process is not None
    os.killpg(engine.process.process.pid, signal.SIGKILL)
    time.sleep(0.2)
    again = engine.generate(REQUESTS, sampling, seed=9, step=1)
    assert [c.ids for group in again for c in group] == [c.ids for group in undisturbed for c in group]
    for request, group in zip(REQUESTS, again, strict=True):
        for completion in group:
            truth = plain_logprobs(policy.model, request, completion, 1.0)
            assert (torch.tensor(completion.logprobs) - truth).abs().max().item() <= 1e-4


def test_no_process_stays_behind(start: Start) -> None:
    engine, _ = start(make_model("qwen2", hidden_size=WIDE))
    assert engine.process is not None and engine.process.process is not None
    group = engine.process.process.pid
    engine.close()
    assert gone(group)
