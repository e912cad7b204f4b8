"""Training with output_dir="s3://…": killed at any moment and started again it equals a run on a disk, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_rl.run.stored import read_head, read_text
from nemo_rl.storage.store import Store
from storage.server import S3, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 9
KILLS = int(os.environ.get("NEMO_RL_TEST_KILLS", "8"))

# The server imports the engine once and forks a child for each run: a kill costs no import.
SERVER = """
import faulthandler, os, sys, json
import torch, torch.distributed.checkpoint, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2TokenizerFast
import nemo_rl.trainers.sft, nemo_rl.api.training

def run(model, output, cache, steps, port):
    torch.set_num_threads(1)
    os.environ["NEMO_RL_CACHE"] = cache
    other = None
    if port:  # two nodes: processes with nothing in common but the store
        other = os.fork()
        rank = "0" if other else "1"
        os.environ |= {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NEMO_RL_CACHE": f"{cache}/node-{rank}"}
    import nemo_rl
    rows = [{"prompt": f"{i}=", "completion": f"{i % 10}a"} for i in range(10, 30)]
    result = nemo_rl.train(model, rows, algorithm="sft", max_steps=steps, max_epochs=9, batch_size=4, learning_rate=1e-2,
                           save_every=2, keep_checkpoints=2, seed=7, output_dir=output, backend="local",
                           log_level="warning", validation_dataset=rows[:4])
    if other == 0:
        os._exit(0)
    if other:
        assert os.waitpid(other, 0)[1] == 0
    told = {"checkpoint_path": result.checkpoint_path, "checkpoint_uri": result.checkpoint_uri, "steps": result.total_steps}
    open(cache + "/result.json", "w").write(json.dumps(told))

print("ready", flush=True)
while line := sys.stdin.readline():
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.dump_traceback_later(120)  # whatever hangs tells where
            run(*json.loads(line))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    sys.stdin.readline()  # until then an ended child stays a zombie, so that its number is not given to another
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Runs:
    """Starts runs in children of one process that has the engine loaded."""

    def __init__(self, model: str, environment: dict[str, str]) -> None:
        self.model = model
        variables = (
            os.environ
            | environment
            | {"NEMO_RL_STORAGE_PATIENCE": "20", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        )
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        assert self.server.stdout
        assert self.server.stdout.readline() == "ready\n"

    def run(self, output: str, cache: Path, steps: int = STEPS, kill_after: float | None = None, port: int = 0) -> int:
        assert self.server.stdin and self.server.stdout
        cache.mkdir(parents=True, exist_ok=True)
        print(json.dumps([self.model, output, str(cache), steps, port]), file=self.server.stdin, flush=True)
        pid = int(self.server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)  # the moment of the kill is what the test varies
            os.kill(pid, signal.SIGKILL)
        print("reap", file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=30)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from unit.trainers.conftest import write_model

    return write_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def runs(tiny_model: str, s3: S3):
    started = Runs(tiny_model, s3.environment())
    yield started
    started.close()


def untimed(text: str) -> list[dict]:
    timed = ("_seconds", "_per_second")
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(timed)} for line in text.splitlines()]


def on_disk(output: Path, step: int = STEPS) -> dict[str, object]:
    final = output / "checkpoints" / f"step-{step:08d}"
    return {
        "weights": hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": untimed((output / "metrics.jsonl").read_text()),
        "best": (output / "checkpoints" / "best").resolve().name,
        "kept": sorted(p.name for p in (output / "checkpoints").glob("step-*")),
    }


def in_store(uri: str) -> dict[str, object]:
    """What a store holds of a run, every file of every checkpoint checked against its digest."""
    store = Store(uri)
    head = read_head(store)
    assert head is not None and head["holder"] is None
    assert head["record"]["status"] == "finished"
    named = {e["name"]: e for e in head["checkpoints"]}
    for entry in head["checkpoints"]:
        below = f"checkpoints/{entry['folder']}"
        for file in entry["files"]:
            content = store.read(f"{below}/{file['path']}")[0]
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert json.loads(store.read(f"{below}/manifest.json")[0])["files"] == entry["files"]
    present = {o.path.split("/")[1] for o in store.list("checkpoints")}
    assert present == {e["folder"] for e in head["checkpoints"]}, "nothing is left of killed saves"
    last = named[max(named)]
    weights = next(f for f in last["files"] if f["path"] == "model.safetensors")
    best = json.loads(read_text(store, "best"))["checkpoint"]
    assert json.loads(read_text(store, "latest"))["checkpoint"] == f"checkpoints/{last['folder']}"
    return {
        "weights": weights["sha256"],
        "metrics": untimed(read_text(store, "metrics.jsonl").decode()),
        "best": best.split("/")[1].rpartition("-g")[0],
        "kept": sorted(named),
    }


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run on a disk, and how long it took."""
    folder = tmp_path_factory.mktemp("disk")
    begin = time.monotonic()
    assert runs.run(str(folder / "run"), folder / "cache") == 0
    return folder / "run", time.monotonic() - begin


def test_a_run_in_a_store_equals_one_on_a_disk(runs, undisturbed, tmp_path, store_environment):
    assert runs.run("s3://bucket/equal/run", tmp_path) == 0
    assert in_store("s3://bucket/equal/run") == on_disk(undisturbed[0])
    told = json.loads((tmp_path / "result.json").read_text())
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(told["checkpoint_path"]).num_parameters() > 0
    assert told["checkpoint_uri"].startswith("s3://bucket/equal/run/checkpoints/step-")
    log = read_text(Store("s3://bucket/equal/run"), "run.log").decode()
    assert f"step={STEPS}/{STEPS} " in log


def test_kills_at_any_moment_lose_nothing(runs, undisturbed, tmp_path, store_environment):
    """Half of the time the next attempt runs on another machine, which has an empty cache."""
    draw = random.Random(17)
    disk, seconds = undisturbed
    uri, kills = "s3://bucket/killed/run", 0
    while kills < KILLS:
        cache = tmp_path / f"machine-{draw.randrange(2) * kills}"
        if runs.run(uri, cache, kill_after=draw.uniform(0.1, 1.6) * seconds) == 0:
            assert in_store(uri) == on_disk(disk)
            uri = f"s3://bucket/killed-{kills}/run"
        kills += 1
    assert runs.run(uri, tmp_path / "last") == 0
    assert in_store(uri) == on_disk(disk)


def test_two_nodes_share_nothing_but_the_store(runs, undisturbed, tmp_path, store_environment):
    """Each writes its part of every checkpoint; a longer run goes on from them on two other machines, and then on one."""
    uri = "s3://bucket/nodes/run"
    assert runs.run(uri, tmp_path / "first", STEPS - 5, port=free_port()) == 0
    head = read_head(Store(uri))
    parts = {f["path"] for f in head["checkpoints"][-1]["files"]}
    assert {name for name in parts if name.endswith(".distcp")} >= {
        "trainer_state/__0_0.distcp",
        "trainer_state/__1_0.distcp",
    }
    assert runs.run(uri, tmp_path / "second", STEPS - 2, port=free_port()) == 0
    assert runs.run(uri, tmp_path / "third", STEPS) == 0
    found, expected = in_store(uri)["metrics"], on_disk(undisturbed[0])["metrics"]
    assert [m["step"] for m in found] == [m["step"] for m in expected]
    for one, other in zip(found[1:], expected[1:], strict=True):  # step 0 has no loss
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_a_finished_run_is_lengthened_on_another_machine(runs, undisturbed, tmp_path, store_environment):
    longer = tmp_path / "disk" / "run"
    for steps in (STEPS - 4, STEPS):
        assert runs.run(str(longer), tmp_path / "unused", steps) == 0
        assert runs.run("s3://bucket/longer/run", tmp_path / f"machine-{steps}", steps) == 0
    assert in_store("s3://bucket/longer/run") == on_disk(longer)
    assert runs.run("s3://bucket/longer/run", tmp_path / "again", STEPS) == 0, "the same once more begins beside it"
    assert in_store("s3://bucket/longer/run-2") == on_disk(undisturbed[0])
