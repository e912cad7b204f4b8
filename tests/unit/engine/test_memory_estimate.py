"""The estimate of memory against what a real step holds, and what is chosen and refused by it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from nemo_rl.api.keywords import build_spec
from nemo_rl.data.prepare import PairExample, PromptExample, TextExample
from nemo_rl.data.rows import PromptRow
from nemo_rl.environments.runner import RewardOutcome
from nemo_rl.model.activations import LiveBytes
from nemo_rl.model.memory import GIB, DoesNotFit, Planner, Where
from nemo_rl.model.sharding import local
from nemo_rl.rollout.protocol import Completion
from nemo_rl.trainers.dpo import DPOTrainer
from nemo_rl.trainers.grpo import GRPOTrainer, Rollouts
from nemo_rl.trainers.sft import SFTTrainer
from unit.engine.stepping import ready
from unit.engine.tiny import random_ids

SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
QWEN = Qwen2Config(**SMALL)
GPT2 = GPT2Config(vocab_size=400, n_embd=64, n_layer=4, n_head=4, eos_token_id=1)
LENGTH, NEW, GROUP = 96, 72, 4
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "full": ("sft", QWEN, {}),
    "full, checkpointing": ("sft", QWEN, {"activation_checkpointing": True}),
    "LoRA": ("sft", QWEN, {"lora_rank": 4}),
    "LoRA, checkpointing": ("sft", QWEN, {"lora_rank": 4, "activation_checkpointing": True}),
    "DPO with reference": ("dpo", QWEN, {}),
    "GRPO with KL": ("grpo", QWEN, {"beta": 0.1, "num_generations_per_prompt": GROUP, "max_new_tokens": NEW}),
    "another family": ("sft", GPT2, {}),
}


def held_in(step: Callable[[], None], standing: list[torch.Tensor]) -> int:
    """The peak of tensor bytes in a step, with those that stand before it."""
    with LiveBytes(standing) as live:
        step()
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in standing}
    return sum(storages.values()) + live.peak


def measured(
    algorithm: str,
    config: Any,
    keywords: dict[str, Any],
    budget: int,
    held: Callable[[Callable[[], None], list[torch.Tensor]], int] = held_in,
) -> int:
    """The peak of tensor bytes in a real step of several micro-batches, weights and optimizer included; of this rank."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    kinds = {"sft": SFTTrainer, "dpo": DPOTrainer, "grpo": GRPOTrainer}
    trainer = ready(kinds[algorithm], model, tokens_per_microbatch=budget, max_sequence_length=LENGTH, **keywords)
    ranks = trainer.ranks.size
    standing = list(trainer.model.parameters())
    if algorithm == "sft":
        examples = [TextExample(random_ids(LENGTH, i), [True] * LENGTH) for i in range(8 * ranks)]

        def step(part: int = len(examples)) -> None:
            trainer.train_step(examples[:part], 1)
    elif algorithm == "dpo":
        cut = LENGTH // 4
        pairs = [
            PairExample(random_ids(cut, i), random_ids(LENGTH - cut, 50 + i), random_ids(LENGTH - cut, 90 + i), i)
            for i in range(6 * ranks)
        ]
        trainer.reference = trainer._reference(trainer.policy, pairs)

        def step(part: int = len(pairs)) -> None:
            trainer.train_step(pairs[:part], 1)
    else:
        prompts = [PromptExample(i, random_ids(LENGTH - NEW, i), PromptRow("")) for i in range(4 * ranks)]
        completions = [
            Completion(random_ids(NEW, 100 + i), [-1.0] * NEW, finished=True) for i in range(len(prompts) * GROUP)
        ]
        outcomes = [RewardOutcome(0.0) for _ in completions]
        trainer.reference = trainer.initial_policy()
        standing += list(trainer.reference.model.parameters())
        advantages = torch.linspace(-1, 1, len(completions))

        def step(part: int = len(prompts)) -> None:
            several = part * GROUP
            texts = ["" for _ in completions[:several]]
            rollouts = Rollouts(prompts[:part], completions[:several], texts, outcomes[:several], {})
            trainer.train_on(rollouts, advantages[:several], torch.ones(several, dtype=torch.bool))

    step(1)  # the optimizer's state comes to life in the first step
    states = [value for state in trainer.optimizer.adamw.state.values() for value in state.values()]
    standing += [value for value in states if isinstance(value, torch.Tensor)]
    return held(step, [local(tensor) for tensor in standing])


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_a_step_holds(case: str) -> None:
    algorithm, config, keywords = CASES[case]
    budget = 4 * LENGTH
    spec = build_spec("model", algorithm=algorithm, gpus=0, max_sequence_length=LENGTH, **keywords)
    recompute = bool(keywords.get("activation_checkpointing"))
    planner = Planner(config, spec)
    found = planner.estimate(Where(device="cpu"), budget, recompute)
    assert not planner.by_formula
    truth = measured(algorithm, config, keywords, budget)
    assert sum(found.phases["training"].values()) == pytest.approx(truth, rel=0.1)


def test_few_layers_tell_of_many() -> None:
    config = Qwen2Config(**{**SMALL, "num_hidden_layers": 9})
    planner = Planner(config, build_spec("model", algorithm="sft", max_sequence_length=64))
    assert planner._period == 1
    for recompute in (False, True):
        short = planner.activations(Where(), 128, recompute)
        planner._growth.clear()
        planner.__dict__["_period"] = None
        assert short[1] == pytest.approx(planner.activations(Where(), 128, recompute)[1], rel=0.01)
        planner._growth.clear()
        del planner.__dict__["_period"]


def test_ranks_share_what_is_sharded() -> None:
    planner = Planner(QWEN, build_spec("model", algorithm="sft", max_sequence_length=64))
    one, four = (planner.estimate(Where(ranks), 128, False) for ranks in (1, 4))
    for part in ("weights", "optimizer"):
        assert four.phases["optimizer"][part] == one.phases["optimizer"][part] // 4
    assert one.facts.parameters == AutoModelForCausalLM.from_config(QWEN).num_parameters()


def test_memory_decides_micro_batches_and_checkpointing() -> None:
    """With less memory first smaller micro-batches, then checkpointing; what is given stays; what cannot fit is refused."""
    spec = build_spec("model", algorithm="sft", max_sequence_length=512)
    config = Qwen2Config(**{**SMALL, "num_hidden_layers": 24})
    planner = Planner(config, spec)
    ample = planner.choose(Where(1, 80 * GIB))
    assert (ample.tokens_per_microbatch, ample.activation_checkpointing) == (16384, False)
    assert ample.chosen == ("tokens_per_microbatch", "activation_checkpointing")
    sizes = [planner.estimate(Where(), budget, False).peak for budget in (8192, 4096)]
    sizes.append(planner.estimate(Where(), 4096, True).peak)
    chosen = []
    for size in sizes:
        found = planner.choose(Where(1, int((size + 0.75 * GIB) / 0.92) + 2**20))
        assert found.fits
        chosen.append((found.tokens_per_microbatch, found.activation_checkpointing))
    assert chosen[:2] == [(8192, False), (4096, False)]
    assert chosen[2][1]
    with pytest.raises(
        DoesNotFit, match=r"found 1 × 1 GiB, but this run needs about .* GiB on each rank.*; .* would fit"
    ):
        Planner(
            config,
            spec.model_copy(update={"training": spec.training.model_copy(update={"max_sequence_length": 65536})}),
        ).choose(Where(1, GIB))


def test_the_cpu_keeps_its_defaults() -> None:
    found = Planner(QWEN, build_spec("model", algorithm="sft", gpus=0)).choose(Where(device="cpu"))
    assert (found.tokens_per_microbatch, found.activation_checkpointing) == (4096, False)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, gib: float, **keywords: Any) -> SFTTrainer:
    """A trainer that believes to have such a GPU, as far as memory is planned."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(gib * GIB))
    )
    trainer: Any = SFTTrainer.from_pretrained(AutoModelForCausalLM.from_config(QWEN), gpus=0, **keywords)
    trainer.device = torch.device("cuda", 0)
    return trainer


def test_a_trainer_on_a_gpu_plans_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = on_a_gpu(monkeypatch, 80, max_sequence_length=512)
    trainer._plan_memory()
    assert (trainer.planned_tokens, trainer.recompute) == (16384, False)
    assert "activation checkpointing off (chosen)" in trainer.memory.sentence()
    given = on_a_gpu(monkeypatch, 80, max_sequence_length=512, tokens_per_microbatch=777, activation_checkpointing=True)
    given._plan_memory()
    assert (given.planned_tokens, given.recompute, given.memory.chosen) == (777, True, ())
    with pytest.raises(DoesNotFit, match="would fit"):
        on_a_gpu(monkeypatch, 1, max_sequence_length=2**17)._plan_memory()


def test_what_cannot_be_estimated_trains_as_before(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    trainer = on_a_gpu(monkeypatch, 80)
    monkeypatch.setattr("nemo_rl.model.memory.meta_model", lambda *_: 1 / 0)
    trainer._plan_memory()
    assert (trainer.planned_tokens, trainer.recompute, trainer.memory) == (None, False, None)
    assert "cannot be estimated (ZeroDivisionError" in caplog.text


def test_the_cpu_plans_nothing() -> None:
    trainer = SFTTrainer.from_pretrained(AutoModelForCausalLM.from_config(QWEN), gpus=0)
    trainer._plan_memory()
    assert (trainer.planned_tokens, trainer.recompute, trainer.memory) == (None, False, None)


def test_the_page_has_every_example_and_seven_billion_parameters_fit_one_node() -> None:
    from generated import ROOT, load

    module = load(ROOT / "docs/what_fits.py")
    page = (ROOT / "docs/what_fits.md").read_text(encoding="utf-8")
    assert "estimated, not measured on a GPU" in page
    rows = {name: next(line for line in page.splitlines() if f"| {name} |" in line) for name, *_ in module.EXAMPLES}
    name, model, algorithm, settings = next(example for example in module.EXAMPLES if example[0].startswith("6 ·"))
    spec = build_spec(model, algorithm=algorithm, **settings)
    assert spec.training.max_sequence_length == 4096
    found = Planner(Qwen2Config(**module.MODELS[model]), spec).choose(Where(8, 80 * GIB))
    assert found.fits
    cell = rows[name].split("|")[3 + module.CARDS.index((8, 80))]
    assert f"{found.peak / GIB:.0f} GiB ({found.tokens_per_microbatch:,} tokens" in cell, (
        "run python tests/generated.py"
    )
