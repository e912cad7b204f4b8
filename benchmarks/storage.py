"""Saving and loading a checkpoint through nemo_rl.storage, against plain transfers of the same bytes by obstore and boto3.

    python benchmarks/storage.py --gib 1 --ranks 1 2 4

Starts a real S3 server (versitygw, built once from its Go module) in a folder of this machine. Each rank is a process with its share
of the bytes. Ours reads each file once more for its SHA-256, and checks size and digest on reading; the others do neither.
The order of the three changes from round to round. Seconds are medians, from the moment when all processes are ready; CPU seconds are
those of the largest process (ours sends from one of its own, whose time is not in it); memory is the peak that a process grew by,
while it saves with all that the one that sends has. boto3 is left out where it is not installed.

At the end (alone with `--only lost`): steps of a small model with and without a save in the background; `lost` is the time by which
the steps are later, as a share of the save's length, beside that of the same bytes sent by plain obstore in a process. With a free
core: training has one to itself, as it has beside a GPU; server and save have the others, and time in which other programs had
training's core is taken out. Without one: training has a thread on each core, and server and save take from it what they need.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path = [str(ROOT), str(ROOT / "tests"), *(p for p in sys.path if Path(p).resolve() != ROOT / "benchmarks")]

BUCKET = "bucket"


def _rank(way: str, rank: int, source: str, target: str, gate: Any, told: Any) -> None:
    """One process: saves its file when all are ready, and loads it."""
    file, copy, key = Path(source), Path(target) / f"{way}-{rank}", f"{way}/part-{rank}"
    save, load, helper = WAYS[way](file, copy, key)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, grown = [], 0.0
    for work in (save, load):
        gate.wait()
        begin, cpu = time.perf_counter(), time.process_time()
        work()
        seconds.append((begin, time.perf_counter(), time.process_time() - cpu))
        beside = _peak(helper()) if work is save else 0  # nothing is sent while a checkpoint is loaded
        grown = max(grown, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before + beside) / 1024)
    assert copy.stat().st_size == file.stat().st_size
    copy.unlink()
    told.put((seconds, grown))


def _peak(pid: int | None) -> int:
    """The most memory that a process had, in KiB."""
    if pid is None:
        return 0
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0])


def _ours(file: Path, copy: Path, key: str) -> tuple[Any, Any, Any]:
    from nemo_rl.storage.sender import Sender
    from nemo_rl.storage.store import Store
    from nemo_rl.storage.transfer import download

    store, sent, sender = Store(f"s3://{BUCKET}/{key.rpartition('/')[0]}"), [], Sender()
    name = key.rpartition("/")[2]
    first = file.with_name(f"{file.name}.first")
    first.write_bytes(b"the process is there before the first save of a run")
    sender.upload(store, [("first", first)])

    def save() -> None:
        sent[:] = sender.upload(store, [(name, file)])

    def load() -> None:
        download(store, sent, copy.parent / f"{copy.name}.d")
        (copy.parent / f"{copy.name}.d" / name).rename(copy)

    return save, load, lambda: sender.pid


def _obstore(file: Path, copy: Path, key: str) -> tuple[Any, Any, Any]:
    import obstore

    store = obstore.store.S3Store(BUCKET, client_options={"allow_http": True})

    def load() -> None:
        with open(copy, "wb") as out:
            for piece in obstore.get(store, key).stream(min_chunk_size=10 << 20):
                out.write(piece)

    return lambda: obstore.put(store, key, file), load, lambda: None


def _boto3(file: Path, copy: Path, key: str) -> tuple[Any, Any, Any]:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    return (
        lambda: client.upload_file(str(file), BUCKET, key),
        lambda: client.download_file(BUCKET, key, str(copy)),
        lambda: None,
    )


def _lost(folder: Path, size: int, server: int, send: Any, sender: Any, free_core: bool) -> float:
    """The time that steps of training lose while `send` sends the file, as a share of the time that it takes.

    With a `free_core` training has the first core alone: the server, the process that sends and the other threads of this one
    have the rest. Without one, everything has all cores, and training has a thread for each.
    """
    import threading

    import torch

    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1 if free_core else len(cores))
    width = 256 if free_core else 512
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))
    optimizer, batch = torch.optim.AdamW(model.parameters()), torch.randn(64, width)
    took: list[float] = []
    clock = _own_time if free_core else time.perf_counter

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    def alone() -> float:
        """Seconds of a step while nothing is sent."""
        begin, count = clock(), 0
        while clock() - begin < 1.0:
            step()
            count += 1
        return (clock() - begin) / count

    def save() -> None:
        begin = time.perf_counter()
        send(folder / "background")
        took.append(time.perf_counter() - begin)

    (folder / "background").write_bytes(os.urandom(1 << 20))
    send(folder / "background")  # imports, connections and processes are there before the first save of a run
    with open(folder / "background", "wb") as out:
        for begin in range(0, size, 1 << 20):
            out.write(os.urandom(min(1 << 20, size - begin)))
    for _ in range(20):
        step()
    saving = threading.Thread(target=save)
    try:
        if free_core:
            _keep_on([server, *sender()], cores[1:] or cores)
            os.sched_setaffinity(0, cores[:1])
        before = alone()
        saving.start()
        if free_core:
            os.sched_setaffinity(saving.native_id or 0, cores[1:] or cores)
        begin, done = clock(), 0
        while not took:
            step()
            done += 1
        length = clock() - begin
        saving.join()
        each = (before + alone()) / 2
    finally:
        _keep_on([server, os.getpid()], cores)
    return 1 - done * each / length


def _keep_on(processes: list[int], cores: list[int]) -> None:
    """Gives the threads of these processes, and those of this one beside the first, these cores."""
    for process in {*processes, os.getpid()}:
        for thread in os.listdir(f"/proc/{process}/task"):
            if int(thread) != os.getpid() or process in processes:
                with contextlib.suppress(OSError):  # it has ended
                    os.sched_setaffinity(int(thread), cores)


def _plain(pipe: Any) -> None:
    """A process that sends files by plain obstore."""
    import obstore

    store = obstore.store.S3Store(BUCKET, client_options={"allow_http": True})
    while path := pipe.recv():
        obstore.put(store, "background/plain", Path(path))
        pipe.send(True)


def lost(folder: Path, size: int, server: int, rounds: int, in_thread: bool = False) -> list[dict[str, Any]]:
    """Rows for what training loses to a save in the background, beside the same bytes sent by plain obstore in a process.

    `in_thread`: and by ours in a thread of the process that trains.
    """
    from nemo_rl.storage.sender import Sender
    from nemo_rl.storage.store import Store
    from nemo_rl.storage.transfer import upload

    own, (here, there) = Sender(), multiprocessing.Pipe()
    plain = multiprocessing.get_context("spawn").Process(target=_plain, args=(there,), daemon=True)
    plain.start()
    store = Store(f"s3://{BUCKET}/background")
    ways: dict[str, tuple[Any, Any]] = {
        "nemo_rl": (lambda path: own.upload(store, [(path.name, path)]), lambda: [own.pid]),
        "obstore": (lambda path: (here.send(str(path)), here.recv()), lambda: [plain.pid]),
    }
    if in_thread:
        ways["thread"] = (lambda path: upload(store, [(path.name, path)]), list)
    rows = []
    for free_core in (True, False):
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, (send, sender) in ways.items():
                found[way].append(_lost(folder, size, server, send, sender, free_core))
        row: dict[str, Any] = {"what": f"background save {'with' if free_core else 'without'} a free core"}
        rows.append(row | {f"{way} lost": round(statistics.median(shares), 3) for way, shares in found.items()})
    own.close()
    here.send(None)
    plain.join()
    return rows


def _own_time() -> float:
    """Seconds on the clock without those in which this thread could have run and other programs had its core."""
    return time.perf_counter() - int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


WAYS = {"nemo_rl": _ours, "obstore": _obstore, "boto3": _boto3}


def measure(way: str, files: list[Path], folder: Path) -> dict[str, float]:
    """One round of one way: seconds of the slowest rank, and MiB that the largest process grew by."""
    context = multiprocessing.get_context("spawn")
    gate, told = context.Barrier(len(files)), context.Queue()
    ranks = [
        context.Process(target=_rank, args=(way, rank, str(file), str(folder), gate, told))
        for rank, file in enumerate(files)
    ]
    for rank in ranks:
        rank.start()
    found = [told.get(timeout=600) for _ in ranks]
    for rank in ranks:
        rank.join()
    save, load = ([seconds[i] for seconds, _ in found] for i in (0, 1))
    return {
        "save": max(end for _, end, _ in save) - min(begin for begin, _, _ in save),
        "load": max(end for _, end, _ in load) - min(begin for begin, _, _ in load),
        "save cpu": max(cpu for _, _, cpu in save),
        "load cpu": max(cpu for _, _, cpu in load),
        "memory": max(grown for _, grown in found),
    }


def main() -> None:
    from storage.server import serving

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["transfers", "lost"], help="leave the other out")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    ways = [way for way in WAYS if way != "boto3" or importlib.util.find_spec("boto3")]
    rows = []
    with tempfile.TemporaryDirectory(prefix="nemo-rl-storage-") as place, serving(Path(place)) as server:
        os.environ.update(server.environment())
        for count in options.ranks if options.only != "lost" else ():
            size = int(options.gib * 2**30) // count
            files = []
            for rank in range(count):
                files.append(Path(place) / f"shard-{count}-{rank}")
                with open(files[-1], "wb") as out:
                    for begin in range(0, size, 1 << 20):
                        out.write(os.urandom(min(1 << 20, size - begin)))
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for number in range(options.rounds):
                for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                    found[way].append(measure(way, files, Path(place)))
            medians = {
                way: {what: statistics.median(r[what] for r in rounds) for what in rounds[0]}
                for way, rounds in found.items()
            }
            for file in files:
                file.unlink()
            for what in ("save", "load"):
                best = min(medians[way][what] for way in ways if way != "nemo_rl")
                row = {"ranks": count, "what": what, "speed": round(best / medians["nemo_rl"][what], 2)}
                row |= {f"{way} s": round(medians[way][what], 2) for way in ways}
                row |= {f"{way} cpu s": round(medians[way][f"{what} cpu"], 2) for way in ways}
                row["memory MiB"] = round(medians["nemo_rl"]["memory"])
                rows.append(row)
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if options.only != "transfers":
            alone = options.only == "lost"
            for row in lost(Path(place), int(options.gib * 2**30), server.process.pid, options.rounds, alone):
                rows.append(row)
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"gib": options.gib, "rounds": options.rounds, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
