"""Rollout replicas of a job: found, told what to serve, given weights, lost, refused and taken in again, while a run goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from nemo_rl.errors import RolloutLost, WeightSyncMismatch
from nemo_rl.job import names
from nemo_rl.rollout.vllm import engine as engine_module
from nemo_rl.rollout.vllm import replicas as replicas_module
from nemo_rl.rollout.vllm.client import Client, RequestRefused, ServerGone
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.middleware import REPLICA_ROUTE, START_ROUTE
from nemo_rl.rollout.vllm.replica import digest_of
from nemo_rl.rollout.vllm.server import _kit
from nemo_rl.rollout.vllm.weights import ShardServer, files_in
from nemo_rl.trainers.grpo import GRPOTrainer
from unit.rollout.fake import TOKEN, FakeServer
from unit.rollout.test_server import HEALTHY
from unit.trainers.conftest import write_model

STEPS = 6
SECONDS = 120.0


def until(check: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


class Cluster:
    """Replicas as DNS gives them, and what the trainer says of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.servers: dict[str, FakeServer] = {}
        self.listed: list[str] = []
        self.told: list[list[dict[str, Any]]] = [[]]
        monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
        monkeypatch.setenv(names.ROLLOUT_ADDRESSES_VARIABLE, "x-rollout:8000")
        monkeypatch.setattr(replicas_module, "resolve", lambda addresses: sorted(self.listed))
        monkeypatch.setattr(replicas_module, "LOOK_SECONDS", 0.1)
        monkeypatch.setattr(GRPOTrainer, "note_servers", lambda trainer, servers: self.told.append(servers))

    def add(self, name: str, port: int = 0) -> FakeServer:
        server = FakeServer(tokens=15, port=port, replica=True)
        self.servers[name] = server
        self.listed = [*{*self.listed, server.url}]
        return server

    def state(self, server: FakeServer) -> str:
        return next((one["state"] for one in self.told[-1] if one["address"] == server.address), "")

    def states(self, server: FakeServer) -> list[str]:
        """Those that were told of a server, each once in a row."""
        found = [one["state"] for told in list(self.told) for one in told if one["address"] == server.address]
        return [state for i, state in enumerate(found) if i == 0 or found[i - 1] != state]

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    found = Cluster(monkeypatch)
    yield found
    found.close()


class At(nemo_rl.Callback):
    """Does something after some of the steps."""

    def __init__(self, **steps: Callable[[], Any]) -> None:
        self.steps = steps

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        self.steps.get(f"step{step}", lambda: None)()


def count(prompt: str, response: str) -> float:
    return response.count("a") / 6


def train(
    model: str,
    output: Path,
    reward: Callable[[str, str], float] = count,
    callbacks: Sequence[nemo_rl.Callback] = (),
    **steps: Callable[[], Any],
) -> Any:
    return nemo_rl.train(
        model,
        [{"prompt": f"{i}="} for i in range(10, 22)],
        reward,
        output_dir=output,
        backend="local",
        log_level="warning",
        max_steps=STEPS,
        max_epochs=9,
        save_every=2,
        batch_size=4,
        num_generations_per_prompt=4,
        max_new_tokens=6,
        callbacks=[At(**steps), *callbacks],
        # the tokens are the fake's, not the model's: only what is far off is taken for other weights
        rollout={"engine": "vllm", "replicas": 2, "gpus_per_replica": 0, "mismatch_limit": 10, "timeout_seconds": 30},
    )


def test_replicas_come_and_go_while_the_run_goes_on(cluster: Cluster, tiny_model: str, tmp_path: Path) -> None:
    first, second = cluster.add("first"), cluster.add("second")
    late: list[FakeServer] = []

    def scale_up() -> None:
        late.append(cluster.add("third"))
        until(lambda: cluster.state(late[0]), "a look at the third")

    def lose() -> None:
        second.close()

    def come_back() -> None:
        late.append(cluster.add("second", second.port))
        until(lambda: late[1].starts and cluster.state(late[1]) == "Loading", "the second again")

    def scale_down() -> None:
        until(lambda: cluster.state(late[1]) == "Ready", "the second has the weights")
        cluster.listed.remove(first.url)

    result = train(tiny_model, tmp_path / "out", step1=scale_up, step2=lose, step3=come_back, step5=scale_down)
    assert [line["step"] for line in result.history if line["step"]] == list(range(1, STEPS + 1))
    (start,) = first.starts
    assert "--served-model-name" in start["options"] and {f["name"] for f in start["files"]} >= {"config.json"}
    third, again = late
    # the shards of every version are those that all others got: none trains on older ones
    versions = [[update["shards"] for update in server.updates] for server in (first, second, third, again)]
    assert len(versions[0]) >= 5, "one update for each step until it was taken away"
    assert versions[1] == versions[0][:2], "it was there for two steps"
    assert versions[2][0] in versions[0][1:3], "what came later begins with the version of then"
    assert again.updates and versions[3][0] in versions[0][2:5]
    assert third.completed and again.completed, "both are asked"
    assert cluster.states(second)[:2] == ["Loading", "Ready"]
    assert "Lost" in cluster.states(second) and cluster.states(second)[-1] == "Ready", (
        "its address is that of the new one"
    )
    rates = [one["tokens_per_second"] for told in cluster.told for one in told if one.get("tokens_per_second")]
    assert rates and all(isinstance(rate, int) for rate in rates)


def test_a_replica_with_other_weights_gets_no_request_and_the_run_goes_on(
    cluster: Cluster, tiny_model: str, tmp_path: Path
) -> None:
    good, bad = cluster.add("good"), cluster.add("bad")
    bad.tampered = True
    result = train(tiny_model, tmp_path / "out")
    assert len([line for line in result.history if line["step"]]) == STEPS
    assert "Refused" in cluster.states(bad) and "Ready" not in cluster.states(bad)
    assert cluster.states(good)[-1] == "Ready"
    message = next(one["message"] for told in cluster.told for one in told if one["state"] == "Refused")
    assert "nats a token" in message
    assert all(prompt in engine_prompts(bad) for prompt in bad.completed), "of it nothing but the probe is asked"


def engine_prompts(server: FakeServer) -> list[list[int]]:
    """The prompts of the probe: those that come first."""
    return server.completed[:8]


def test_with_none_left_that_has_the_weights_the_run_ends_as_a_mismatch(
    cluster: Cluster, tiny_model: str, tmp_path: Path
) -> None:
    first, second = cluster.add("first"), cluster.add("second")

    def tamper() -> None:
        first.tampered = second.tampered = True

    with pytest.raises(WeightSyncMismatch, match="no rollout server samples with version 2 of the weights"):
        train(tiny_model, tmp_path / "out", step2=tamper)


def test_one_that_loads_far_longer_catches_up_while_the_others_go_on(
    cluster: Cluster, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LATE_SECONDS", 0.2)
    fast, slow = cluster.add("fast"), cluster.add("slow")

    def hold() -> None:
        slow.hold.clear()

    def release() -> None:
        assert cluster.state(slow) == "Updating"
        slow.hold.set()
        until(lambda: "+proved" not in slow.version and slow.version.startswith("2-"), "the load of version 2")

    result = train(tiny_model, tmp_path / "out", step2=hold, step4=release)
    assert len([line for line in result.history if line["step"]]) == STEPS
    assert "Updating" in cluster.states(slow)
    newest = fast.updates[-1]["shards"]
    assert slow.updates[-1]["shards"] == newest, "it has the newest weights again"
    assert len(slow.updates) < len(fast.updates)


def test_the_next_attempt_finds_its_replicas_as_they_are(cluster: Cluster, tiny_model: str, tmp_path: Path) -> None:
    """Loading a model takes minutes: a server that was started for this job is not started anew when only the trainer was."""
    server = cluster.add("one")

    def stop() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny_model, tmp_path / "out", step5=stop)
    loaded = len(server.updates)
    result = train(tiny_model, tmp_path / "out")
    assert [line["step"] for line in result.history if line["step"]] == list(range(1, STEPS + 1))
    assert (len(server.starts), server.stops) == (1, 0)
    assert len(server.updates) > loaded, "and it has the weights that the second attempt went on from"


def test_without_any_replica_the_run_ends_in_words(cluster: Cluster, tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(RolloutLost, match=r"no rollout replica was ready within 1 s \(there is none\)"):
        nemo_rl.train(
            tiny_model,
            [{"prompt": "1="}],
            lambda prompt, response: 1.0,
            output_dir=tmp_path / "out",
            backend="local",
            max_new_tokens=4,
            rollout={"engine": "vllm", "replicas": 1, "timeout_seconds": 1},
        )


def test_replicas_need_a_cluster(tiny_model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollout replicas are pods on a cluster, but this run is local"):
        nemo_rl.train(
            tiny_model, [{"prompt": "1="}], lambda prompt, response: 1.0, output_dir=tmp_path / "out", backend="local",
            rollout={"engine": "vllm", "replicas": 2},
        )  # fmt: skip


def test_a_name_without_addresses_is_none_and_an_address_is_itself() -> None:
    assert replicas_module.resolve("127.0.0.2:8000, 127.0.0.1:8001") == [
        "http://127.0.0.1:8001",
        "http://127.0.0.2:8000",
    ]
    assert replicas_module.resolve("[::1]:8000") == ["http://[::1]:8000"]


# --- the replica's own program, with a few lines in vLLM's place


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A replica that waits: its address, and the folder with the model that a trainer gives it."""
    kit = _kit()
    package = kit / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (kit / "vllm" / "__init__.py").touch()
    (package / "api_server.py").write_text(HEALTHY)
    (tmp_path / "token").write_text(TOKEN + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nemo_rl.rollout.vllm.replica", f"--token-file={tmp_path / 'token'}"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(kit), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    model = tmp_path / "weights" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    try:
        yield f"http://127.0.0.1:{port}", model
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_it_waits_fetches_the_model_and_becomes_the_server(program: tuple[str, Path]) -> None:
    url, model = program
    client = Client(url, TOKEN)

    def state() -> str:
        try:
            return str(client.get(REPLICA_ROUTE).content["state"])
        except (ServerGone, TypeError):
            return ""

    until(lambda: state() == "waiting", "the replica")
    with pytest.raises(RequestRefused, match="refuses the token"):
        Client(url, "another").get(REPLICA_ROUTE)
    with pytest.raises(ServerGone, match="no trainer has said yet which model to serve"):
        client.get("/health")
    shards = ShardServer(model.parent, TOKEN)
    files = files_in(model)
    options = ["--dtype", "float32"]
    try:
        for wrong, says in (
            ({"options": ["--middleware=x.Y"]}, "a replica takes no option --middleware"),
            ({"source": "/etc"}, "a replica shares no folder with its trainer"),
        ):
            with pytest.raises(RequestRefused, match=says):
                client.post(START_ROUTE, {"source": f"{shards.url}/model", "files": files, "options": options, **wrong})
        bad = [{**files[0], "sha256": "0" * 64}]
        client.post(START_ROUTE, {"source": f"{shards.url}/model", "files": bad, "options": options})
        until(lambda: "sha256 differs" in client.get(REPLICA_ROUTE).content.get("message", ""), "the refusal")
        client.post(START_ROUTE, {"source": f"{shards.url}/model", "files": files, "options": options})

        def what() -> Any:
            try:
                return client.get("/health") and client.get("/what").content
            except (ServerGone, RequestRefused):
                return None

        found = until(what, "the server")
    finally:
        shards.close()
    arguments, environment = eval(found)
    assert arguments[arguments.index("--model") + 1].startswith(environment["TMPDIR"])
    assert Path(arguments[arguments.index("--model") + 1], "config.json").read_text() == "{}"
    assert environment["NEMO_RL_ROLLOUT_START"] == digest_of(files, options)
    assert "RequireToken" in " ".join(arguments)
    assert json.dumps(arguments).count(TOKEN) == 0, "everybody on the machine reads command lines"
