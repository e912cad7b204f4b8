"""Single optimizer steps of the three trainers against plain loops over plain transformers, token by token."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_rl.job.spec import GRPOSpec
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.protocol import Completion
from nemo_rl.trainers.dpo import DPOTrainer
from nemo_rl.trainers.grpo import GRPOTrainer, Rollouts
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

EXACT = 2e-5
BUDGETS = [1, 25, 60, 10**9]
"""Tokens of a micro-batch: one sequence at a time, some, all."""


# ------------------------------------------------------------------ GRPO


def slow_grpo(
    model: nn.Module,
    reference: nn.Module | None,
    rollouts: Rollouts,
    advantages: Tensor,
    valid: Tensor,
    settings: GRPOSpec,
) -> tuple[float, Tensor]:
    """The objective as the papers write it, one token after the other."""
    terms: list[list[Tensor]] = []
    for i, completion in enumerate(rollouts.completions):
        counted = bool(valid[i]) and (completion.finished or not settings.mask_truncated_completions)
        if not counted:
            continue
        prompt = rollouts.prompts[i // SAMPLES].ids
        logprobs = plain_logprobs(model, prompt + completion.ids, settings.temperature)[len(prompt) - 1 :]
        if reference is not None:
            with torch.no_grad():
                known = plain_logprobs(reference, prompt + completion.ids, settings.temperature)[len(prompt) - 1 :]
        tokens = []
        several = settings.num_iterations > 1 or settings.mini_batch_size is not None
        olds = torch.tensor(completion.logprobs) if several else logprobs.detach()
        of_sequence = (logprobs - olds).mean().exp()
        for t, logprob in enumerate(logprobs):
            ratio = (logprob - olds[t]).exp()
            advantage = advantages[i].item()
            weighed = of_sequence if settings.loss_type == "gspo" else ratio
            clipped = weighed.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            surrogate = torch.min(weighed * advantage, clipped * advantage)
            if settings.loss_type == "cispo":
                surrogate = clipped.detach() * advantage * logprob
            if settings.dual_clip is not None and advantage < 0:
                surrogate = torch.max(surrogate, torch.tensor(settings.dual_clip * advantage))
            loss = -surrogate
            if settings.importance_correction == "token_truncate":
                drawn = math.exp(olds[t].item() - completion.logprobs[t])
                loss = loss * min(drawn, settings.importance_max)
            if settings.importance_correction == "sequence_mask":
                drawn = math.exp(olds.sum().item() - sum(completion.logprobs))
                loss = loss * (drawn if settings.importance_min <= drawn <= settings.importance_max else 0.0)
            if reference is not None:
                d = known[t] - logprob
                estimate = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[settings.kl_estimator]
                loss = loss + settings.beta * ratio * estimate
            tokens.append(loss)
        terms.append(tokens)
    if settings.loss_type in ("dapo", "cispo"):
        every = [token for tokens in terms for token in tokens]
        total = torch.stack(every).mean()
    elif settings.loss_type in ("grpo", "gspo"):
        total = torch.stack([torch.stack(tokens).mean() for tokens in terms]).mean()
    else:
        total = torch.stack([torch.stack(tokens).sum() for tokens in terms]).sum() / (
            len(terms) * settings.max_new_tokens
        )
    total.backward()
    return total.item(), gradient(model)


def step_grpo(
    trainer: GRPOTrainer, rollouts: Rollouts, advantages: Tensor, valid: Tensor
) -> tuple[dict[str, float], Tensor]:
    """The first update, of several from the policy whose log-probabilities the completions carry."""
    update_an_older_policy(trainer, rollouts)
    gradients = gradients_of(trainer)
    metrics = trainer.train_on(rollouts, advantages, valid)
    assert len(gradients) == trainer.settings.num_iterations
    return metrics, gradients[0]


VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "older policy": {"num_iterations": 2},
    "clip higher": {"num_iterations": 2, "clip_low": 0.1, "clip_high": 0.3, "loss_type": "grpo"},
    "dual clip": {"num_iterations": 2, "dual_clip": 1.3},
    "temperature": {"num_iterations": 2, "temperature": 0.7},
    "k1": {"beta": 0.2, "kl_estimator": "k1"},
    "k2": {"beta": 0.2, "kl_estimator": "k2", "loss_type": "dr_grpo"},
    "k3": {"beta": 0.2, "kl_estimator": "k3", "num_iterations": 2, "temperature": 1.3},
    "gspo": {"loss_type": "gspo", "num_iterations": 2, "clip_low": 0.03, "clip_high": 0.04},
    "gspo at the weights that sampled": {"loss_type": "gspo", "beta": 0.1},
    "cispo": {"loss_type": "cispo", "num_iterations": 2, "clip_low": 1.0, "clip_high": 0.28},
    "truncated importance": {"importance_correction": "token_truncate", "importance_max": 1.1},
    "masked importance": {
        **{"importance_correction": "sequence_mask", "importance_min": 0.5, "importance_max": 1.5},
        **{"loss_type": "grpo", "beta": 0.1},
    },
    "truncated": {"mask_truncated_completions": True},
    "truncated grpo": {"mask_truncated_completions": True, "loss_type": "grpo", "beta": 0.1},
}


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_grpo_step_is_the_objective_of_the_papers(family: str, variant: str):
    model, reference = tiny.make_model(family), tiny.neighbour_of(family)
    trainer = grpo(model, **VARIANTS[variant])
    settings = trainer.settings
    trainer.reference = Policy(reference, "fp32") if settings.beta else None
    rollouts = frozen_rollouts(model, temperature=settings.temperature)
    advantages = some_advantages(rollouts)
    valid = torch.ones(len(advantages), dtype=torch.bool)
    valid[2] = valid[9] = False
    expected_loss, expected = slow_grpo(
        model, reference if settings.beta else None, rollouts, advantages, valid, settings
    )
    metrics, found = step_grpo(trainer, rollouts, advantages, valid)
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert relative(found, expected) <= EXACT
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_all_updates_of_a_batch_compare_with_the_policy_before_the_first(budget: int):
    """Weights move, and the old log-probabilities are the trainer's own: those of the completions are far from them."""
    model = tiny.make_model("qwen2")
    trainer = grpo(
        model, num_iterations=3, temperature=0.7, clip_low=0.05, clip_high=0.1, weight_decay=0.0,
        tokens_per_microbatch=budget,
    )  # fmt: skip
    trainer.rate = 1e-3
    rollouts, temperature = frozen_rollouts(model, drift=3.0), trainer.settings.temperature
    advantages, valid = some_advantages(rollouts), torch.ones(12, dtype=torch.bool)
    valid[2] = False
    before_first = []
    with torch.no_grad():
        for i, completion in enumerate(rollouts.completions):
            prompt = rollouts.prompts[i // SAMPLES].ids
            logprobs = plain_logprobs(model, prompt + completion.ids, temperature)[len(prompt) - 1 :]
            before_first.append(Completion(completion.ids, logprobs.tolist(), completion.finished))
    gradients = gradients_of(trainer)
    models: list[nn.Module] = []
    step = trainer.optimizer.step

    def remember(rate: float) -> float:
        models.append(copy.deepcopy(model))
        return step(rate)

    trainer.optimizer.step = remember
    metrics = trainer.train_on(rollouts, advantages, valid)
    of_before = Rollouts(rollouts.prompts, before_first, rollouts.responses, rollouts.outcomes, {})
    losses = []
    for updated, found in zip(models, gradients, strict=True):
        updated.zero_grad()
        loss, expected = slow_grpo(updated, None, of_before, advantages, valid, trainer.settings)
        losses.append(loss)
        assert relative(found, expected) <= EXACT
    assert len(losses) == 3
    assert metrics["loss"] == pytest.approx(losses[-1], rel=1e-5, abs=1e-6)
    # the later updates are of another policy than the old one, and some tokens have left the interval
    assert losses[2] < losses[1] - 1e-3 < losses[0] - 2e-3
    assert metrics["clip_fraction"] > 0


def test_each_mini_batch_is_an_update_of_its_own_from_the_policy_before_the_first():
    model = tiny.make_model("qwen2")
    trainer = grpo(model, mini_batch_size=2, weight_decay=0.0, tokens_per_microbatch=40, loss_type="gspo")
    trainer.rate = 1e-3
    rollouts = frozen_rollouts(model, drift=0.1)  # three prompts: a mini-batch of two, and one of one
    advantages, valid = some_advantages(rollouts), torch.ones(12, dtype=torch.bool)
    update_an_older_policy(trainer, rollouts)
    gradients = gradients_of(trainer)
    models: list[nn.Module] = []
    step = trainer.optimizer.step

    def remember(rate: float) -> float:
        models.append(copy.deepcopy(model))
        return step(rate)

    trainer.optimizer.step = remember
    metrics = trainer.train_on(rollouts, advantages, valid)
    losses = []
    for (first, last), updated, found in zip([(0, 2), (2, 3)], models, gradients, strict=True):
        part = slice(first * SAMPLES, last * SAMPLES)
        of_part = Rollouts(rollouts.prompts[first:last], rollouts.completions[part], [], [], {})
        updated.zero_grad()
        loss, expected = slow_grpo(updated, None, of_part, advantages[part], valid[part], trainer.settings)
        losses.append(loss)
        assert relative(found, expected) <= EXACT
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_grpo_gradient_does_not_depend_on_microbatches(loss_type: str, budget: int):
    model = tiny.make_model("qwen2")
    rollouts, options = frozen_rollouts(model), {"loss_type": loss_type, "num_iterations": 2, "beta": 0.1}
    advantages, valid = some_advantages(rollouts), torch.ones(12, dtype=torch.bool)
    results = []
    for tokens in (budget, 90):
        trainer = grpo(model, tokens_per_microbatch=tokens, **options)
        trainer.reference = Policy(tiny.neighbour_of("qwen2"), "fp32")
        results.append(step_grpo(trainer, rollouts, advantages, valid))
    assert relative(results[0][1], results[1][1]) <= 1e-6
    for name in ("loss", "kl", "clip_fraction", "rollout_kl", "rollout_logprob_error"):
        assert results[0][0][name] == pytest.approx(results[1][0][name], rel=1e-5, abs=1e-7)


def test_completions_without_advantage_are_left_out_of_the_work_but_not_of_the_average():
    model = tiny.make_model("qwen2")
    trainer, rollouts = grpo(model), frozen_rollouts(model)
    advantages, valid = some_advantages(rollouts), torch.ones(12, dtype=torch.bool)
    advantages[:8] = 0.0
    _, expected = slow_grpo(model, None, rollouts, advantages, valid, trainer.settings)
    packed = []
    accumulate = trainer.accumulate
    trainer.accumulate = lambda sequences, *a, **k: (packed.append(len(sequences)), accumulate(sequences, *a, **k))[1]
    _, found = step_grpo(trainer, rollouts, advantages, valid)
    assert packed == [4]
    assert relative(found, expected) <= EXACT


def test_a_batch_without_any_advantage_changes_no_weight():
    model = tiny.make_model("qwen2")
    before = [p.clone() for p in model.parameters()]
    trainer, rollouts = grpo(model, weight_decay=0.5), frozen_rollouts(model)
    trainer.rate = 0.1
    metrics = trainer.train_on(rollouts, torch.zeros(12), torch.ones(12, dtype=torch.bool))
    # nothing was trained, so neither a divergence nor a clipped fraction was measured
    assert metrics == {"loss": 0.0, "grad_norm": 0.0}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_kl_metric_is_the_mean_estimate_per_token():
    model, reference = tiny.make_model("qwen2"), tiny.neighbour_of("qwen2")
    trainer, rollouts = grpo(model, beta=0.1), frozen_rollouts(model)
    trainer.reference = Policy(reference, "fp32")
    metrics = trainer.train_on(rollouts, some_advantages(rollouts), torch.ones(12, dtype=torch.bool))
    estimates: list[float] = []
    with torch.no_grad():
        for i, completion in enumerate(rollouts.completions):
            prompt = rollouts.prompts[i // SAMPLES].ids
            both = [plain_logprobs(m, prompt + completion.ids)[len(prompt) - 1 :] for m in (reference, model)]
            d = both[0] - both[1]
            estimates += (d.exp() - 1 - d).clamp(max=10).tolist()
    assert metrics["kl"] == pytest.approx(sum(estimates) / len(estimates), rel=1e-4)


def test_quantiles_of_importance_weights_are_those_of_all_trained_tokens():
    model = tiny.make_model("qwen2")
    trainer = grpo(model, importance_correction="token_truncate", tokens_per_microbatch=40, mini_batch_size=2)
    rollouts = frozen_rollouts(model, drift=0.3)
    advantages = some_advantages(rollouts)
    weights: list[float] = []
    with torch.no_grad():
        for i, completion in enumerate(rollouts.completions):
            if advantages[i] == 0:  # nothing of it is trained
                continue
            prompt = rollouts.prompts[i // SAMPLES].ids
            own = plain_logprobs(model, prompt + completion.ids)[len(prompt) - 1 :]
            weights += (own - torch.tensor(completion.logprobs)).exp().tolist()
    metrics = trainer.train_on(rollouts, advantages, torch.ones(12, dtype=torch.bool))
    found = [metrics[f"importance_weight_{name}"] for name in ("min", "p05", "median", "p95", "max")]
    expected = torch.tensor(weights).quantile(torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0]))
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert found[0] < 0.99 and found[-1] > 1.01


def test_with_adapters_the_reference_is_the_model_without_them():
    model = tiny.make_model("qwen2")
    trainer = grpo(model, beta=0.3, lora_rank=2)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    trainer.reference = None
    rollouts = frozen_rollouts(trainer.model)
    advantages, valid = some_advantages(rollouts), torch.ones(12, dtype=torch.bool)
    expected_loss, expected = slow_grpo(
        trainer.model, tiny.make_model("qwen2"), rollouts, advantages, valid, trainer.settings
    )
    gradients = gradients_of(trainer)
    metrics = trainer.train_on(rollouts, advantages, valid)
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    trained = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in trainer.model.parameters()])
    assert relative(gradients[0][trained], expected) <= EXACT
    assert not gradients[0][~trained].any()


def test_log_probabilities_of_own_rollouts_give_a_ratio_of_one():
    """The decoder's log-probabilities are those of the training pass: as old ones they clip nothing, the loss is -mean A."""
    from nemo_rl.rollout.in_process.engine import generate
    from nemo_rl.rollout.protocol import Sampling

    model = tiny.make_model("qwen2")
    trainer = grpo(model, num_iterations=2, temperature=0.8, clip_low=0.001, clip_high=0.001)
    base = frozen_rollouts(model)
    groups = generate(
        trainer.policy,
        [p.ids for p in base.prompts],
        Sampling(SAMPLES, 16, 0.8),
        end_ids=[1, *range(5, 90, 12)],
        seed=1,
        step=1,
    )
    rollouts = Rollouts(base.prompts, [c for g in groups for c in g], base.responses, base.outcomes, {})
    advantages = some_advantages(rollouts)
    update_an_older_policy(trainer, rollouts)
    metrics = trainer.train_on(rollouts, advantages, torch.ones(12, dtype=torch.bool))
    lengths = torch.tensor([len(c.ids) for c in rollouts.completions])
    assert metrics["clip_fraction"] == 0.0
    assert metrics["loss"] == pytest.approx(-(advantages * lengths).sum().item() / lengths.sum().item(), abs=1e-5)


# ------------------------------------------------------------------ SFT


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sft_step_is_the_mean_over_all_trained_tokens_of_the_batch(family: str, budget: int):
    model, examples = tiny.make_model(family), text_examples()
    losses = [
        -plain_logprobs(model, example.ids)[position - 1]
        for example in examples
        for position in range(1, len(example.ids))
        if example.mask[position]
    ]
    torch.stack(losses).mean().backward()
    expected = gradient(model)
    trainer = ready(SFTTrainer, model, tokens_per_microbatch=budget)
    gradients = gradients_of(trainer)
    metrics = trainer.train_step(examples, 1)
    assert metrics["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert metrics["trained_tokens"] == len(losses)
    assert relative(gradients[0], expected) <= EXACT


# ------------------------------------------------------------------ DPO


def slow_dpo(model: nn.Module, reference: nn.Module, examples: list[Any], settings: Any) -> Tensor:
    losses, nll, chosen_tokens = [], [], 0
    for example in examples:
        scores, lengths = [], []
        for ids in (example.chosen_ids, example.rejected_ids):
            start = len(example.prompt_ids) - 1
            logprobs = plain_logprobs(model, example.prompt_ids + ids)[start:]
            with torch.no_grad():
                known = plain_logprobs(reference, example.prompt_ids + ids)[start:]
            scores.append(logprobs.sum() - known.sum())
            lengths.append(len(ids))
            if ids is example.chosen_ids:
                nll.append(-logprobs.sum())
                chosen_tokens += len(ids)
        z = settings.beta * (scores[0] - scores[1])
        if settings.preference_loss == "sigmoid":
            e = settings.label_smoothing
            loss = (1 - e) * (1 + (-z).exp()).log() + e * (1 + z.exp()).log()
        elif settings.preference_loss == "hinge":
            loss = torch.clamp(1 - z, min=0)
        else:
            loss = (scores[0] / lengths[0] - scores[1] / lengths[1] - 1 / (2 * settings.beta)) ** 2
        losses.append(loss)
    return torch.stack(losses).mean() + settings.nll_weight * torch.stack(nll).sum() / chosen_tokens


def dpo(model: nn.Module, reference: nn.Module, examples: list[Any], **keywords: Any) -> DPOTrainer:
    trainer = ready(DPOTrainer, model, **keywords)
    trainer.reference = trainer._reference(Policy(reference, "fp32"), examples)
    return trainer


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2, "beta": 0.5},
        {"preference_loss": "hinge"},
        {"preference_loss": "ipo", "beta": 0.3},
        {"nll_weight": 0.7},
    ],
    ids=["sigmoid", "smoothing", "hinge", "ipo", "nll"],
)
def test_dpo_step_is_the_mean_over_the_pairs(options: dict[str, Any], budget: int):
    model, reference, examples = tiny.make_model("qwen2"), tiny.neighbour_of("qwen2"), pair_examples()
    trainer = dpo(model, reference, examples, tokens_per_microbatch=budget, **options)
    expected = slow_dpo(model, reference, examples, trainer.settings)
    expected.backward()
    truth = gradient(model)
    gradients = gradients_of(trainer)
    metrics = trainer.train_step(list(reversed(examples)), 1)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert relative(gradients[0], truth) <= EXACT


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_first_dpo_step_has_loss_ln_2(smoothing: float):
    model, examples = tiny.make_model("qwen2"), pair_examples()
    metrics = dpo(model, model, examples, label_smoothing=smoothing).train_step(examples, 1)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["chosen_reward"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["reward_margin"] == pytest.approx(0.0, abs=1e-5)


def test_dpo_metrics_are_means_over_the_pairs():
    model, reference, examples = tiny.make_model("qwen2"), tiny.neighbour_of("qwen2"), pair_examples()
    metrics = dpo(model, reference, examples, beta=0.4, tokens_per_microbatch=30).train_step(examples, 1)
    rewards = []
    with torch.no_grad():
        for example in examples:
            rewards.append(
                [
                    0.4
                    * sum(
                        sign * plain_logprobs(m, example.prompt_ids + ids)[len(example.prompt_ids) - 1 :].sum().item()
                        for sign, m in ((1, model), (-1, reference))
                    )
                    for ids in (example.chosen_ids, example.rejected_ids)
                ]
            )
    chosen, rejected = (sum(r[i] for r in rewards) / len(rewards) for i in (0, 1))
    assert metrics["chosen_reward"] == pytest.approx(chosen, rel=1e-4)
    assert metrics["rejected_reward"] == pytest.approx(rejected, rel=1e-4)
    assert metrics["reward_margin"] == pytest.approx(chosen - rejected, rel=1e-4)
    assert metrics["preference_accuracy"] == pytest.approx(sum(c > r for c, r in rewards) / len(rewards))
