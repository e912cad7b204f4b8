"""A server beside the trainer gives its GPU's memory back while the model trains, and has its weights before it samples again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_rl.job.spec import RolloutSpec
from nemo_rl.rollout.protocol import Sampling
from nemo_rl.rollout.vllm.engine import VLLMRollouts
from unit.rollout.fake import FakeServer
from unit.rollout.test_lost import REQUESTS, Servers, roll_out

pytestmark = pytest.mark.timeout(60)
POLICY: Any = SimpleNamespace(model=None, device=torch.device("cpu"))


class Sleeping(Servers):
    """Each version has a name of its own, as with weights that move."""

    def publish(self, model: Any, version: int, **_: Any) -> Any:
        return replace(self.published, version=version, name=f"{version}-abc")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    found = FakeServer()
    yield found
    found.close()


def asleep(server: FakeServer, folder: Path, level: int) -> Sleeping:
    """An engine after its first rollouts, whose server sleeps."""
    engine = Sleeping([server], folder)
    engine.sleep_level = level
    engine.update(POLICY, 1)
    assert roll_out(engine) == list(range(len(REQUESTS)))
    server.asked.clear()
    engine.rest()
    engine.rest()
    assert server.asked == [f"/sleep?level={level}"]
    server.asked.clear()
    return engine


@pytest.mark.parametrize("level", [1, 2])
def test_it_wakes_before_it_gets_the_next_weights(server: FakeServer, tmp_path: Path, level: int) -> None:
    engine = asleep(server, tmp_path, level)
    assert engine.update(POLICY, 2)["rollout_probe"] == 0.0
    assert server.asked[0] == "/wake_up"
    assert server.version == "2-abc+proved"
    assert roll_out(engine) == list(range(len(REQUESTS)))
    assert server.asked.count("/wake_up") == 1


def test_weights_that_were_given_up_are_loaded_again_where_no_step_changed_them(
    server: FakeServer, tmp_path: Path
) -> None:
    engine = asleep(server, tmp_path, 2)
    assert engine.update(POLICY, 1)
    assert server.asked.index("/wake_up") < server.asked.index("/update_weights")
    assert roll_out(engine) == list(range(len(REQUESTS)))


def test_weights_that_it_kept_are_not(server: FakeServer, tmp_path: Path) -> None:
    engine = asleep(server, tmp_path, 1)
    assert engine.update(POLICY, 1) == {}
    assert server.asked == ["/wake_up"]
    assert roll_out(engine) == list(range(len(REQUESTS)))


def test_one_that_is_lost_in_its_sleep_is_given_the_weights_when_it_is_back(server: FakeServer, tmp_path: Path) -> None:
    engine = asleep(server, tmp_path, 2)
    server.start_anew()
    server.sleeps = False
    assert engine.update(POLICY, 2)
    assert roll_out(engine) == list(range(len(REQUESTS)))


def test_without_the_setting_none_sleeps(server: FakeServer, tmp_path: Path) -> None:
    engine = Sleeping([server], tmp_path)
    engine.update(POLICY, 1)
    server.asked.clear()
    engine.rest()
    assert engine.update(POLICY, 1) == {}
    assert server.asked == []


@pytest.mark.parametrize(("device", "sleep"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_sleep_mode_is_asked_of_vllm_where_there_is_a_gpu(device: str, sleep: bool) -> None:
    engine = Sleeping.__new__(Sleeping)
    engine.spec = RolloutSpec(engine="vllm", python="/p", sleep=sleep)
    engine.adapter, engine.dtype, engine.probe = False, torch.bfloat16, Sampling(1, 3)
    engine.sleep_level = 2 if sleep else 0
    options = VLLMRollouts._options(engine, SimpleNamespace(device=torch.device(device)), 100)  # type: ignore[arg-type]
    assert ("--enable-sleep-mode" in options) == (device == "cuda" and sleep)
