"""`nemo-rl eval`: a model's answers to the prompts of a data set, scored by a reward."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_rl.api.evaluation import Evaluation, data_source, evaluate, reward_of
from nemo_rl.api.models import find_model
from nemo_rl.cli.jobs import print_json
from nemo_rl.extras import require
from nemo_rl.job.text import dotted

SAY_EVERY = 5.0
"""Seconds between two lines about the progress."""
_WIDTH = 240


def eval_model(reference: str, data: str, reward: str, *, namespace: str | None, as_json: bool, **options: Any) -> int:
    """Prints the evaluation; returns the exit code. Raises as `nemo_rl.api.evaluation.evaluate`."""
    require("nemo-rl eval", "torch")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # a reward may be a module of the current folder, as with `python script.py`
    reward_fn, source = reward_of(reward), data_source(data)
    model = find_model(reference, namespace=namespace)
    print("nemo-rl: loading the model", file=sys.stderr, flush=True)
    found = evaluate(model, source, reward_fn, progress=_progress(), **options)
    if as_json:
        print_json({"model": reference, "data": data, "reward": reward, **found.as_dict()})
    else:
        print("\n".join(_lines(found)))
    return 0


def _progress() -> Callable[[int, int], None]:
    said = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SAY_EVERY:
            said = time.monotonic()
            print(f"nemo-rl: {done:,} of {total:,} prompts are answered", file=sys.stderr, flush=True)

    return tell


def _lines(found: Evaluation) -> list[str]:
    answers = found.prompts * found.samples
    mean = "none: no answer could be scored" if found.mean is None else f"{found.mean:.4g}"
    if found.deviation is not None:
        mean += f" (standard deviation {found.deviation:.4g} over {answers:,} answers)"
    rows = [("rows", found.rows), ("mean reward", mean)]
    rows += [(f"pass@{k}", f"{100 * share:.1f} % reach {found.threshold:g}") for k, share in found.pass_at.items()]
    rows += [(name, f"{value:.4g}") for name, value in found.parts.items()]
    cut = f", {100 * found.truncated_fraction:.1f} % cut off at max_new_tokens" if found.truncated_fraction else ""
    rows.append(("length", f"{found.completion_length:.1f} tokens on average{cut}"))
    if found.errors:
        rows.append(("failed rewards", str(found.errors)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    for example in found.examples:
        reward = "none" if example["reward"] is None else f"{example['reward']:.4g}"
        lines += [
            "",
            f"prompt: {_excerpt(example['prompt'])}",
            f"answer (reward {reward}): {_excerpt(example['completion'])}",
        ]
    return lines


def _excerpt(text: str) -> str:
    """A text on one line, not too long."""
    shown = dotted(" ".join(text.split()))
    return shown if len(shown) <= _WIDTH else f"{shown[: _WIDTH - 1]}…"
