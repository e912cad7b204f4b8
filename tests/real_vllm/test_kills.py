"""kill -9 of a real vLLM server, and of the trainer, at moments that are drawn by a seed: the run goes on with the same data.

`make test-vllm-kills` asks for 20 of each (SEED=…).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import ForkServer
from nemo_rl.errors import RolloutLost
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.protocol import Completion, Sampling
from nemo_rl.rollout.vllm.client import COMPLETIONS, Client
from nemo_rl.rollout.vllm.engine import VLLMRollouts
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.server import ServerProcess
from nemo_rl.run.metrics import read_history
from real_vllm.conftest import WIDE, Start, serving
from real_vllm.test_agreement import REQUESTS, move, plain_logprobs
from real_vllm.test_train import STEPS, check, train
from real_vllm.warm import SOCKET_VARIABLE, Warm
from unit.engine.tiny import make_model
from unit.trainers.conftest import write_model

KILLS = int(os.environ.get("NEMO_RL_TEST_KILLS", "2"))
SEED = int(os.environ.get("NEMO_RL_TEST_SEED", "17"))
pytestmark = pytest.mark.timeout(3600 + 600 * KILLS)

UPDATE = (
    "/weight_info", "/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache",
    "/resume", "/update_weight_version",
)  # fmt: skip
START = "/health"
"""What is asked of a server that starts until it is ready."""
MOMENTS = (*UPDATE, *[COMPLETIONS] * 9, *[START] * 3)
VICTIMS = ("all", "server", "engine")
"""Of the server's processes: the one that answers HTTP, the one with the model, which is another, or all of them."""


class Killer:
    """Kills a server's processes a drawn while after the n-th request of a kind has been sent to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.process: ServerProcess | None = None
        self.path, self.left, self.seconds, self.victim = "", 0, 0.0, "all"
        self.killed = threading.Event()
        request, start = Client._request, ServerProcess.start

        def watched(client: Client, method: str, path: str, *arguments: Any) -> Any:
            if path.partition("?")[0] == self.path:
                self.left -= 1
                if self.left == 0:
                    threading.Thread(target=self.kill, args=(self.seconds, self.victim), daemon=True).start()
            return request(client, method, path, *arguments)

        def started(process: ServerProcess, *arguments: Any) -> Any:
            self.process = process
            return start(process, *arguments)

        monkeypatch.setattr(Client, "_request", watched)
        monkeypatch.setattr(ServerProcess, "start", started)

    def arm(self, path: str, nth: int, seconds: float, victim: str) -> None:
        self.killed.clear()
        self.path, self.left, self.seconds, self.victim = path, nth, seconds, victim

    def kill(self, seconds: float, victim: str) -> None:
        """Kills the processes once they are there: a server's engine begins a while after the server."""
        time.sleep(seconds)  # the moment of the kill is what the tests vary
        while not (victims := self._victims(victim)):
            time.sleep(0.01)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.killed.set()

    def _victims(self, victim: str) -> list[int]:
        process = self.process.process if self.process is not None else None
        if process is None:
            return []
        members = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _group_of(pid) == process.pid]
        if victim == "engine":
            return [pid for pid in members if pid != process.pid and b"resource_tracker" not in _command_of(pid)]
        return [pid for pid in members if victim == "all" or pid == process.pid]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def sampled_by(policy: Policy, groups: list[list[Completion]], version: int) -> None:
    """Every token has the log-probability that transformers gives it under these weights, and none is missing."""
    assert [len(group) for group in groups] == [4] * len(REQUESTS)
    for request, group in zip(REQUESTS, groups, strict=True):
        for completion in group:
            truth = plain_logprobs(policy.model, request, completion, 1.0)
            assert (torch.tensor(completion.logprobs) - truth).abs().max().item() <= 1e-4
            assert completion.version == version


def test_a_server_killed_at_any_moment_is_replaced_and_the_data_are_the_same(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(SEED)
    killer = Killer(monkeypatch)
    engine, policy = start(make_model("qwen2", hidden_size=WIDE))
    engine.update(policy, 0)
    same = total = 0
    moments: list[str] = []
    for version in range(1, KILLS + 1):
        move(policy.model, version)
        moments = moments or draw.sample(MOMENTS, len(MOMENTS))
        path = moments.pop()
        nth, seconds, victim = draw.randint(1, len(REQUESTS)), draw.uniform(0.0, 0.1), draw.choice(VICTIMS)
        print(f"kill {version}: {victim} at {path}, {nth}, {seconds:.3f} s", flush=True)
        began = time.monotonic()
        if path == START:
            killed_while_it_starts(engine, policy, version, killer, nth, victim)
        else:
            killer.arm(path, nth if path == COMPLETIONS else 1, seconds, victim)
        groups = sample(engine, policy, version)
        assert killer.killed.wait(300)
        sampled_by(policy, groups, version)
        again = sample(engine, policy, version)
        pairs = [(a.ids, b.ids) for one, two in zip(groups, again, strict=True) for a, b in zip(one, two, strict=True)]
        same, total = same + sum(a == b for a, b in pairs), total + len(pairs)
        print(f"kill {version}: right, {same} of {total} the same, {time.monotonic() - began:.0f} s", flush=True)
    assert same >= 0.98 * total, "rounding may tip a draw, no more"


def sample(engine: VLLMRollouts, policy: Policy, version: int) -> list[list[Completion]]:
    counted: list[int] = []
    engine.update(policy, version)
    groups = engine.generate(REQUESTS, Sampling(4, 24), seed=9, step=version, on_group=lambda i, _: counted.append(i))
    assert sorted(counted) == list(range(len(REQUESTS))), "each counts once"
    return groups


def killed_while_it_starts(
    engine: VLLMRollouts, policy: Policy, version: int, killer: Killer, nth: int, victim: str
) -> None:
    """What takes the place of a killed server is killed, too: the update ends in words, and the next one goes well."""
    killer.arm(START, nth, 0.0, victim)
    assert killer.process is not None and killer.process.process is not None
    os.killpg(killer.process.process.pid, signal.SIGKILL)
    with pytest.raises(RolloutLost, match=r"the vLLM server .* before it was ready"):
        engine.update(policy, version)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_whose_server_is_killed_goes_on(
    staleness: int, vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(f"{SEED} {staleness}")
    killer = Killer(monkeypatch)
    paths = [COMPLETIONS, COMPLETIONS, "/update_weights"]
    killer.arm(draw.choice(paths), draw.randint(4, STEPS // 2), draw.uniform(0.0, 0.1), draw.choice(VICTIMS))
    model = write_model(tmp_path / "model", hidden_size=WIDE)
    result = train(model, tmp_path / "out", {"rollout_python": vllm_python, "max_staleness": staleness})
    assert killer.killed.is_set()
    check(result)
    if staleness == 0:
        assert_on_policy(result.history)


def assert_on_policy(history: list[dict[str, Any]]) -> None:
    """No token that was trained came from other weights than those of its step."""
    for record in history:
        if "importance_weight_max" in record:
            assert 0.999 < record["importance_weight_min"] <= record["importance_weight_max"] < 1.001


# --- the trainer

START_STEPS = 10
"""About as many steps take as long as a start and the first one."""
SOURCE = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parents[1])]!r}
import torch, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2TokenizerFast
import nemo_rl.trainers.grpo, nemo_rl.api.training, nemo_rl.rollout.vllm.engine
from real_vllm.environment import interpreter
from real_vllm.test_train import train
from real_vllm.warm import SOCKET_VARIABLE, warm_starts

warm_starts(setattr, str(interpreter()), os.environ[SOCKET_VARIABLE])

def run(model, output, rollout):
    torch.set_num_threads(1)
    train(model, output, rollout, save_every=2, log_level="warning")
"""


@pytest.fixture
def trainers(tmp_path: Path, warm: Warm) -> Iterator[Callable[[dict[str, str]], ForkServer]]:
    """Trainers with a temporary folder of their own, in which nothing may stay."""
    started: list[ForkServer] = []
    scratch = tmp_path / "temporary"
    scratch.mkdir()

    def begin(environment: dict[str, str]) -> ForkServer:
        started.append(ForkServer(SOURCE, {**environment, "TMPDIR": str(scratch), SOCKET_VARIABLE: warm.address}))
        return started[-1]

    yield begin
    for server in started:
        server.close()


def history(output: Path) -> list[dict[str, Any]]:
    return read_history(output / "metrics.jsonl")


def _written(output: Path) -> tuple[int, int] | None:
    """Tells whether the file of metrics was written."""
    with contextlib.suppress(FileNotFoundError):
        about = (output / "metrics.jsonl").stat()
        return about.st_mtime_ns, about.st_size
    return None


def trained_once(output: Path, staleness: int) -> None:
    found = history(output)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert all(record["rollout_probe"] <= 1e-4 for record in found if "rollout_probe" in record)
    if staleness:
        assert all(0 <= record["rollout_staleness"] <= staleness for record in found)
    else:
        assert_on_policy(found)


def run(runs: ForkServer, model: str, output: Path, rollout: dict[str, Any], draw: random.Random, kill: bool) -> int:
    """The exit code of a run that is killed, if at all, at a drawn moment: while it starts, or in one of its next steps."""
    newest = max([int(folder.name[5:]) for folder in (output / "checkpoints").glob("step-" + 8 * "[0-9]")], default=0)
    step, part = newest + draw.randrange(4), draw.random()
    kill = kill and step < STEPS
    seconds = max([record["step_seconds"] for record in history(output)[-3:]], default=1.0)
    seconds *= START_STEPS if step == newest else 1
    old = _written(output)
    ended = threading.Event()

    def there() -> bool:
        """Whether it has trained those before in this life: the steps of an earlier one are cut off when it begins."""
        return bool(runs.pid) and (step == newest or (_written(output) != old and len(history(output)) >= step))

    def kill_it() -> None:
        while not there() and not ended.wait(0.02):
            pass
        if not ended.wait(part * seconds):
            with contextlib.suppress(ProcessLookupError):
                os.kill(runs.pid, signal.SIGKILL)

    runs.pid = 0
    if kill:
        threading.Thread(target=kill_it, daemon=True).start()
    code = runs.run(model, str(output), rollout)
    ended.set()
    killed = f"to be killed in step {step + 1}" if kill else "left alone"
    print(f"{output.name}, {rollout}, {killed}: exit code {code} after {len(history(output))} steps", flush=True)
    return code


def test_a_trainer_killed_at_any_moment_goes_on_with_the_same_servers(
    vllm_python: str, tmp_path: Path, trainers: Callable[[dict[str, str]], ForkServer]
) -> None:
    """They are somebody else's, and outlive it: paused, in the midst of an update, or with weights that nobody waits for."""
    draw = random.Random(SEED)
    model = write_model(tmp_path / "model", hidden_size=WIDE)
    with serving(vllm_python, model, tmp_path / "vllm.log") as server:
        runs = trainers({TOKEN_VARIABLE: server.token})
        code = kills = finished = 0
        while code or kills < KILLS or finished < 2:
            staleness = finished % 2
            output = tmp_path / f"run-{finished}"
            rollout = {"urls": [server.client.url], "max_staleness": staleness}
            code = run(runs, model, output, rollout, draw, kill=kills < KILLS)
            assert code in (0, -signal.SIGKILL)
            if code:
                kills += 1
            else:
                trained_once(output, staleness)
                finished += 1
    assert not list((tmp_path / "temporary").glob("nemo-rl-*"))


def test_a_trainer_killed_with_its_server_is_started_again(
    vllm_python: str, tmp_path: Path, trainers: Callable[[dict[str, str]], ForkServer]
) -> None:
    """The server that it has started ends with it, and what both leave on the disk is removed by the next one."""
    draw = random.Random(SEED)
    model = write_model(tmp_path / "model", hidden_size=WIDE)
    runs, output = trainers({}), tmp_path / "out"
    rollout = {"rollout_python": vllm_python}
    code, kills = -1, max(1, KILLS // 5)
    while code:
        code = run(runs, model, output, rollout, draw, kill=kills > 0)
        assert code in (0, -signal.SIGKILL)
        kills -= 1
        assert servers_end(output / "rollout" / "vllm.log")
    trained_once(output, 0)
    assert not list((tmp_path / "temporary").glob("nemo-rl-*"))


def servers_end(log: Path) -> bool:
    """Whether no process of a server that writes this log is left, within five minutes; it takes some seconds."""
    deadline = time.monotonic() + 300
    while any(_writes(process, log) for process in Path("/proc").glob("[0-9]*")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _writes(process: Path, log: Path) -> bool:
    try:
        return os.readlink(process / "fd" / "1") == str(log)
    except OSError:
        return False
