"""Two rollout replicas, as their pods run them, with real vLLM servers: a run loses one and has it back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nemo_rl
from nemo_rl.job import names
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.server import _kit
from nemo_rl.trainers.grpo import GRPOTrainer
from real_vllm.conftest import STARTUP_SECONDS, WIDE
from real_vllm.test_train import STEPS, check, train
from unit.trainers.conftest import write_model

pytestmark = pytest.mark.timeout(3600)
TOKEN = "a word of sixteen letters and more"


class Replica:
    """The program of a replica on a port of this machine; its container, which starts it anew, is the test."""

    def __init__(self, python: str, kit: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "token").write_text(TOKEN)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [python, "-m", names.ROLLOUT_MODULE, f"--token-file={folder / 'token'}"]
        self.command += ["--host=127.0.0.1", f"--port={self.port}"]
        self.environment = {**os.environ, "PYTHONPATH": str(kit), "TMPDIR": str(folder)}
        self.log = folder / "log"
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def replicas(vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replica]]:
    kit = _kit()
    found = [Replica(vllm_python, kit, tmp_path / f"replica-{number}") for number in (0, 1)]
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setenv(names.ROLLOUT_ADDRESSES_VARIABLE, ",".join(replica.address for replica in found))
    yield found
    for replica in found:
        replica.kill()


def test_a_run_loses_a_replica_and_has_it_back(
    replicas: list[Replica], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, dict[str, Any]]] = [{}]
    monkeypatch.setattr(
        GRPOTrainer, "note_servers", lambda trainer, servers: told.append({one["address"]: one for one in servers})
    )
    second = replicas[1]

    def until(state: str, replica: Replica) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while told[-1].get(replica.address, {}).get("state") != state:
            assert time.monotonic() < deadline, (
                f"{replica.address} is not {state}: {told[-1]}; {replica.log.read_text()[-2000:]}"
            )
            time.sleep(0.1)

    class Story(nemo_rl.Callback):
        def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
            if step == 1:  # whichever was first: both serve from now on
                for replica in replicas:
                    serving(replica)
            if step == 3:
                second.kill()
                until("Lost", second)
            if step == 5:
                second.start()
                serving(second)

    def serving(replica: Replica) -> None:
        """Until its server runs: it gets weights at the next step."""
        deadline = time.monotonic() + STARTUP_SECONDS
        while (found := told[-1].get(replica.address, {})).get("state") != "Ready" and (
            found.get("message") != "it gets the weights of now"
        ):
            assert time.monotonic() < deadline, f"{replica.address}: {told[-1]}; {replica.log.read_text()[-2000:]}"
            time.sleep(0.1)

    model = write_model(tmp_path / "model", hidden_size=WIDE)
    rollout = {"replicas": 2, "gpus_per_replica": 0}
    result = train(model, tmp_path / "out", rollout, callbacks=[Story()])
    check(result)
    last = {address: one for servers in told for address, one in servers.items()}
    assert all(last[replica.address]["weight_version"] == STEPS - 1 for replica in replicas), (
        "both have the last version"
    )
    assert (
        max(record["rollout_logprob_error"] for record in result.history if "rollout_logprob_error" in record) <= 1e-4
    )
    for replica in replicas:
        assert "Traceback" not in replica.log.read_text()
