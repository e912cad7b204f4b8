"""Group relative policy optimisation: sample completions, score them, and raise those that beat their group."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_rl.api.keywords import LIVE_REWARD
from nemo_rl.data.prepare import Prepared, PromptExample
from nemo_rl.environments.arguments import RAW
from nemo_rl.environments.runner import RewardCall, RewardOutcome, RewardRunner, preflight
from nemo_rl.environments.signature import bind_rewards
from nemo_rl.model.packing import PackedBatch, TokenSequence, pack
from nemo_rl.model.policy import Policy
from nemo_rl.objectives.advantages import group_advantages
from nemo_rl.objectives.losses import clipped_policy_loss, kl_estimate, kl_loss, token_weights
from nemo_rl.rollout.in_process.engine import InProcess, end_tokens
from nemo_rl.rollout.in_process.proof import prove_rollouts
from nemo_rl.rollout.protocol import Completion, Request, RolloutEngine, Sampling
from nemo_rl.rollout.responses import opening_tag
from nemo_rl.rollout.stops import Stops
from nemo_rl.trainers.base import Trainer

PREFLIGHT_ROWS = 4


@dataclass(frozen=True)
class Rollouts:
    """Completions of P prompts, G each, prompt by prompt, with the outcome of their rewards."""

    prompts: list[PromptExample]
    completions: list[Completion]
    responses: list[str]
    outcomes: list[RewardOutcome]
    seconds: dict[str, float]


class GRPOTrainer(Trainer):
    """Maximises the clipped, group-relative objective (DeepSeekMath, arXiv 2402.03300, with the choices of GRPOSpec)."""

    algorithm = "grpo"
    rollout_engine: RolloutEngine
    reward_sum = 0.0
    reward_steps = 0

    def train_step(self, examples: list[PromptExample], step: int) -> dict[str, Any]:
        rollouts = self.roll_out(examples, step)
        rewards, valid = self.rewards_of(rollouts)
        advantages = group_advantages(
            rewards,
            valid,
            leave_one_out=self.settings.use_leave_one_out_baseline,
            normalize=self.settings.normalize_rewards,
        ).flatten()
        started = time.perf_counter()
        trained = self.train_on(rollouts, advantages, valid.flatten())
        seconds = {**rollouts.seconds, "train_seconds": time.perf_counter() - started}
        self._say_hidden_tokens()
        self.samples = self._samples(rollouts, step)
        return {**trained, **self._reward_metrics(rollouts, rewards, valid, advantages), **seconds}

    # ------------------------------------------------------------------ rollouts

    def roll_out(self, examples: list[PromptExample], step: int) -> Rollouts:
        """Samples completions of each prompt and scores them; rewards of finished groups overlap with generation.

        Each rank does so for a share of the prompts, and gets the results of all. The seconds of generation are its own,
        those of rewards last until all ranks are done.
        """
        synced = self._sync_weights()
        started = time.perf_counter()
        generated = started

        def draw(share: list[PromptExample]) -> list[tuple[list[Completion], list[str], list[RewardOutcome]]]:
            nonlocal generated
            groups, responses, futures = self._generate(share, step)
            generated = time.perf_counter()
            return list(zip(groups, responses, map(self.runner.wait, futures), strict=True))

        drawn = self.ranks.map(examples, [len(example.ids) for example in examples], draw)
        seconds = {**synced, "generate_seconds": generated - started, "reward_seconds": time.perf_counter() - generated}
        return Rollouts(
            examples,
            [completion for completions, _, _ in drawn for completion in completions],
            [response for _, responses, _ in drawn for response in responses],
            [outcome for _, _, outcomes in drawn for outcome in outcomes],
            seconds,
        )

    def _sync_weights(self) -> dict[str, float]:
        """Gives what samples the weights of now, on all ranks; returns what that took."""
        return self.rollout_engine.update(self.policy, self.current_step)

    def _generate(
        self, examples: list[PromptExample], step: int
    ) -> tuple[list[list[Completion]], list[list[str]], list[Any]]:
        """Returns completions, their texts and the futures of their rewards, one of each for each prompt."""
        futures: list[Any] = [None] * len(examples)
        responses: list[list[str]] = [[] for _ in examples]

        def score(i: int, completions: list[Completion]) -> None:
            responses[i], raw = self._decoded(examples[i], completions)
            futures[i] = self.runner.submit(self._calls(examples[i], responses[i], step, raw))

        groups = self.rollout_engine.generate(
            [Request(example.ids, example.index) for example in examples],
            self.sampling,
            seed=self.training.seed,
            step=step,
            poll=self.poll,
            on_group=score,
        )
        return groups, responses, futures

    def _decoded(self, example: PromptExample, completions: list[Completion]) -> tuple[list[str], list[str]]:
        """The texts of completions of one prompt: without special tokens, and with them but for what ends a completion.
        Each begins with the tag by which the prompt has opened the thinking.
        """
        texts = self.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        # what the user asked to stop at is part of the answer
        ends = {*self.end_ids, self.tokenizer.pad_token_id} - set(self._stop_tokens())
        kept = []
        for completion in completions:
            ids = list(completion.ids)
            while ids and ids[-1] in ends:
                ids.pop()
            kept.append(ids)
        raw = self.tokenizer.batch_decode(kept, skip_special_tokens=False)
        special = self._special_ids.difference(ends)
        self._hidden_tokens |= {i for ids in kept for i in ids if i in special}
        opened = opening_tag(self.tokenizer, example.ids)
        return [opened + text for text in texts], [opened + text for text in raw]

    def _stop_tokens(self) -> list[int]:
        return [*self.settings.stop_token_ids, *self.stops.tokens]

    def _further_ends(self) -> list[int]:
        self.stops = Stops(self.tokenizer, self.settings.stop)
        return [*super()._further_ends(), *self._stop_tokens()]

    def _calls(
        self, example: PromptExample, responses: list[str], step: int, raw: list[str] | None = None
    ) -> list[RewardCall]:
        """`step` seeds the calls; 0 in an evaluation, which draws the same whenever it is."""
        row = example.row
        return [
            RewardCall(
                row.prompt,
                response,
                row.messages,
                row.columns,
                (self.training.seed, step, example.index, sample),
                raw[sample] if raw is not None else None,
                self.making_step,
                self.making_epoch,
            )
            for sample, response in enumerate(responses)
        ]

    def _say_hidden_tokens(self) -> None:
        """Once, where the model writes special tokens that no reward sees: a reward of the format would stay 0."""
        hidden = set().union(*self.ranks.gather(lambda: self._hidden_tokens))
        if not hidden or self._said_hidden or any(r.signature.takes.has(RAW) for r in self.runner.rewards.rewards):
            return
        self._said_hidden = True
        shown = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(hidden))[:4])
        self.display.note(
            f"the model writes special tokens ({shown}), which `response` leaves out; a reward that names a parameter "
            "response_raw gets the text with them"
        )

    def rewards_of(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Returns the rewards and which of them count, both (P, G). Dropped completions have reward 0 and do not count."""
        shape = (len(rollouts.prompts), self.settings.num_generations_per_prompt)
        values = [outcome.value if outcome.value is not None else 0.0 for outcome in rollouts.outcomes]
        valid = [outcome.value is not None for outcome in rollouts.outcomes]
        return torch.tensor(values, dtype=torch.float64).view(shape), torch.tensor(valid).view(shape)

    # ------------------------------------------------------------------ the update

    def train_on(self, rollouts: Rollouts, advantages: Tensor, valid: Tensor) -> dict[str, float]:
        """Makes `num_iterations` optimizer updates from the rollouts; `advantages` and `valid` are (P * G,)."""
        settings = self.settings
        completions = rollouts.completions
        counted = valid.tolist()
        if settings.mask_truncated_completions:
            counted = [v and c.finished for v, c in zip(counted, completions, strict=True)]
        lengths = [len(c.ids) if keep else 0 for c, keep in zip(completions, counted, strict=True)]
        weights = token_weights(lengths, settings.loss_type, settings.max_new_tokens)
        # without a KL term a completion of zero advantage has no gradient; the weights above still count its tokens
        live = [i for i, keep in enumerate(counted) if keep and (settings.beta > 0 or advantages[i] != 0)]
        sequences = [self._sequence(rollouts, i) for i in live]
        totals = {"kl": 0.0, "clipped": 0.0}
        before = self._old_logprobs(sequences) if settings.num_iterations > 1 and sequences else []
        device = self.device
        advantage_of, weight_of = advantages[live].to(device), torch.tensor(weights, device=device)[live]

        def loss_fn(batch: PackedBatch, indices: list[int]) -> Tensor:
            rows = torch.tensor(indices, device=device)[batch.rows_S]
            logprobs = self.policy.logprobs(batch, settings.temperature)
            old = logprobs.detach()
            if settings.num_iterations > 1:
                old = torch.cat([before[indices[i]] for i in batch.order]).to(device)
            loss, ratio, clipped = clipped_policy_loss(
                logprobs,
                old,
                advantage_of[rows],
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                dual_clip=settings.dual_clip,
            )
            totals["clipped"] += clipped.sum().item()
            if settings.beta > 0:
                reference = self._reference_logprobs(batch)
                loss = loss + settings.beta * kl_loss(logprobs, reference, ratio, settings.kl_estimator)
                totals["kl"] += kl_estimate(logprobs.detach(), reference, settings.kl_estimator).sum().item()
            return (loss * weight_of[rows]).sum()

        loss, grad_norm = 0.0, 0.0
        for iteration in range(settings.num_iterations if sequences else 0):
            loss = self.accumulate(sequences, loss_fn, may_stop=iteration == 0)
            grad_norm = self._optimizer.step(self.rate)
        totals = self.ranks.sum(totals)
        trained_tokens = sum(sequence.num_targets for sequence in sequences) * settings.num_iterations
        found = {"loss": loss, "grad_norm": grad_norm}
        if trained_tokens and settings.beta > 0:
            found["kl"] = totals["kl"] / trained_tokens
        if trained_tokens:
            found["clip_fraction"] = totals["clipped"] / trained_tokens
        return found

    @torch.no_grad()
    def _old_logprobs(self, sequences: list[TokenSequence]) -> dict[int, Tensor]:
        """The log-probabilities before the first of several updates, as the training pass computes them, of this rank's share.

        Those of the rollout are computed by other kernels: their rounding alone would count as a change of the policy.
        """
        share = self._shares(sequences)[self.ranks.rank]

        def compute() -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}
            for plan in self.microbatches([sequences[i] for i in share]):
                self.poll()
                indices = [share[i] for i in plan]
                batch = pack([sequences[i] for i in indices], self.device)
                values = self.policy.logprobs(batch, self.settings.temperature).detach()
                sizes = [sequences[indices[i]].num_targets for i in batch.order]
                for i, part in zip(batch.order, values.split(sizes), strict=True):
                    found[indices[i]] = part.clone()
            return found

        return self.ranks.together(compute)

    def _sequence(self, rollouts: Rollouts, i: int) -> TokenSequence:
        group = i // self.settings.num_generations_per_prompt
        prompt = rollouts.prompts[group].ids
        return TokenSequence(prompt + rollouts.completions[i].ids, len(prompt), group=group, shared=len(prompt))

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> Tensor:
        with self._as_reference() as policy:
            return policy.logprobs(batch, self.settings.temperature)

    @contextmanager
    def _as_reference(self) -> Iterator[Policy]:
        """The model that training started from: with adapters, the same model without them."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.disable_adapter():
                yield self.policy

    # ------------------------------------------------------------------ start, evaluation, words

    def _bind(self, data: Prepared, validation: Prepared | None, reward_fn: Any, reward_weights: Any) -> None:
        spec = self.config.reward
        if reward_fn is None and spec is not None and spec.function != LIVE_REWARD:
            from nemo_rl.environments.load import load_reward

            reward_fn = load_reward(spec, {})
        if reward_fn is None:
            raise ValueError("reward_fn is required for GRPO: a function (prompt, response) -> float")
        columns = set(data.examples[0].row.columns)
        weights = reward_weights if reward_weights is not None else (spec.weights if spec is not None else None)
        rewards = bind_rewards(reward_fn, weights, columns)
        self.rewards_identity = rewards.identity
        timeout, on_error = (spec.timeout_seconds, spec.on_error) if spec is not None else (60.0, "raise")
        workers = spec.workers if spec is not None else 1
        self.runner = RewardRunner(rewards, timeout_seconds=timeout, on_error=on_error, workers=workers)

    def _identity(self, data: Prepared, validation: Prepared | None) -> dict[str, Any]:
        on_error = self.runner.on_error
        return {**super()._identity(data, validation), "reward": self.rewards_identity, "on_reward_error": on_error}

    def _start(self, data: Prepared, validation: Prepared | None) -> None:
        settings = self.settings
        self.end_ids = end_tokens(self.policy.causal, self.tokenizer)
        self._special_ids = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._hidden_tokens: set[int] = set()
        self._said_hidden = False
        self.sampling = Sampling(
            settings.num_generations_per_prompt,
            settings.max_new_tokens,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            stops=self.stops,
        )
        self.rollout_engine = self._new_engine()
        self.reference = self.initial_policy() if self.needs_reference else None
        self.runner.should_stop = self.poll
        calls = [self._calls(row, [""], 0)[0] for row in data.examples[:PREFLIGHT_ROWS]]

        def first_calls() -> list[str]:
            self.runner.start()
            return preflight(self.runner, calls, on_error=self.runner.on_error)

        for warning in self.ranks.together(first_calls):
            self.display.note(warning)

    @property
    def needs_reference(self) -> bool:
        return self.settings.beta > 0 and self.training.lora_rank is None

    def _shard(self, resuming: bool) -> None:
        if self.ranks.size > 1 and self.needs_reference and not resuming:
            self._start_model = copy.deepcopy(self.model)  # sharded models cannot be copied
        super()._shard(resuming)

    def initial_policy(self) -> Policy:
        if self.current_step == 0 and self._start_model is None:
            frozen = copy.deepcopy(self.model).requires_grad_(False)
            return Policy(frozen, self.training.precision, longest=self.training.max_sequence_length)
        return super().initial_policy()

    def _new_engine(self) -> RolloutEngine:
        prove_rollouts(self.policy)
        return InProcess(self.end_ids)

    def _release(self) -> None:
        if hasattr(self, "rollout_engine"):
            self.rollout_engine.close()
        if hasattr(self, "runner"):
            self.runner.close()

    def evaluate(self, validation: Prepared) -> tuple[dict[str, float], float | None]:
        sampling = Sampling(1, self.settings.max_new_tokens, greedy=True, stops=self.stops)

        def score(examples: list[PromptExample]) -> list[RewardOutcome]:
            groups = self.rollout_engine.generate(
                [Request(example.ids, i) for i, example in enumerate(examples)],
                sampling,
                seed=self.training.seed,
                step=0,
                poll=self.poll,
            )
            decoded = [self._decoded(example, group) for example, group in zip(examples, groups, strict=True)]
            calls = [
                self._calls(example, texts, 0, raws)[0]
                for example, (texts, raws) in zip(examples, decoded, strict=True)
            ]
            return self.runner.score(calls)

        self._sync_weights()
        examples = validation.examples
        scored = self.ranks.map(examples, [len(example.ids) for example in examples], score)
        values = [outcome.value for outcome in scored if outcome.value is not None]
        metrics: dict[str, float] = {"validation_reward_errors": sum(outcome.error is not None for outcome in scored)}
        if not values:
            return metrics, None
        metrics["validation_reward"] = sum(values) / len(values)
        return metrics, metrics["validation_reward"]

    def _observe(self, metrics: dict[str, Any]) -> None:
        if "reward" in metrics:
            self.reward_sum += metrics["reward"]
            self.reward_steps += 1

    def take_checkpoint_metric(self) -> float | None:
        """Returns the mean reward since the checkpoint before."""
        mean = self.reward_sum / self.reward_steps if self.reward_steps else None
        self.reward_sum, self.reward_steps = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        return {**super().state(), "reward_sum": self.reward_sum, "reward_steps": self.reward_steps}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self.reward_sum, self.reward_steps = state.get("reward_sum", 0.0), state.get("reward_steps", 0)

    def _reward_metrics(self, rollouts: Rollouts, rewards: Tensor, valid: Tensor, advantages: Tensor) -> dict[str, Any]:
        counts = valid.sum(-1)
        means = (rewards * valid).sum(-1) / counts.clamp(min=1)
        variances = ((rewards - means[:, None]).square() * valid).sum(-1) / (counts - 1).clamp(min=1)
        lengths = [len(c.ids) for c in rollouts.completions]
        scored = counts > 0
        measured = {
            "reward": ((rewards * valid).sum() / valid.sum().clamp(min=1)).item(),
            "reward_std": (variances.sqrt() * scored).sum().item() / max(int(scored.sum()), 1),
            "flat_group_fraction": (advantages.view(rewards.shape) == 0).all(-1).float().mean().item(),
        }
        metrics: dict[str, Any] = {
            **(measured if valid.any() else {}),  # of no reward there is no mean
            **_mean_parts(rollouts.outcomes),
            "reward_errors": sum(outcome.error is not None for outcome in rollouts.outcomes),
            "entropy": -sum(sum(c.logprobs) for c in rollouts.completions) / max(sum(lengths), 1),
            "completion_length": sum(lengths) / len(lengths),
            "truncated_fraction": sum(not c.finished for c in rollouts.completions) / len(lengths),
            "tokens": sum(lengths) + sum(len(prompt.ids) for prompt in rollouts.prompts),
        }
        metrics |= {f"environment/{name}": value for name, value in self.runner.metrics().items() if "/" not in name}
        return metrics

    def _samples(self, rollouts: Rollouts, step: int) -> list[dict[str, Any]]:
        found = []
        for i in range(min(self.training.logged_completions, len(rollouts.completions))):
            # the first of each of the first groups, so that samples show different prompts
            group = i % len(rollouts.prompts)
            j = group * self.settings.num_generations_per_prompt + i // len(rollouts.prompts)
            outcome = rollouts.outcomes[j]
            found.append(
                {
                    "prompt": rollouts.prompts[group].row.prompt,
                    "completion": rollouts.responses[j],
                    "reward": outcome.value,
                    "tokens": len(rollouts.completions[j].ids),
                    "error": outcome.error,
                }
            )
        return found


def _mean_parts(outcomes: list[RewardOutcome]) -> dict[str, float]:
    """Returns the mean of each named part of the rewards over the completions that have it, as reward/<part>."""
    names = sorted({name for outcome in outcomes for name in outcome.parts})
    found = {}
    for name in names:
        values = [outcome.parts[name] for outcome in outcomes if name in outcome.parts]
        found[f"reward/{name}"] = sum(values) / len(values)
    return found
