"""Saving and loading a checkpoint through nemo_rl.storage, against plain transfers of the same bytes by obstore and boto3.

    python benchmarks/storage.py --gib 1 --ranks 1 2 4

Starts a real S3 server (versitygw, built once from its Go module) in a folder of this machine. Each rank is a process with its share
of the bytes. Ours reads each file once more for its SHA-256, and checks size and digest on reading; the others do neither.
The order of the three changes from round to round. Seconds are medians, from the moment when all processes are ready; CPU seconds are
those of the largest process; memory is the peak that a process grew by. boto3 is left out where it is not installed.

At the end: steps of a small model on one thread, with and without a save in the background. Server and save have the other cores,
as they have beside a GPU; `lost` is the time by which the steps are later, as a share of the save's length. Time in which other
programs had the core of the steps is taken out.
"""

from __future__ import annotations

import argparse
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
    save, load = WAYS[way](file, copy, key)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for work in (save, load):
        gate.wait()
        begin, cpu = time.perf_counter(), time.process_time()
        work()
        seconds.append((begin, time.perf_counter(), time.process_time() - cpu))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert copy.stat().st_size == file.stat().st_size
    copy.unlink()
    told.put((seconds, grown))


def _ours(file: Path, copy: Path, key: str) -> tuple[Any, Any]:
    from nemo_rl.storage.store import Store
    from nemo_rl.storage.transfer import download, upload

    store, sent = Store(f"s3://{BUCKET}/{key.rpartition('/')[0]}"), []
    name = key.rpartition("/")[2]

    def save() -> None:
        sent[:] = upload(store, [(name, file)])

    def load() -> None:
        download(store, sent, copy.parent / f"{copy.name}.d")
        (copy.parent / f"{copy.name}.d" / name).rename(copy)

    return save, load


def _obstore(file: Path, copy: Path, key: str) -> tuple[Any, Any]:
    import obstore

    store = obstore.store.S3Store(BUCKET, client_options={"allow_http": True})

    def load() -> None:
        with open(copy, "wb") as out:
            for piece in obstore.get(store, key).stream(min_chunk_size=10 << 20):
                out.write(piece)

    return lambda: obstore.put(store, key, file), load


def _boto3(file: Path, copy: Path, key: str) -> tuple[Any, Any]:
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    return (
        lambda: client.upload_file(str(file), BUCKET, key),
        lambda: client.download_file(BUCKET, key, str(copy)),
    )


def _lost(folder: Path, size: int, server: int) -> float:
    """The time that steps of training lose to a save in the background, as a share of the save's length."""
    import threading

    import torch

    from nemo_rl.storage.store import Store
    from nemo_rl.storage.transfer import upload

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    (folder / "background").write_bytes(os.urandom(size))
    (folder / "first").write_bytes(b"imports and connections are there before the first save of a run")
    upload(Store(f"s3://{BUCKET}/background"), [("first", folder / "first")])
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
    optimizer, batch = torch.optim.AdamW(model.parameters()), torch.randn(64, 256)
    took: list[float] = []

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    def save() -> None:
        os.sched_setaffinity(threading.get_native_id(), cores[1:] or cores)  # what it starts has the same
        begin = time.perf_counter()
        upload(Store(f"s3://{BUCKET}/background"), [("file", folder / "background")])
        took.append(time.perf_counter() - begin)

    os.sched_setaffinity(server, cores[1:] or cores)
    os.sched_setaffinity(0, cores[:1])
    try:
        for _ in range(20):
            step()
        begin, alone = _own_time(), 0
        while _own_time() - begin < 1.5:
            step()
            alone += 1
        each = (_own_time() - begin) / alone
        saving = threading.Thread(target=save)
        saving.start()
        begin, done = _own_time(), 0
        while not took:
            step()
            done += 1
        length = _own_time() - begin
        saving.join()
    finally:
        os.sched_setaffinity(0, cores)
    return 1 - done * each / length


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
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    ways = [way for way in WAYS if way != "boto3" or importlib.util.find_spec("boto3")]
    rows = []
    with tempfile.TemporaryDirectory(prefix="nemo-rl-storage-") as place, serving(Path(place)) as server:
        os.environ.update(server.environment())
        for count in options.ranks:
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
        lost = [_lost(Path(place), int(options.gib * 2**30), server.process.pid) for _ in range(options.rounds)]
        rows.append({"what": "background save", "lost": round(statistics.median(lost), 3)})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"gib": options.gib, "rounds": options.rounds, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
