"""What a cluster costs beside training here: the same short job both ways, phase by phase.

    python benchmarks/overhead.py [--steps 50] [--rounds 3] [--write FILE]

The job is the GRPO of examples/demo.py on a CPU, with one thread. Each side runs in a process of its own, in turn; shown
is the median of each phase. The cluster is the one of the current context, and its images must be on the node already.
Both runs must give the same metrics, or there is nothing to compare.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
PHASES = {
    "client": "the client's own start: Python and `import nemo_rl`",
    "ship": "capture of the reward, and the proof that it loads anew",
    "trial": "the reward tried on a few rows, in a process of its own",
    "upload": "the resource and its bundles, applied",
    "pod": "operator, scheduler and kubelet, until the trainer's process begins",
    "imports": "torch, transformers and nemo_rl",
    "data": "data set",
    "model": "model",
    "start": "optimizer, workers of the reward",
    "first step": "",
    "other steps": "",
    "end": "last checkpoint saved, pod ended, phase Succeeded seen by the client",
    "fetch": "file server started, checkpoint and metrics fetched and checked",
}
Times = dict[str, float]


def demo() -> Any:
    spec = importlib.util.spec_from_file_location("nemo_rl_demo", ROOT / "examples" / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits_in_place(prompt: str, response: str, answer: str) -> float:
    return sum(given == wanted for given, wanted in zip(response, answer, strict=False)) / len(answer)


def call(folder: Path, steps: int, backend: str, **more: Any) -> Any:
    import nemo_rl

    return nemo_rl.train(
        folder / "model",
        json.loads((folder / "rows.json").read_text()),
        digits_in_place,
        max_steps=steps,
        max_epochs=10_000,
        batch_size=8,
        num_generations_per_prompt=8,
        max_new_tokens=8,
        learning_rate=1e-4,
        gpus=0,
        size="1Gi",
        env={"OMP_NUM_THREADS": "1"},
        backend=backend,
        **more,
    )


def age_of_process() -> float:
    """Seconds since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def here(folder: Path, steps: int) -> Times:
    """One run in this process, observed as a trainer pod observes its own."""
    from nemo_rl.api import algorithms

    started = time.monotonic() - age_of_process()
    times: Times = {"client": age_of_process()}
    begin = time.monotonic()
    import transformers.modeling_utils  # noqa: F401

    found = algorithms.get_algorithm("grpo")
    times["imports"] = time.monotonic() - begin

    from nemo_rl.worker import report as phases
    from nemo_rl.worker.observe import Observer, observed
    from nemo_rl.worker.prometheus import TrainMetrics

    report = phases.Report()
    observer = Observer(report, TrainMetrics(), claim=Path.cwd(), grace=None)
    trainer = observed(found, report, observer)
    algorithms.get_algorithm = lambda name: trainer  # type: ignore[assignment]
    result = call(folder, steps, "local", output_dir=folder / "here", callbacks=[observer])
    seconds = report.seconds
    times |= {"data": seconds[phases.PREPARING_DATA], "model": seconds[phases.LOADING_MODEL]}
    times["start"] = seconds[phases.STARTING]
    _steps(times, result.history)
    times["end"] = time.monotonic() - started - sum(times.values())
    return times


def there(folder: Path, steps: int) -> Times:
    """One run on the cluster, followed as `train()` follows it."""
    import nemo_rl  # noqa: F401
    from nemo_rl.backends.kubernetes import submit
    from nemo_rl.backends.kubernetes.follow import Follower
    from nemo_rl.job.status import JobStatus

    times: Times = {"client": age_of_process()}

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            begin = time.monotonic()
            try:
                return function(*args)
            finally:
                times[phase] = time.monotonic() - begin

        return wrapper

    submit.gather = timed("ship", submit.gather)
    submit.try_reward = timed("trial", submit.try_reward)
    begin = time.monotonic()
    job = call(folder, steps, "kubernetes", output_dir=folder / "there", wait=False)
    submitted = time.monotonic()
    times["upload"] = submitted - begin - times["ship"] - times["trial"]

    first = last = ended = submitted
    with Follower(job._cluster, job.name) as follower:
        for kind, what in follower.events(600):
            now = time.monotonic()
            if kind == "line" and what.startswith("phase "):
                parts = dict(part.split("=") for part in what.split()[1:])
                times |= {name: float(parts[name]) for name in ("imports", "data", "model", "start")}
                first = now
            elif kind == "line" and re.match(rf"step={steps}/", what):
                last = now
            elif kind == "job":
                job._see(what)
                if JobStatus.load(what.get("status")).finished:
                    ended = now
                    break
    begin = time.monotonic()
    result = job.fetch(quiet=True)
    times["fetch"] = time.monotonic() - begin
    _steps(times, result.history)
    pod = sum(times[name] for name in ("imports", "data", "model", "start", "first step"))
    times["pod"] = max(0.0, first - submitted - pod)
    times["end"] = ended - last
    job.delete()
    return times


def _steps(times: Times, history: list[dict[str, Any]]) -> None:
    seconds = [row["step_seconds"] for row in history]
    times["first step"], times["other steps"] = seconds[0], sum(seconds[1:])


def measure(folder: Path, side: str, steps: int) -> Times:
    """One run of a side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def same_metrics(folder: Path) -> bool:
    from nemo_rl.run.metrics import read_history

    def numbers(side: str) -> list[dict[str, Any]]:
        rows = read_history(folder / side / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in rows]

    return numbers("here") == numbers("there") != []


def table(found: dict[str, list[Times]], steps: int) -> str:
    lines = ["| phase | here, s | cluster, s | |", "| --- | ---: | ---: | --- |"]
    median = {side: {phase: _median(runs, phase) for phase in PHASES} for side, runs in found.items()}
    for phase, meaning in PHASES.items():
        lines.append(f"| {phase} | {_cell(median['here'][phase])} | {_cell(median['there'][phase])} | {meaning} |")
    totals = {side: statistics.median(sum(run.values()) for run in runs) for side, runs in found.items()}
    lines.append(f"| all of {steps} steps | {totals['here']:.2f} | {totals['there']:.2f} | |")
    lines.append(f"\nThe cluster's path adds {totals['there'] - totals['here']:.1f} s.")
    return "\n".join(lines)


def _median(runs: list[Times], phase: str) -> float | None:
    found = [run[phase] for run in runs if phase in run]
    return statistics.median(found) if found else None


def _cell(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--write", type=Path, help="file for the table, besides standard output")
    arguments.add_argument("--side", choices=("here", "there"), help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.side:
        times = (here if options.side == "here" else there)(options.folder, options.steps)
        print(json.dumps(times))
        return
    found: dict[str, list[Times]] = {"here": [], "there": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        demo().make_model(folder / "model", seed=0)
        (folder / "rows.json").write_text(json.dumps(demo().make_rows(64, seed=0, without=set())))
        for _ in range(options.rounds):
            for side, runs in found.items():
                runs.append(measure(folder, side, options.steps))
        if not same_metrics(folder):
            raise SystemExit("the two runs gave different metrics; there is nothing to compare")
    load = os.getloadavg()[0]
    text = (
        f"{table(found, options.steps)}\n\nBoth gave the same metrics. Median of {options.rounds} runs; "
        f"{os.cpu_count()} processors, load {load:.1f} at the end, {time.strftime('%Y-%m-%d')}.\n"
    )
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(f"# Overhead of the cluster's path\n\n`python benchmarks/overhead.py`\n\n{text}")


if __name__ == "__main__":
    main()
