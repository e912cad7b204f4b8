"""GRPO of the demo's task with completions of vLLM and of the trainer's own decode loop, and rollouts that run ahead of slow rewards.

    python benchmarks/rollouts.py [--seeds 0,1,2] [--steps 100] [--vllm-python PATH] [--only speed] [--engines in_process,vllm]

Its parts: `curves` (whole runs, a busy machine does no harm), `speed` (tokens a second, a step, an update: some steps of the same
run, for a quiet machine) and `ahead` (slow rewards). One vLLM server serves all runs, as one of somebody else would:
`rollout={"engine": "vllm", "urls": [...]}`. Without --vllm-python it is the CPU build of tests/real_vllm. What was measured is
kept in build/rollouts, and a run that is there is not made again, but for what --only asks for, which is measured anew.
benchmarks/results/rollouts.md and rollouts.svg are written from all that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402

import nemo_rl  # noqa: E402
from nemo_rl.rollout.schedule import Schedule  # noqa: E402

BUILD = ROOT / "build" / "rollouts"
RESULTS = ROOT / "benchmarks" / "results"
BY_HAND = "## Killed servers and trainers"
"""What begins with this line is not measured here and stays in the report."""
ENGINES = ("in_process", "vllm")
PARTS = ("curves", "speed", "ahead")
BATCH, SAMPLES, NEW_TOKENS = 32, 8, 10
TAUGHT_STEPS = 80
SPEED_STEPS = 24
REWARD_SECONDS = 2.0
GROUPS = 4
"""Prompts of a step whose rewards are slow; there are workers enough that none waits for another."""
WORKERS = 12
AHEAD_STEPS, FIRST, LAST = 20, 7, 16
"""Steps of a run with slow rewards, and those that are counted: before them rollouts begin to run ahead, after them none is left to begin."""


@contextmanager
def vllm(python: str | None, model: str) -> Iterator[dict[str, Any]]:
    """A server with the model's architecture; yields `rollout=` of the runs that use it."""
    from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
    from nemo_rl.rollout.vllm.server import ServerProcess

    if python is None:
        command = [sys.executable, str(ROOT / "tests" / "real_vllm" / "environment.py")]
        python = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    options = ["--dtype", "float32", "--max-model-len", "96", "--enforce-eager", "--max-num-seqs", "256"]
    options += ["--kv-cache-memory-bytes", str(2**29), "--load-format", "dummy"]
    server = ServerProcess(python, Path(model), options, BUILD / "vllm.log")
    try:
        server.start(lambda: None, 3600.0)
        os.environ[TOKEN_VARIABLE] = server.token
        yield {"engine": "vllm", "urls": [server.client.url], "timeout_seconds": 3600.0}
    finally:
        server.close()


def taught(seed: int) -> str:
    """The demo's model after its supervised fine-tuning; both engines begin with it."""
    folder = BUILD / f"seed-{seed}"
    done = folder / "sft" / "checkpoints" / f"step-{TAUGHT_STEPS:08d}"
    if done.exists():
        return str(done)
    rows = examples(seed)
    result = nemo_rl.train(
        demo.make_model(folder / "model", seed),
        [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows],
        algorithm="sft",
        max_steps=TAUGHT_STEPS,
        max_epochs=2,
        batch_size=128,
        learning_rate=2e-3,
        warmup_steps=20,
        seed=seed,
        output_dir=folder / "sft",
        backend="local",
    )
    return str(result.checkpoint_path)


def held_out() -> list[dict[str, str]]:
    return demo.make_rows(256, seed=10_000, without=set())


def examples(seed: int) -> list[dict[str, str]]:
    return demo.make_rows(9_000, seed=seed, without={row["prompt"] for row in held_out()})


def trained(seed: int, rollout: dict[str, Any], steps: int, output: Path) -> Any:
    return nemo_rl.train(
        taught(seed),
        examples(seed),
        demo.sorted_exactly,
        max_steps=steps,
        max_epochs=2,
        batch_size=BATCH,
        num_generations_per_prompt=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        learning_rate=3e-4,
        warmup_steps=5,
        seed=seed,
        rollout=rollout,
        output_dir=output,
        resume=False,
        backend="local",
    )


def curve(seed: int, engine: str, rollout: dict[str, Any], steps: int) -> dict[str, Any]:
    """Trains the demo's task; returns the reward of each step, and the accuracy before and after."""
    result = trained(seed, rollout, steps, BUILD / f"seed-{seed}" / engine)
    history = [record for record in result.history if record["step"]]
    found = {
        "rewards": [record["reward"] for record in history],
        "before": demo.accuracy(taught(seed), held_out()),
        "after": demo.accuracy(result.checkpoint_path, held_out()),
    }
    if engine == "vllm":
        found["probe"] = max(record["rollout_probe"] for record in history)
        found["weight_bounds"] = [
            min(record["importance_weight_min"] for record in history if "importance_weight_min" in record),
            max(record["importance_weight_max"] for record in history if "importance_weight_max" in record),
        ]
    return found


def speed(engine: str, rollout: dict[str, Any]) -> dict[str, Any]:
    """Medians over the later steps of a short run: tokens a second, seconds of a step and of an update of weights."""
    result = trained(0, rollout, SPEED_STEPS, BUILD / "speed" / engine)
    history = [record for record in result.history if record["step"]]
    late = history[len(history) // 4 :]
    tokens = [record["completion_length"] * BATCH * SAMPLES / record["generate_seconds"] for record in late]
    found = {
        "tokens_per_second": statistics.median(tokens),
        "step_seconds": statistics.median(record["step_seconds"] for record in late),
    }
    if engine == "vllm":
        found["update_seconds"] = statistics.median(record["weight_sync_seconds"] for record in late)
    return found


@nemo_rl.batched_reward
def slow(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """Two seconds a group, as a sandbox or a judge may take; the machine's cores set no limit."""
    time.sleep(REWARD_SECONDS)
    return [float(response == answer) for response, answer in zip(responses, answer, strict=True)]


def ahead(engine: str, rollout: dict[str, Any], staleness: int) -> dict[str, Any]:
    """Means of a settled step's seconds with slow rewards."""
    result = nemo_rl.train(
        taught(0),
        examples(0),
        slow,
        max_steps=AHEAD_STEPS,
        batch_size=GROUPS,
        num_generations_per_prompt=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        learning_rate=1e-5,
        seed=0,
        reward_workers=WORKERS,
        rollout={**rollout, "max_staleness": staleness},
        output_dir=BUILD / "ahead" / f"{engine}-{staleness}",
        resume=False,
        backend="local",
    )
    steps = [record for record in result.history if FIRST <= record["step"] <= LAST]
    names = ("step_seconds", "generate_seconds", "reward_seconds", "train_seconds", "weight_sync_seconds")
    found = {name: statistics.mean(record.get(name, 0.0) for record in steps) for name in names}
    stale = [record["rollout_staleness"] for record in result.history if "rollout_staleness" in record]
    return {**found, "largest_staleness": max(stale, default=0)}


def predicted(on_policy: dict[str, Any], staleness: int, elsewhere: bool) -> float:
    """Seconds of a step by the model of the pipeline, played event by event, from what a step on policy took by its phases.

    A sampler that is `elsewhere` works while the trainer trains; each group's reward takes REWARD_SECONDS of one of WORKERS.
    """
    sampling, training, sync = (on_policy[f"{name}_seconds"] for name in ("generate", "train", "weight_sync"))
    rest = on_policy["step_seconds"] - sampling - training - sync - on_policy["reward_seconds"]
    schedule, begun, now, sampler = Schedule(staleness, AHEAD_STEPS), 0, 0.0, 0.0
    workers = [0.0] * WORKERS
    sampled: dict[int, float] = {}
    scored: dict[int, float] = {}
    ends = []
    for step in range(1, AHEAD_STEPS + 1):
        due = schedule.to_sample(step - 1, begun)
        waits = elsewhere and step in sampled and sampled[step] <= now < sampler  # it is trained first
        if due and not waits:
            now = max(now, sampler) + sync
            for number in due:
                begin = max(now, sampler)
                sampler = sampled[number] = begin + sampling
                if not elsewhere:
                    now = sampler
                for _ in range(GROUPS):
                    worker = min(range(WORKERS), key=workers.__getitem__)
                    workers[worker] = max(workers[worker], sampler) + REWARD_SECONDS
                    scored[number] = max(scored.get(number, 0.0), workers[worker])
            begun = due[-1]
        now = max(now, sampled[step], scored[step]) + training + rest
        ends.append(now)
    return (ends[LAST - 1] - ends[FIRST - 2]) / (LAST - FIRST + 1)


# --- the report


def kept(name: str, make: Callable[[], dict[str, Any]], anew: bool) -> None:
    path = BUILD / f"{name}.json"
    if anew or not path.exists():
        found = {**make(), "load": os.getloadavg()[0], "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        path.write_text(json.dumps(found))
    print(f"{name}: {path.read_text()[-300:]}", flush=True)


def read(name: str) -> dict[str, Any] | None:
    path = BUILD / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def report(seeds: list[int]) -> str:
    lines = [
        "# Rollouts by vLLM and in process",
        "",
        "`python benchmarks/rollouts.py`: the demo's task (digits to sort, 0.8 M parameters, tied embeddings), fp32, on "
        f"{os.cpu_count()} CPUs ({platform.machine()}) that trainer and server share; vLLM's CPU build 0.32.",
    ]
    runs = {(engine, seed): found for engine in ENGINES for seed in seeds if (found := read(f"{engine}-{seed}"))}
    if runs:
        lines += ["", "| engine | seed | accuracy before | after | when |", "| --- | ---: | ---: | ---: | --- |"]
        for (engine, seed), found in runs.items():
            lines.append(f"| {engine} | {seed} | {found['before']:.3f} | {found['after']:.3f} | {found['when']} |")
        for engine in ENGINES:
            after = [found["after"] for (own, _), found in runs.items() if own == engine]
            if after:
                lines.append(f"| {engine} | mean | | {statistics.mean(after):.3f} | |")
        drawn = [found for (engine, _), found in runs.items() if engine == "vllm"]
        if drawn:
            low, high = (extreme(found["weight_bounds"][i] for found in drawn) for i, extreme in enumerate((min, max)))
            lines += [
                "",
                f"In all {sum(len(found['rewards']) for found in drawn)} updates the gate's probe differed by at most "
                f"{max(found['probe'] for found in drawn):.1e} nats a token, and importance weights of trained tokens lay between "
                f"{low:.6f} and {high:.6f}.",
            ]
        lines += ["", "![Mean reward of each step, by engine and seed](rollouts.svg)"]
        draw(runs)
    measured = {engine: found for engine in ENGINES if (found := read(f"speed-{engine}"))}
    if measured:
        lines += [
            "",
            "## Speed",
            "",
            f"{BATCH} prompts with {SAMPLES} completions of at most {NEW_TOKENS} tokens a step; medians of the later steps of "
            f"{SPEED_STEPS}. The load is that of the machine when the run ended.",
            "",
            "| engine | tokens/s sampled | step, s | update of weights, s | when, load |",
            "| --- | ---: | ---: | ---: | --- |",
        ]
        for engine, found in measured.items():
            update = f"{found['update_seconds']:.2f}" if "update_seconds" in found else ""
            lines.append(
                f"| {engine} | {found['tokens_per_second']:.0f} | {found['step_seconds']:.2f} | {update} | {found['when']}, "
                f"{found['load']:.1f} |"
            )
    rows = []
    for engine in ENGINES:
        base = read(f"ahead-{engine}-0")
        for staleness in (0, 1, 4):
            if base is not None and (found := read(f"ahead-{engine}-{staleness}")):
                model = predicted(base, staleness, engine == "vllm")
                rows.append(
                    f"| {engine} | {staleness} | {found['step_seconds']:.2f} | {model:.2f} | {found['generate_seconds']:.2f} | "
                    f"{found['reward_seconds']:.2f} | {found['train_seconds']:.2f} | {found['largest_staleness']:g} | "
                    f"{found['when']}, {found['load']:.1f} |"
                )
    if rows:
        lines += [
            "",
            "## Rollouts that run ahead of slow rewards",
            "",
            f"{GROUPS} prompts with {SAMPLES} completions a step, a reward that waits {REWARD_SECONDS:g} s for each group, {WORKERS} "
            f"workers of it; means of steps {FIRST} to {LAST} of {AHEAD_STEPS}. The model of the pipeline knows the times of the phases on "
            "policy (`max_staleness` 0), and plays the schedule with them.",
            "",
            "| engine | max_staleness | step, s | by the model, s | waiting for rollouts | for rewards | training | largest staleness | when, load |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
            *rows,
        ]
    return "\n".join(lines) + "\n"


def draw(runs: dict[tuple[str, int], dict[str, Any]]) -> None:
    """The curves as a small svg: each the mean of five steps."""
    width, height, left, below = 480, 220, 36, 26
    colours = {"in_process": "#888888", "vllm": "#33aa66"}
    longest = max(len(found["rewards"]) for found in runs.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = (height - below) * (1 - tick) + 4
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end" fill="#777">{tick:g}</text>')
        parts.append(f'<line x1="{left}" x2="{width}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
    for (engine, _), found in runs.items():
        values = found["rewards"]
        smooth = [statistics.mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
        points = " ".join(
            f"{left + (width - left - 4) * i / max(longest - 1, 1):.1f},{(height - below) * (1 - value) + 4:.1f}"
            for i, value in enumerate(smooth)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[engine]}" stroke-width="1.5"/>')
    parts.append(f'<text x="{left}" y="{height - 6}" fill="#777">step 1 to {longest}, mean reward of five steps</text>')
    for i, (engine, colour) in enumerate(colours.items()):
        parts.append(
            f'<text x="{width - 4}" y="{height - 46 - 14 * i}" text-anchor="end" fill="{colour}">{engine}</text>'
        )
    (RESULTS / "rollouts.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


def measure(engine: str, rollout: dict[str, Any], parts: tuple[str, ...], options: argparse.Namespace) -> None:
    anew = options.only is not None
    for seed in map(int, options.seeds.split(",")) if "curves" in parts else ():
        kept(f"{engine}-{seed}", partial(curve, seed, engine, rollout, options.steps), anew)
    if "speed" in parts:
        kept(f"speed-{engine}", partial(speed, engine, rollout), anew)
    for staleness in (0, 1, 4) if "ahead" in parts else ():
        kept(f"ahead-{engine}-{staleness}", partial(ahead, engine, rollout, staleness), anew)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--vllm-python", help="an interpreter that has vLLM (default: the environment of make test-vllm)"
    )
    parser.add_argument("--only", choices=PARTS, help="one part, measured anew")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--report", action="store_true", help="only write the report of what is in build/rollouts")
    options = parser.parse_args()
    parts = (options.only,) if options.only else PARTS
    engines = options.engines.split(",")
    BUILD.mkdir(parents=True, exist_ok=True)
    if not options.report:
        if "in_process" in engines:
            measure("in_process", {}, parts, options)
        if "vllm" in engines:
            with vllm(options.vllm_python, demo.make_model(BUILD / "architecture", 0)) as rollout:
                measure("vllm", rollout, parts, options)
    text = report([int(seed) for seed in options.seeds.split(",")])
    file = RESULTS / "rollouts.md"
    by_hand = file.read_text().partition(BY_HAND)
    file.write_text(text + "".join(("\n", *by_hand[1:]) if by_hand[1] else ()))
    print(text)


if __name__ == "__main__":
    main()
