"""Evaluating a model by a reward: mean, pass@k and samples, with prompts written as in training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_rl.extras import explained
from nemo_rl.job.spec import DatasetSpec, RewardSpec

SHOWN_SAMPLES = 3


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    `mean` and `deviation` are of all rewards that counted; None where there is none. `pass_at` maps k to the chance that the best
    of k answers reaches the threshold, averaged over prompts. `parts` are the means of a reward's named parts.
    """

    prompts: int
    samples: int
    mean: float | None
    deviation: float | None
    pass_at: dict[int, float]
    threshold: float
    parts: dict[str, float]
    errors: int
    truncated_fraction: float
    completion_length: float
    rows: str
    examples: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that at least one of k answers, drawn of `samples` without replacement, is among the `right` ones.

    Chen et al. 2021 (arXiv 2107.03374), equation 1: unbiased, unlike 1 - (1 - right / samples) ** k.
    """
    if samples - right < k:
        return 1.0
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def evaluate(
    model: str,
    dataset: Any,
    reward_fn: Any,
    *,
    samples: int = 1,
    k: Sequence[int] = (),
    threshold: float = 1.0,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    shown: int = SHOWN_SAMPLES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Scores the answers of a model (a folder or hub name) to the prompts of a data set.

    With one sample the likeliest token is taken each time, as validation in training does; with several they are drawn, at the
    temperature of training unless another one is given. `k`: of pass@k, each at most `samples`; default 1, and `samples`.
    `progress` is told how many prompts are answered. Raises DatasetError, RewardError, TypeError and ValueError as `train` does.
    """
    with explained("nemo-rl eval"):
        from nemo_rl.data.prepare import prepare
        from nemo_rl.environments.runner import RewardCall, RewardRunner
        from nemo_rl.environments.signature import bind_rewards
        from nemo_rl.rollout.text import TextGenerator
    if samples < 1:
        raise ValueError(f"found samples={samples}; expected at least 1")
    wanted = sorted({1, samples} if not k else set(k))
    if wanted[0] < 1 or wanted[-1] > samples:
        raise ValueError(
            f"found k={','.join(map(str, wanted))} with {samples} samples; expected each from 1 to {samples}"
        )
    asked = TextGenerator(model, trust_remote_code=trust_remote_code)
    if temperature is None and samples == 1:
        temperature = 0.0
    sampling = asked.sampling(samples, temperature=temperature, max_new_tokens=max_new_tokens)
    settings = asked.defaults.model_copy(update={"max_new_tokens": sampling.max_new_tokens})
    source = dataset
    if isinstance(source, DatasetSpec) and max_rows is not None:
        source = source.model_copy(update={"max_rows": max_rows})
    prepared = prepare("grpo", source, asked.tokenizer, asked.training, settings, needed=max_rows)
    examples = list(prepared.examples)[:max_rows]
    rewards = bind_rewards(reward_fn, None, set(examples[0].row.columns))
    ids = [example.ids for example in examples]
    futures: list[Any] = [None] * len(examples)
    texts: list[list[str]] = [[] for _ in examples]
    done = 0
    with RewardRunner(rewards, timeout_seconds=60.0, on_error="raise") as runner:

        def score(i: int, completions: list[Any]) -> None:
            nonlocal done
            found = asked.decoded(ids[i], [completion.ids for completion in completions])
            row, texts[i] = examples[i].row, found.texts
            futures[i] = runner.submit(
                [
                    RewardCall(row.prompt, text, row.messages, row.columns, (seed, 0, i, sample), raw)
                    for sample, (text, raw) in enumerate(zip(found.texts, found.raw, strict=True))
                ]
            )
            done += 1
            progress(done, len(examples))

        groups = asked.generate(ids, sampling, seed=seed, on_group=score)
        outcomes = [runner.wait(future) for future in futures]
    return _summary(examples, groups, texts, outcomes, wanted, threshold, samples, shown, str(prepared.report))


def _summary(
    examples: list[Any],
    groups: list[list[Any]],
    texts: list[list[str]],
    outcomes: list[list[Any]],
    wanted: list[int],
    threshold: float,
    samples: int,
    shown: int,
    rows: str,
) -> Evaluation:
    every = [outcome for group in outcomes for outcome in group]
    values = [outcome.value for outcome in every if outcome.value is not None]
    mean = sum(values) / len(values) if values else None
    spread = statistics.stdev(values) if len(values) > 1 else None
    right = [sum(o.value is not None and o.value >= threshold for o in group) for group in outcomes]
    completions = [completion for group in groups for completion in group]
    names = sorted({name for outcome in every for name in outcome.parts})
    parts = {name: [o.parts[name] for o in every if name in o.parts] for name in names}
    return Evaluation(
        prompts=len(examples),
        samples=samples,
        mean=mean,
        deviation=spread,
        pass_at={k: sum(pass_at(k, samples, n) for n in right) / len(right) for k in wanted},
        threshold=threshold,
        parts={name: sum(found) / len(found) for name, found in parts.items()},
        errors=sum(outcome.error is not None for outcome in every),
        truncated_fraction=sum(not c.finished for c in completions) / len(completions),
        completion_length=sum(len(c.ids) for c in completions) / len(completions),
        rows=rows,
        examples=[
            {"prompt": examples[i].row.prompt, "completion": texts[i][0], "reward": outcomes[i][0].value}
            for i in range(min(shown, len(examples)))
        ],
    )


def data_source(reference: str) -> DatasetSpec:
    """A data set as a command is given it: a file, an address, or a name on the hub, with "@split" behind it for another split."""
    from nemo_rl.api.keywords import dataset_values

    name, at, split = reference.rpartition("@")
    values = dataset_values(name if at and "/" not in split else reference)
    if at and "/" not in split:
        if "name" not in values:
            raise ValueError(f"found {reference!r}; a split is for data sets of the hub, and {name!r} is a file")
        values["split"] = split
    return DatasetSpec.model_validate(values)


def reward_of(reference: str) -> Any:
    """The reward that a command is given: package.module:name, file.py:name, or the name of a built-in.

    Raises ValueError for what is none of these, RewardError with the traceback for code that fails while it is loaded.
    """
    from nemo_rl.environments.load import load_reward, load_source_file

    place, colon, name = reference.rpartition(":")
    if colon and place.endswith(".py"):
        path = Path(place).expanduser()
        if not path.is_file():
            raise ValueError(f"--reward {reference}: {place!r} is not a file here ({Path.cwd()})")
        return load_source_file(path, name)
    if not colon and reference.endswith(".py"):
        raise ValueError(f"--reward {reference}: found no name in it; expected {reference}:FUNCTION")
    values = {"function": reference} if colon else {"builtin": reference}
    try:
        spec = RewardSpec.model_validate(values)
    except ValueError:
        raise ValueError(
            f"--reward {reference}: expected package.module:function, file.py:function, or one of exact_match, math_answer, "
            "format, length"
        ) from None
    return load_reward(spec, {})
