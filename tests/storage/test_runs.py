"""Training with output_dir="s3://…": killed at any moment and started again it equals a run on a disk, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from forked import ForkServer
from nemo_rl.run.sources import local_model
from nemo_rl.run.stored.head import read_head, read_text
from nemo_rl.storage.store import Store, walk
from ports import free_port
from storage.server import S3, Faults
from storage.test_faults import LASTING, PASSING, after

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 9
KILLS = int(os.environ.get("NEMO_RL_TEST_KILLS", "5"))
"""Of each kind; `make test-storage-kills` asks for 20."""
SEED = int(os.environ.get("NEMO_RL_TEST_SEED", "17"))
TRIED = (*PASSING, *LASTING) if KILLS >= 20 else ("expired",)
"""Of the faults of a store, those that a whole run meets here; test_faults.py has all of them without training."""

SOURCE = """
import json, logging, os
import torch, torch.distributed.checkpoint, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2TokenizerFast
import nemo_rl.trainers.sft, nemo_rl.api.training

def run(model, output, cache, steps, port, endpoint, keep, seed, keys):
    os.environ |= {"NEMO_RL_CACHE": cache, "AWS_ENDPOINT_URL": endpoint}
    logging.getLogger("nemo_rl").addHandler(logging.FileHandler(f"{cache}/warnings"))
    if not keys:
        os.environ.update(HOME=cache)
        del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    other = None
    if port:  # two nodes: processes with nothing in common but the store
        other = os.fork()
        rank = "0" if other else "1"
        os.environ |= {"RANK": rank, "GROUP_RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NEMO_RL_CACHE": f"{cache}/node-{rank}"}
    torch.set_num_threads(1)  # after every fork: it makes torch's pool of threads anew, where two threads at once would fail
    import nemo_rl, nemo_rl.errors
    rows = [{"prompt": f"{i}=", "completion": f"{i % 10}a"} for i in range(10, 30)]
    try:
        result = nemo_rl.train(model, rows, algorithm="sft", max_steps=steps, max_epochs=9, batch_size=4,
                               learning_rate=1e-2, save_every=2, keep_checkpoints=keep, seed=seed, output_dir=output,
                               backend="local", log_level="warning", validation_dataset=rows[:4])
    except nemo_rl.errors.TrainingInterrupted as stopped:
        open(f"{cache}/stopped-{os.environ.get('RANK', '0')}", "w").write(str(stopped))
        if other:
            os.waitpid(other, 0)
        os._exit(75)
    except nemo_rl.errors.StorageError as error:
        open(f"{cache}/failed", "w").write(str(error))
        os._exit(74)
    if other == 0:
        os._exit(0)
    if other:
        assert os.waitpid(other, 0)[1] == 0
    told = {"checkpoint_path": result.checkpoint_path, "checkpoint_uri": result.checkpoint_uri, "steps": result.total_steps}
    open(cache + "/result.json", "w").write(json.dumps(told))
"""


class Runs:
    """Runs of one model, with the server's address as a default."""

    def __init__(self, model: str, s3: S3) -> None:
        self.model, self.url = model, s3.url
        self.server = ForkServer(SOURCE, s3.environment() | {"NEMO_RL_STORAGE_PATIENCE": "20"})

    def run(
        self,
        output: str,
        cache: Path,
        steps: int = STEPS,
        *,
        port: int = 0,
        endpoint: str = "",
        keep: int = 2,
        seed: int = 7,
        keys: bool = True,
        kill_after: float | None = None,
    ) -> int:
        cache.mkdir(parents=True, exist_ok=True)
        words = (self.model, output, str(cache), steps, port, endpoint or self.url, keep, seed, keys)
        return self.server.run(*words, kill_after=kill_after)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from unit.trainers.conftest import write_model

    return write_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def runs(tiny_model: str, s3: S3):
    started = Runs(tiny_model, s3)
    yield started
    started.server.close()


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


def finished(uri: str) -> bool:
    """Whether the run was complete; if it was killed, it had only to let its lease go."""
    head = read_head(Store(uri))
    return bool(head and head["record"] and head["record"]["status"] == "finished")


def in_store(uri: str, killed: bool = False) -> dict[str, object]:
    """What a store holds of a run, every file of every checkpoint checked against its digest."""
    store = Store(uri)
    head = read_head(store)
    assert head is not None and (killed or head["holder"] is None)
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
    draw = random.Random(SEED)
    disk, seconds = undisturbed
    uri, kills = "s3://bucket/killed/run", 0
    while kills < KILLS:
        cache = tmp_path / f"machine-{draw.randrange(2) * kills}"
        code = runs.run(uri, cache, kill_after=draw.uniform(0.1, 1.6) * seconds)
        if finished(uri):
            assert in_store(uri, killed=code != 0) == on_disk(disk)
            uri = f"s3://bucket/killed-{kills}/run"
        else:
            assert code != 0
        kills += 1
    assert runs.run(uri, tmp_path / "last") == 0
    assert in_store(uri) == on_disk(disk)


def written(method: str, path: str, uri: str) -> bool:
    """Whether a request changes something of the run. One that deletes names its objects in its body."""
    return method in ("PUT", "POST") and (path.startswith(f"/{uri.removeprefix('s3://')}/") or path.endswith("?delete"))


def test_kills_in_the_midst_of_saves_leave_whole_checkpoints(
    runs, undisturbed, weights, tmp_path, store_environment, faults: Faults, monkeypatch
):
    """At a request of a save, drawn by the seed: before the store has it, or when the store has done it and before it says so.

    Whatever the store names after a kill is whole, and is what the undisturbed run had at that step.
    """
    monkeypatch.setenv("NEMO_RL_CACHE", str(tmp_path / "reader"))
    calm = "s3://bucket/calm/run"
    assert runs.run(calm, tmp_path / "calm", endpoint=faults.url) == 0
    changes = sum(written(method, path, calm) for method, path, _ in faults.seen)
    draw, numbers, kills, loaded = random.Random(SEED), itertools.count(), 0, 0
    uri = f"s3://bucket/saves-{next(numbers)}/run"
    while kills < KILLS:
        left, way, killed = [draw.randrange(1, changes)], draw.choice(["kill", "killed"]), []

        def choose(method, path, left=left, way=way, killed=killed, uri=uri):
            if not written(method, path, uri) or killed:
                return None
            left[0] -= 1
            if left[0] > 0 or not ("/checkpoints/" in path or path.endswith(("run.json", "?delete"))):
                return None
            killed.append(path)
            return way

        faults.choose, faults.kill = choose, lambda: os.kill(runs.server.pid, signal.SIGKILL)
        code = runs.run(uri, tmp_path / f"machine-{draw.randrange(2) * kills}", endpoint=faults.url)
        faults.choose = lambda method, path: None
        assert code == (-signal.SIGKILL if killed else 0)
        loaded += whole(uri, weights)
        if finished(uri):
            assert in_store(uri, killed=bool(killed)) == on_disk(undisturbed[0])
            uri = f"s3://bucket/saves-{next(numbers)}/run"
        else:
            assert killed
        kills += bool(killed)
    assert runs.run(uri, tmp_path / "last", endpoint=faults.url) == 0
    assert in_store(uri) == on_disk(undisturbed[0])
    assert loaded > 0


@pytest.fixture(scope="module")
def weights(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the weights of each checkpoint of an undisturbed run."""
    folder = tmp_path_factory.mktemp("every")
    assert runs.run(str(folder / "run"), folder / "cache", keep=99) == 0
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("run/checkpoints/step-*/model.safetensors")
    }


MOMENTS = {
    "before": (lambda method, path: True, set()),
    "save": (lambda method, path: method in ("PUT", "POST") and "/checkpoints/step-00000004-" in path, {2}),
    "end": (lambda method, path: method in ("PUT", "POST") and f"/checkpoints/step-{STEPS:08d}-" in path, {6, 8}),
    "resume": (lambda method, path: method in ("GET", "HEAD") and "/checkpoints/step-" in path, {2, 4}),
}
"""Which request begins the trouble, and the steps whose checkpoints must be there when it has ended the run."""


def killed_in_the_third_save(runs: Runs, uri: str, cache: Path, faults: Faults) -> None:
    faults.choose = lambda method, path: "kill" if method == "PUT" and "/checkpoints/step-00000006-" in path else None
    faults.kill = lambda: os.kill(runs.server.pid, signal.SIGKILL)
    assert runs.run(uri, cache, endpoint=faults.url) == -signal.SIGKILL
    faults.choose = lambda method, path: None


@pytest.mark.parametrize(("moment", "fault"), [*itertools.product(MOMENTS, TRIED)])
def test_each_fault_at_each_moment_loses_nothing(
    runs, undisturbed, weights, tmp_path, faults: Faults, monkeypatch, moment: str, fault: str
):
    """What passes is not noticed. What lasts ends the run in words, and the next call, on another machine, ends as if it had not been."""
    monkeypatch.setenv("NEMO_RL_CACHE", str(tmp_path / "reader"))
    uri = f"s3://bucket/{moment}-{fault}/run"
    which, there = MOMENTS[moment]
    if moment == "resume":
        killed_in_the_third_save(runs, uri, tmp_path / "killed", faults)
    faults.choose = after(0, fault, which)
    code = runs.run(uri, tmp_path / "ill", endpoint=faults.url)
    met = [path for _, path, found in faults.seen if found == fault]
    faults.choose = lambda method, path: None
    assert met
    if fault in LASTING:
        assert code == 74
        assert LASTING[fault] in (tmp_path / "ill" / "failed").read_text()
        head = read_head(Store(uri))
        assert {entry["step"] for entry in head["checkpoints"]} == there if head else not there
        assert whole(uri, weights) == len(there)
        code = runs.run(uri, tmp_path / "well", endpoint=faults.url)
    assert code == 0
    assert in_store(uri) == on_disk(undisturbed[0])


@pytest.mark.parametrize("moment", ["before", "save", "resume"])
def test_a_store_that_knows_no_conditions_is_refused_and_what_is_there_stays(
    runs, undisturbed, tmp_path, faults: Faults, moment: str
):
    """A run that has begun has one writer all the same."""
    uri = f"s3://bucket/{moment}-unconditional/run"
    if moment == "resume":
        killed_in_the_third_save(runs, uri, tmp_path / "killed", faults)
    before = faults.server.objects(uri.removeprefix("s3://bucket/"))

    def forget(method, path):
        if moment != "save" or MOMENTS["save"][0](method, path):
            faults.ignored = ("if-none-match", "if-match")

    faults.choose = forget
    code = runs.run(uri, tmp_path / "ill", endpoint=faults.url)
    faults.choose, faults.ignored = lambda method, path: None, ()
    if moment != "save":
        assert code == 74
        assert "has no conditional writes" in (tmp_path / "ill" / "failed").read_text()
        assert faults.server.objects(uri.removeprefix("s3://bucket/")) == before
        code = runs.run(uri, tmp_path / "well", endpoint=faults.url)
    assert code == 0
    assert in_store(uri) == on_disk(undisturbed[0])


@pytest.mark.parametrize("begun", [False, True])
def test_without_credentials_nothing_is_trained_and_nothing_lost(
    runs, undisturbed, tmp_path, faults: Faults, begun: bool
):
    uri = f"s3://bucket/keyless-{begun}/run"
    if begun:
        killed_in_the_third_save(runs, uri, tmp_path / "killed", faults)
    before = faults.server.objects(uri.removeprefix("s3://bucket/"))
    assert runs.run(uri, tmp_path / "ill", keys=False) == 74
    assert "found no credentials" in (tmp_path / "ill" / "failed").read_text()
    assert faults.server.objects(uri.removeprefix("s3://bucket/")) == before
    assert runs.run(uri, tmp_path / "well") == 0
    assert in_store(uri) == on_disk(undisturbed[0])


@pytest.mark.parametrize("harm", ["altered", "shorter", "gone"])
def test_half_a_checkpoint_is_passed_over_and_made_again(runs, undisturbed, tmp_path, faults: Faults, harm: str):
    uri = f"s3://bucket/half-{harm}/run"
    killed_in_the_third_save(runs, uri, tmp_path / "killed", faults)
    newest = read_head(Store(uri))["checkpoints"][-1]
    file = faults.server.data / f"bucket/half-{harm}/run/checkpoints/{newest['folder']}/model.safetensors"
    content = file.read_bytes()
    changes = {"altered": content[:-1] + bytes([content[-1] ^ 1]), "shorter": content[: len(content) // 2]}
    file.unlink() if harm == "gone" else file.write_bytes(changes[harm])
    assert runs.run(uri, tmp_path / "next") == 0
    assert f"passed over the checkpoint {newest['name']}" in (tmp_path / "next" / "warnings").read_text()
    assert in_store(uri) == on_disk(undisturbed[0])


@pytest.mark.parametrize("done", [False, True])
def test_another_run_at_the_address_is_left_as_it_is(runs, undisturbed, tmp_path, faults: Faults, done: bool):
    """The one that differs begins beside it; the first goes on where it was."""
    uri = f"s3://bucket/another-{done}/run"
    if done:
        assert runs.run(uri, tmp_path / "first") == 0
    else:
        killed_in_the_third_save(runs, uri, tmp_path / "first", faults)
    at = faults.server.data / uri.removeprefix("s3://")
    before = {name: (at / name).read_bytes() for name, _ in walk(at)}
    assert runs.run(uri, tmp_path / "other", seed=8) == 0
    assert {name: (at / name).read_bytes() for name, _ in walk(at)} == before
    other = in_store(f"{uri}-2")
    assert other["weights"] != on_disk(undisturbed[0])["weights"]
    assert len(other["metrics"]) == len(on_disk(undisturbed[0])["metrics"])
    if not done:
        assert runs.run(uri, tmp_path / "second") == 0
    assert in_store(uri) == on_disk(undisturbed[0])


def test_what_a_kill_left_of_the_last_save_is_finished_by_the_next_call(
    runs, undisturbed, tmp_path, store_environment, faults: Faults
):
    """Killed when the last checkpoint is named, and neither pointed to nor one of as many as are kept: no save follows it."""
    uri = "s3://bucket/last-save/run"
    last = f"/{uri.removeprefix('s3://')}/checkpoints/step-{STEPS:08d}-g1/manifest.json"
    faults.choose = lambda method, path: "kill" if method in ("PUT", "POST") and path == last else None
    faults.kill = lambda: os.kill(runs.server.pid, signal.SIGKILL)
    assert runs.run(uri, tmp_path / "first", endpoint=faults.url) == -signal.SIGKILL
    faults.choose = lambda method, path: None
    assert runs.run(uri, tmp_path / "second", endpoint=faults.url) == 0
    assert in_store(uri) == on_disk(undisturbed[0])


def whole(uri: str, weights: dict[str, str]) -> int:
    """Checks what a killed run left: each checkpoint that is named has the weights of that step; how many there are."""
    store = Store(uri)
    head = read_head(store)
    entries = head["checkpoints"] if head else []
    for entry in entries:
        for file in entry["files"]:
            content = store.read(f"checkpoints/{entry['folder']}/{file['path']}")
            assert content is not None and hashlib.sha256(content[0]).hexdigest() == file["sha256"]
            if file["path"] == "model.safetensors":
                assert file["sha256"] == weights[entry["name"]]
    for pointer in ("latest", "best"):
        if json.loads(read_text(store, pointer) or b"{}"):
            found = local_model(f"{uri}/{pointer}")
            step = json.loads(read_text(store, pointer))["checkpoint"].split("/")[1].rpartition("-g")[0]
            assert hashlib.sha256((found / "model.safetensors").read_bytes()).hexdigest() == weights[step]
    return len(entries)


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


def test_two_nodes_that_are_stopped_say_what_was_saved(runs, tmp_path, faults: Faults):
    """A checkpoint does not stay on the second node, which knows all the same that there is one. The one that a run went on from does:
    it is not the one that was saved."""
    uri = "s3://bucket/stopped/run"
    for attempt, step in (("first", 2), ("second", 6)):
        asked: list[str] = []

        def choose(method, path, step=step, asked=asked):
            if method == "PUT" and f"/checkpoints/step-{step:08d}-" in path and not asked:
                asked.append(path)
                os.kill(runs.server.pid, signal.SIGTERM)

        faults.choose = choose
        assert runs.run(uri, tmp_path / attempt, port=free_port(), endpoint=faults.url) == 75
        newest = read_head(Store(uri))["checkpoints"][-1]
        end = ". Run the same call again to go on"
        saved = f"stopped by SIGTERM; saved step {newest['step']}"
        told = [(tmp_path / attempt / f"stopped-{rank}").read_text() for rank in (0, 1)]
        assert told[0] == f"{saved} to {uri}/checkpoints/{newest['folder']}{end}"
        assert told[1] == f"{saved}{end}"


def test_a_finished_run_is_lengthened_on_another_machine(runs, undisturbed, tmp_path, store_environment):
    longer = tmp_path / "disk" / "run"
    for steps in (STEPS - 4, STEPS):
        assert runs.run(str(longer), tmp_path / "unused", steps) == 0
        assert runs.run("s3://bucket/longer/run", tmp_path / f"machine-{steps}", steps) == 0
    assert in_store("s3://bucket/longer/run") == on_disk(longer)
    assert runs.run("s3://bucket/longer/run", tmp_path / "again", STEPS) == 0, "the same once more begins beside it"
    assert in_store("s3://bucket/longer/run-2") == on_disk(undisturbed[0])
