"""The same batches through TRL's own trainers: equal losses, gradients, and, after AdamW, equal parameters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_rl.model.policy import Policy
from nemo_rl.rollout.protocol import Completion
from nemo_rl.trainers.dpo import DPOTrainer
from nemo_rl.trainers.grpo import Rollouts
from nemo_rl.trainers.sft import SFTTrainer
from unit.engine import tiny
from unit.engine.stepping import (
    SAMPLES,
    frozen_rollouts,
    gradients_of,
    grpo,
    pair_examples,
    ready,
    some_advantages,
    text_examples,
    update_an_older_policy,
)
from unit.engine.tiny import gradient, plain_logprobs, relative

pytestmark = pytest.mark.slow

LOSS, GRADIENT = 1e-5, 1e-4

FAMILY = "qwen2"


@pytest.fixture(scope="module")
def trl() -> Any:
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl
        import trl.trainer.dpo_trainer
        import trl.trainer.grpo_trainer
        import trl.trainer.sft_trainer
    return trl


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One word for each token; both sides get token ids, so it only has to exist."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": tiny.END} | {f"w{i}": i for i in range(2, tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "dataloader_pin_memory": False,
}


def padded(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(pads, rows, strict=True))
    ids = [pad + row if left else row + pad for pad, row in pairs]
    mask = [[0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad) for pad, row in pairs]
    return torch.tensor(ids), torch.tensor(mask)


# ------------------------------------------------------------------ GRPO


def trl_grpo(
    trl: Any,
    tokenizer: Any,
    folder: Path,
    rollouts: Rollouts,
    advantages: Tensor,
    reference: nn.Module | None,
    with_old: bool,
    importance: Tensor | None = None,
    **options: Any,
) -> tuple[float, Tensor]:
    from datasets import Dataset

    config = trl.GRPOConfig(
        str(folder),
        per_device_train_batch_size=len(rollouts.completions),
        num_generations=SAMPLES,
        max_completion_length=16,
        use_bias_correction_kl=True,
        **options,
        **PLAIN,
    )
    model = tiny.make_model(FAMILY)
    if reference is not None:  # TRL loads one from where the model came from; the inputs below are used in its place
        model.save_pretrained(folder / "model")
        model.config._name_or_path = str(folder / "model")
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["w2 w3"] * 4}),
        processing_class=tokenizer,
    )
    prompts = [rollouts.prompts[i // SAMPLES].ids for i in range(len(rollouts.completions))]
    completions = [completion.ids for completion in rollouts.completions]
    inputs = dict(zip(("prompt_ids", "prompt_mask"), padded(prompts, left=True), strict=True))
    inputs |= dict(zip(("completion_ids", "completion_mask"), padded(completions), strict=True))
    inputs["advantages"] = advantages
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    if with_old:
        inputs["old_per_token_logps"] = _padded_values([c.logprobs for c in rollouts.completions])
    if importance is not None:
        trainer.use_vllm, inputs["importance_sampling_ratio"] = True, importance
    if reference is not None:
        with torch.no_grad():
            known = [
                plain_logprobs(reference, p + c, options.get("temperature", 1.0))[len(p) - 1 :].tolist()
                for p, c in zip(prompts, completions, strict=True)
            ]
        inputs["ref_per_token_logps"] = _padded_values(known)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), gradient(trainer.model)


def _padded_values(rows: list[list[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


GRPO_VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"loss_type": "dapo"}, {}),
    ({"loss_type": "grpo"}, {}),
    ({"loss_type": "dr_grpo"}, {}),
    ({"loss_type": "dapo", "temperature": 0.7}, {}),
    ({"loss_type": "dapo", "num_iterations": 2}, {}),
    (
        {"loss_type": "grpo", "num_iterations": 2, "clip_low": 0.1, "clip_high": 0.28},
        {"epsilon": 0.1, "epsilon_high": 0.28},
    ),
    # a bound of the ratio above 1 + epsilon acts on negative advantages only: dual clip
    ({"loss_type": "dapo", "num_iterations": 2, "dual_clip": 1.4}, {"delta": 1.4}),
    ({"loss_type": "dapo", "beta": 0.2}, {}),
    ({"loss_type": "dr_grpo", "beta": 0.2, "num_iterations": 2, "temperature": 1.2}, {}),
    ({"loss_type": "grpo", "beta": 0.05, "num_iterations": 2}, {}),
    # TRL's GSPO is its grpo with ratios of sequences
    (
        {"loss_type": "gspo", "num_iterations": 2, "clip_low": 0.03, "clip_high": 0.04},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    # TRL's bound is that of the ratio itself, and there is none below
    ({"loss_type": "cispo", "num_iterations": 2, "clip_low": 1.0, "clip_high": 0.28}, {"epsilon_high": 1.28}),
]


@pytest.mark.parametrize(
    ("ours", "theirs"), GRPO_VARIANTS, ids=[" ".join(map(str, v[0].values())) for v in GRPO_VARIANTS]
)
def test_grpo_loss_and_gradient(trl, tokenizer, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]):
    model = tiny.make_model(FAMILY)
    temperature = ours.get("temperature", 1.0)
    rollouts = frozen_rollouts(model, temperature=temperature)
    advantages = some_advantages(rollouts)
    reference = tiny.neighbour_of(FAMILY) if ours.get("beta") else None
    with_old = ours.get("num_iterations", 1) > 1
    shared = {name: ours[name] for name in ("loss_type", "temperature", "beta", "num_iterations") if name in ours}
    expected_loss, expected = trl_grpo(
        trl, tokenizer, tmp_path, rollouts, advantages, reference, with_old, **{"beta": 0.0, **shared, **theirs}
    )
    trainer = grpo(model, tokens_per_microbatch=70, **ours)
    trainer.reference = Policy(reference, "fp32") if reference is not None else None
    update_an_older_policy(trainer, rollouts)
    gradients = gradients_of(trainer)
    metrics = trainer.train_on(rollouts, advantages, torch.ones(len(advantages), dtype=torch.bool))
    assert abs(metrics["loss"] - expected_loss) <= LOSS
    assert relative(gradients[0], expected) <= GRADIENT


@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_correction(trl, tokenizer, tmp_path: Path, kind: str):
    """The factor by TRL's lines for samples of vLLM (grpo_trainer.py, `_generate_and_score_completions`), padded; TRL applies it."""
    model = tiny.make_model(FAMILY)
    rollouts = frozen_rollouts(model, drift=0.5)
    advantages = some_advantages(rollouts)
    rows = []
    with torch.no_grad():
        for i, completion in enumerate(rollouts.completions):
            prompt = rollouts.prompts[i // SAMPLES].ids
            rows.append(plain_logprobs(model, prompt + completion.ids)[len(prompt) - 1 :].tolist())
    difference = _padded_values(rows) - _padded_values([c.logprobs for c in rollouts.completions])
    if kind.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    factor = ratio.clamp(0.8, 1.3) if kind.endswith("truncate") else ratio.masked_fill((ratio < 0.8) | (ratio > 1.3), 0)
    assert (factor != ratio).any()
    options = {"beta": 0.0, "loss_type": "dapo"}
    expected_loss, expected = trl_grpo(
        trl, tokenizer, tmp_path, rollouts, advantages, None, False, importance=factor, **options
    )
    trainer = grpo(model, importance_correction=kind, importance_min=0.8, importance_max=1.3, tokens_per_microbatch=70)
    gradients = gradients_of(trainer)
    metrics = trainer.train_on(rollouts, advantages, torch.ones(len(advantages), dtype=torch.bool))
    assert abs(metrics["loss"] - expected_loss) <= LOSS
    assert relative(gradients[0], expected) <= GRADIENT
    assert 0 < metrics["importance_bounded_fraction"] < 1


def test_masking_truncated_completions(trl, tokenizer, tmp_path: Path):
    """TRL masks all tokens of a truncated completion, and its batch normaliser counts those that are left."""
    model = tiny.make_model(FAMILY)
    rollouts = frozen_rollouts(model)
    advantages = some_advantages(rollouts)
    kept = [i for i, completion in enumerate(rollouts.completions) if completion.finished]
    trainer = grpo(model, mask_truncated_completions=True)
    gradients = gradients_of(trainer)
    metrics = trainer.train_on(rollouts, advantages, torch.ones(len(advantages), dtype=torch.bool))
    # the same batch without these rows, each prompt with itself as group
    rows = Rollouts(
        [rollouts.prompts[i // SAMPLES] for i in kept],
        [rollouts.completions[i] for i in kept for _ in range(SAMPLES)],
        [],
        [],
        {},
    )
    expected_loss, expected = trl_grpo(
        trl,
        tokenizer,
        tmp_path,
        rows,
        advantages[kept].repeat_interleave(SAMPLES),
        None,
        False,
        beta=0.0,
        loss_type="dapo",
    )
    assert abs(metrics["loss"] - expected_loss) <= LOSS
    assert relative(gradients[0], expected) <= GRADIENT


# ------------------------------------------------------------------ DPO

EPSILON = 0.2

DPO_VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"preference_loss": "sigmoid"}, {"loss_type": ["sigmoid"]}),
    ({"preference_loss": "ipo", "beta": 0.3}, {"loss_type": ["ipo"], "beta": 0.3}),
    ({"preference_loss": "hinge"}, {"loss_type": ["hinge"]}),
    ({"nll_weight": 0.6}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.6]}),
    # TRL has no cDPO. Its robust loss is ((1 - e) l(z) - e l(-z)) / (1 - 2 e) with l = -log sigma, so that
    # (1 - e) l(z) + e l(-z) = 2 (1 - e) sigmoid - (1 - 2 e) robust
    (
        {"label_smoothing": EPSILON},
        {
            "loss_type": ["sigmoid", "robust"],
            "loss_weights": [2 * (1 - EPSILON), -(1 - 2 * EPSILON)],
            "label_smoothing": EPSILON,
        },
    ),
]


@pytest.mark.parametrize(
    ("ours", "theirs"), DPO_VARIANTS, ids=["sigmoid", "ipo", "hinge", "sigmoid and nll", "label smoothing"]
)
def test_dpo_loss_and_gradient(trl, tokenizer, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]):
    from datasets import Dataset

    examples = pair_examples()
    their_trainer = trl.DPOTrainer(
        model=tiny.make_model(FAMILY),
        ref_model=tiny.neighbour_of(FAMILY),
        args=trl.DPOConfig(str(tmp_path), max_length=None, **theirs, **PLAIN),
        train_dataset=Dataset.from_dict({"prompt": ["w2"], "chosen": ["w3"], "rejected": ["w4"]}),
        processing_class=tokenizer,
    )
    collate = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    rows = [{"prompt_ids": e.prompt_ids, "chosen_ids": e.chosen_ids, "rejected_ids": e.rejected_ids} for e in examples]
    their_trainer.model.train()
    loss = their_trainer._compute_loss(their_trainer.model, collate(rows), return_outputs=False)
    loss.backward()
    expected = gradient(their_trainer.model)
    trainer = ready(DPOTrainer, tiny.make_model(FAMILY), tokens_per_microbatch=40, **ours)
    trainer.reference = trainer._reference(Policy(tiny.neighbour_of(FAMILY), "fp32"), examples)
    gradients = gradients_of(trainer)
    metrics = trainer.train_step(examples, 1)
    assert abs(metrics["loss"] - loss.item()) <= LOSS
    assert relative(gradients[0], expected) <= GRADIENT


# ------------------------------------------------------------------ SFT


def their_sft(trl: Any, tokenizer: Any, folder: Path, steps: int) -> tuple[list[float], Tensor, nn.Module]:
    """Returns the loss of each step, the gradient of the first, and the trained model. Every step sees all examples."""
    from datasets import Dataset

    losses: list[float] = []
    gradients: list[Tensor] = []

    class Recording(trl.SFTTrainer):
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, *args, **kwargs)
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            return loss

    examples = text_examples()
    rows = [
        {"input_ids": e.ids, "labels": [t if m else -100 for t, m in zip(e.ids, e.mask, strict=True)]} for e in examples
    ]
    config = trl.SFTConfig(
        str(folder),
        per_device_train_batch_size=len(examples),
        num_train_epochs=steps,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        **PLAIN,
    )
    trainer = Recording(
        model=tiny.make_model(FAMILY), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    return losses, gradients[0], trainer.model


def test_sft_losses_gradient_and_parameters_after_five_adamw_steps(trl, tokenizer, tmp_path: Path):
    losses, expected, trained = their_sft(trl, tokenizer, tmp_path, 5)
    assert len(losses) == 5
    model = tiny.make_model(FAMILY)
    trainer = ready(SFTTrainer, model, rate=3e-4, weight_decay=0.0, tokens_per_microbatch=30)
    gradients = gradients_of(trainer)
    found = [trainer.train_step(text_examples(), step)["loss"] for step in range(1, 6)]
    assert found == pytest.approx(losses, abs=LOSS)
    assert relative(gradients[0], expected) <= GRADIENT
    moved = max(
        (a - b).abs().max().item()
        for a, b in zip(model.parameters(), tiny.make_model(FAMILY).parameters(), strict=True)
    )
    assert moved > 1e-3
    for (name, ours), theirs in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert (ours - theirs).abs().max().item() <= 1e-6, name


def test_completions_carry_what_trl_needs():
    """The frozen completions of these tests: several lengths, truncated ones, and ratios on both sides of the clip."""
    rollouts = frozen_rollouts(tiny.make_model(FAMILY))
    assert all(isinstance(completion, Completion) for completion in rollouts.completions)
    assert len({len(completion.ids) for completion in rollouts.completions}) >= 4
