"""Group relative policy optimisation: sample completions, score them, and raise those that beat their group."""

from __future__ import annotations

import copy
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nemo_rl.api.keywords import LIVE_REWARD
from nemo_rl.data.prepare import Prepared, PromptExample
from nemo_rl.display.phases import Phase
from nemo_rl.environments.arguments import RAW
from nemo_rl.environments.runner import RewardCall, RewardOutcome, RewardRunner, preflight
from nemo_rl.environments.signature import bind_rewards
from nemo_rl.model.packing import PackedBatch, TokenSequence
from nemo_rl.model.policy import Policy
from nemo_rl.objectives.advantages import flat_groups, group_advantages
from nemo_rl.objectives.correction import Correction, importance_weights, mismatch
from nemo_rl.objectives.losses import kl_estimate, kl_loss, policy_loss, token_weights
from nemo_rl.rollout.bottleneck import Phases, Verdict, bottleneck
from nemo_rl.rollout.in_process.engine import InProcess, end_tokens
from nemo_rl.rollout.in_process.proof import prove_rollouts
from nemo_rl.rollout.protocol import Completion, Request, RolloutEngine, Sampling
from nemo_rl.rollout.responses import Decoder
from nemo_rl.rollout.schedule import Schedule
from nemo_rl.rollout.stops import Stops
from nemo_rl.trainers.ahead import Group, RolloutsAhead
from nemo_rl.trainers.base import Trainer
from nemo_rl.trainers.loading import Loaded
from nemo_rl.trainers.rollouts import MiniBatch, Rollouts, TokenSums, mean_parts

PREFLIGHT_ROWS = 4
BOTTLENECK_STEPS, BOTTLENECK_AFTER = 10, 3
"""Of so many last steps the bottleneck is found, once there are so many."""
ADVICE_AFTER = 10
"""Steps of this process after which the display says what takes longest."""


class GRPOTrainer(Trainer):
    """Maximises the clipped, group-relative objective (DeepSeekMath, arXiv 2402.03300, with the choices of GRPOSpec)."""

    algorithm = "grpo"
    rollout_engine: RolloutEngine
    ahead: RolloutsAhead | None = None
    """What samples before it is needed, where `max_staleness` allows that."""
    _saved_ahead: list[dict[str, Any]]
    reward_sum = 0.0
    servers: Sequence[Mapping[str, Any]] = ()
    """What is known of each rollout server, where others sample."""
    bottleneck: Verdict | None = None
    """What took most of the last steps."""
    _phase_steps = 0
    reward_steps = 0

    def train_step(self, examples: list[PromptExample], step: int) -> dict[str, Any]:
        rollouts, drawn = self._rollouts_for(examples, step)
        self.rollout_engine.rest()
        rewards, valid = self.rewards_of(rollouts)
        started = time.perf_counter()
        found: dict[str, Any] = {}
        self.begin_phase("training")
        if self.settings.use_kl_in_reward:
            divergence = self._kl_of_completions(rollouts, valid)
            rewards = rewards - self.settings.beta * divergence.view(rewards.shape)
            if tokens := self._num_scored_tokens(rollouts, valid):
                found["kl"] = divergence.sum().item() / tokens
        advantages = self.advantages_of(rewards, valid).flatten()
        found |= self.train_on(rollouts, advantages, valid.flatten())
        seconds = {**drawn.seconds, "train_seconds": time.perf_counter() - started}
        self._say_hidden_tokens()
        self.samples = self._samples(drawn, step)
        if self.settings.dynamic_sampling_rounds:
            found["resampled_groups"] = len(drawn.prompts) - len(rollouts.prompts)
        if self.ahead is not None:
            found["rollout_staleness"] = self._mean_staleness(rollouts, step)
        return {**found, **self._reward_metrics(drawn), **seconds}

    def advantages_of(self, rewards: Tensor, valid: Tensor) -> Tensor:
        """Returns the advantage of each completion, (P, G), by the statistics that the settings name."""
        settings = self.settings
        return group_advantages(rewards, valid, statistics=settings.statistics, normalize=settings.normalize_rewards)

    # ------------------------------------------------------------------ rollouts

    def roll_out(self, examples: list[PromptExample], step: int) -> Rollouts:
        """Samples completions of each prompt and scores them; rewards of finished groups overlap with generation.

        Each rank does so for a share of the prompts, and gets the results of all. The seconds of generation are its own,
        those of rewards last until all ranks are done.
        """
        self.begin_phase("giving weights to what samples")
        self.sync_weights()
        started = time.perf_counter()
        generated = started

        def draw(share: list[PromptExample]) -> list[tuple[list[Completion], list[str], list[RewardOutcome]]]:
            nonlocal generated
            groups: dict[int, Group] = {}
            phase = self.begin_phase("rollout", len(share), "prompts")
            self.sample(share, step, self.making_epoch, groups.__setitem__, self.poll, phase)
            generated = time.perf_counter()
            self.begin_phase("waiting for rewards")
            found = [groups[i] for i in range(len(share))]
            return [(group.completions, group.responses, self.runner.wait(group.outcomes)) for group in found]

        with self.weights_to_sample():
            drawn = self.ranks.map(examples, [len(example.ids) for example in examples], draw)
        seconds = {"generate_seconds": generated - started, "reward_seconds": time.perf_counter() - generated}
        return Rollouts(
            examples,
            [completion for completions, _, _ in drawn for completion in completions],
            [response for _, responses, _ in drawn for response in responses],
            [outcome for _, _, outcomes in drawn for outcome in outcomes],
            seconds,
        )

    def _rollouts_for(self, examples: list[PromptExample], step: int) -> tuple[Rollouts, Rollouts]:
        """Returns the rollouts to train on, and all that were drawn for them: sampled now, or some steps ago."""
        if self.ahead is None:
            return self._roll_out_varied(examples, step)
        rollouts = Rollouts(examples, *self.ahead.take(step))
        return rollouts, rollouts

    def _mean_staleness(self, rollouts: Rollouts, step: int) -> float:
        """Optimizer steps between the weights that sampled and those that are trained, on average over the completions."""
        assert self.ahead is not None
        found = [self.ahead.schedule.staleness(step, completion.version) for completion in rollouts.completions]
        return sum(found) / len(found)

    def sync_weights(self) -> None:
        """Gives what samples the weights of now, on all ranks; what that took is told with the next step."""
        self._synced |= self.rollout_engine.update(self.policy, self.current_step)

    def _roll_out_varied(self, examples: list[PromptExample], step: int) -> tuple[Rollouts, Rollouts]:
        """Returns the rollouts to train on, and all that were drawn for them.

        Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): while groups are flat, rows that the step has not seen take
        their places, for at most `dynamic_sampling_rounds` rounds. Which rows depends on seed, step and round alone.
        """
        rollouts = drawn = self.roll_out(examples, step)
        for number in range(self.settings.dynamic_sampling_rounds):
            flat = flat_groups(*self.rewards_of(rollouts)).nonzero().flatten().tolist()
            others = self._other_examples([prompt.index for prompt in drawn.prompts], len(flat), step, number)
            if not others:
                break
            fresh = self.roll_out(others, step)
            varied = (~flat_groups(*self.rewards_of(fresh))).nonzero().flatten().tolist()
            rollouts = rollouts.with_groups(dict(zip(flat, varied, strict=False)), fresh)
            drawn = drawn.and_then(fresh)
        return rollouts, drawn

    def _other_examples(self, seen: list[int], count: int, step: int, number: int) -> list[PromptExample]:
        """Returns up to `count` rows of the data beside those that the step has seen."""
        size, known = len(self.data.examples), set(seen)
        draw = random.Random(f"{self.training.seed} {step} {number}")
        drawn = draw.sample(range(size), min(size, count + len(known)))
        return [self.data.examples[i] for i in [i for i in drawn if i not in known][:count]]

    @contextmanager
    def weights_to_sample(self) -> Iterator[None]:
        """Within it the weights are whole on each rank, where its own process samples."""
        with self.policy.gathered() if isinstance(self.rollout_engine, InProcess) else nullcontext():
            yield

    def sample(
        self,
        examples: list[PromptExample],
        step: int,
        epoch: int,
        on_group: Callable[[int, Group], None],
        poll: Callable[[], None],
        phase: Phase,
    ) -> None:
        """Samples completions of each prompt for a step, on this rank; `on_group(i, group)` gets those of prompt i, which
        begin to be scored, as soon as all of them are done. `phase` counts them."""

        def take(i: int, completions: list[Completion]) -> None:
            on_group(i, self.scored(examples[i], completions, step, epoch))
            phase.add(done=1)

        self.rollout_engine.generate(
            [Request(example.ids, example.index) for example in examples],
            self.sampling,
            seed=self.training.seed,
            step=step,
            poll=poll,
            on_group=take,
            on_tokens=lambda count: phase.add(tokens=count),
        )

    def scored(
        self,
        example: PromptExample,
        completions: list[Completion],
        step: int,
        epoch: int,
        outcomes: list[RewardOutcome] | None = None,
    ) -> Group:
        """Begins to score the completions of a prompt, where their outcomes are not known already."""
        responses, raw = self._decoded(example, completions)
        if outcomes is None:
            calls = self._calls(example, responses, step, raw, made_in=(step, epoch))
            return Group(completions, responses, self.runner.submit(calls))
        known: Future[list[RewardOutcome]] = Future()
        known.set_result(outcomes)
        return Group(completions, responses, known)

    def _count(self, done: int = 0, tokens: int = 0) -> None:
        if self.current_phase is not None:
            self.current_phase.add(done, tokens)

    def _decoded(self, example: PromptExample, completions: list[Completion]) -> tuple[list[str], list[str]]:
        """The texts of completions of one prompt, without special tokens and with them."""
        found = self.decoder(example.ids, [completion.ids for completion in completions])
        self._hidden_tokens |= found.hidden
        return found.texts, found.raw

    def _stop_tokens(self) -> list[int]:
        return [*self.settings.stop_token_ids, *self.stops.tokens]

    def _further_ends(self) -> list[int]:
        self.stops = Stops(self.tokenizer, self.settings.stop)
        return [*super()._further_ends(), *self._stop_tokens()]

    def _calls(
        self,
        example: PromptExample,
        responses: list[str],
        step: int,
        raw: list[str] | None = None,
        made_in: tuple[int, int] | None = None,
    ) -> list[RewardCall]:
        """`step` seeds the calls; 0 in an evaluation, which draws the same whenever it is. `made_in`: the step and the epoch
        that rewards are told; default those that are made now."""
        row = example.row
        made_in = made_in or (self.making_step, self.making_epoch)
        return [
            RewardCall(
                row.prompt,
                response,
                row.messages,
                row.columns,
                (self.training.seed, step, example.index, sample),
                raw[sample] if raw is not None else None,
                *made_in,
            )
            for sample, response in enumerate(responses)
        ]

    def _say_hidden_tokens(self) -> None:
        """Once, where the model writes special tokens that no reward sees: a reward of the format would stay 0."""
        hidden = set().union(*self.ranks.gather(lambda: set(self._hidden_tokens)))
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
        """Makes `num_iterations` updates from each mini-batch of the rollouts; `advantages` and `valid` are (P * G,).

        Each update raises, over the completions i of a mini-batch and their tokens t (DeepSeekMath, arXiv 2402.03300, eq. 3),

            J(θ) = Σ_i w_i Σ_t ( min(ρ_it A_i, clip(ρ_it, 1 - ε_low, 1 + ε_high) A_i) - β KL(π_θ, π_ref)_it ),  ρ = π_θ / π_old
        """
        mini_batches = [batch for batch in self._mini_batches(rollouts, advantages, valid) if batch.sequences]
        updates = self.settings.num_iterations * len(mini_batches)
        old = [self._old_logprobs(batch.sequences) if updates > 1 else {} for batch in mini_batches]
        sums = TokenSums()
        losses, norms = [0.0], [0.0]
        for update in range(updates):
            number = update % len(mini_batches)
            if number == 0:
                losses, norms = [], []
            objective = self._objective(mini_batches[number], old[number], sums)
            sequences = mini_batches[number].sequences
            losses.append(self.accumulate(sequences, objective, sums=sums.sums, may_stop=update == 0))
            norms.append(self._optimizer.step(self.rate))
        found = {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
        tokens = sum(sequence.num_targets for batch in mini_batches for sequence in batch.sequences)
        return {**found, **sums.means(self.ranks, tokens * self.settings.num_iterations)}

    def _objective(
        self, mini_batch: MiniBatch, old: dict[int, Tensor], sums: TokenSums
    ) -> Callable[[PackedBatch, list[int]], Tensor]:
        """Returns -J(θ) of a micro-batch as a function. `old`: log π_old of each sequence before the first of several updates; of
        a single update it is log π_θ itself."""
        settings, device = self.settings, self.device

        def loss_fn(batch: PackedBatch, indices: list[int]) -> Tensor:
            order = [indices[i] for i in batch.order]
            rows = torch.tensor(indices, device=device)[batch.rows_S]
            # before the pass with gradient: the backward pass of a sharded model follows its forward pass
            log_ref = self._reference_logprobs(batch) if self._kl_in_loss else None
            log_pi = self.policy.logprobs(batch, settings.temperature)
            log_old = torch.cat([old[i] for i in order]).to(device) if old else log_pi.detach()
            log_sampled = mini_batch.sampled(order)
            if self.samples_elsewhere or self.correction != "none":
                sizes = [len(mini_batch.drawn[i]) for i in order]
                sums.keep([mini_batch.numbers[i] for i in order], log_old, log_sampled, sizes)
            loss, _, clipped = policy_loss(
                settings.loss_type,
                log_pi,
                log_old,
                mini_batch.advantages[rows],
                batch.rows_S,
                batch.num_sequences,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                dual_clip=settings.dual_clip,
            )
            sums.add(clipped=clipped.sum(), **mismatch(log_old, log_sampled)._asdict())
            if self.correction != "none":
                factor, bounded = importance_weights(
                    log_old,
                    log_sampled,
                    batch.rows_S,
                    batch.num_sequences,
                    self.correction,
                    low=settings.importance_min,
                    high=settings.importance_max,
                )
                loss = loss * factor
                sums.add(bounded=bounded.sum())
            if log_ref is not None:
                ratio = (log_pi - log_old).exp()
                loss = loss + settings.beta * kl_loss(log_pi, log_ref, ratio, settings.kl_estimator)
                sums.add(divergence=kl_estimate(log_pi.detach(), log_ref, settings.kl_estimator).sum())
            return (loss * mini_batch.weights[rows]).sum()

        return loss_fn

    def _mini_batches(self, rollouts: Rollouts, advantages: Tensor, valid: Tensor) -> list[MiniBatch]:
        """Cuts the rollouts into mini-batches of whole groups; each is averaged by itself."""
        settings = self.settings
        counted = valid.tolist()
        if settings.mask_truncated_completions:
            counted = [v and c.finished for v, c in zip(counted, rollouts.completions, strict=True)]
        size = (settings.mini_batch_size or len(rollouts.prompts)) * settings.num_generations_per_prompt
        found = []
        for start in range(0, len(counted), size):
            numbers = range(start, min(start + size, len(counted)))
            lengths = [len(rollouts.completions[i].ids) if counted[i] else 0 for i in numbers]
            weights = token_weights(lengths, settings.loss_type, settings.max_new_tokens)
            # without a KL term a completion of zero advantage has no gradient; the weights still count its tokens
            live = [i for i in numbers if counted[i] and (self._kl_in_loss or advantages[i] != 0)]
            found.append(
                MiniBatch(
                    live,
                    [self._sequence(rollouts, i) for i in live],
                    [rollouts.completions[i].logprobs for i in live],
                    advantages[live].to(self.device),
                    torch.tensor(weights, device=self.device)[[i - start for i in live]],
                )
            )
        return found

    @property
    def correction(self) -> Correction:
        """How tokens are weighed by their probability in training over that in sampling."""
        chosen = self.settings.importance_correction
        if chosen == "auto":
            return "token_truncate" if self.samples_elsewhere else "none"
        return chosen

    @property
    def samples_elsewhere(self) -> bool:
        """Whether completions come from another engine or from older weights than those that are trained."""
        rollout = self.config.rollout
        return rollout is not None and (rollout.engine != "in_process" or rollout.max_staleness > 0)

    @property
    def _kl_in_loss(self) -> bool:
        return self.settings.beta > 0 and not self.settings.use_kl_in_reward

    def _kl_of_completions(self, rollouts: Rollouts, valid: Tensor) -> Tensor:
        """Returns the estimated divergence from the reference, summed over the tokens of each completion, (P * G,), 0 where
        its reward is missing: what KL in the reward subtracts (InstructGPT, arXiv 2203.02155, eq. 2)."""
        counted = [i for i, keep in enumerate(valid.flatten().tolist()) if keep]
        settings = self.settings

        def values_of(batch: PackedBatch) -> Tensor:
            logprobs = self.policy.logprobs(batch, settings.temperature)
            return kl_estimate(logprobs, self._reference_logprobs(batch), settings.kl_estimator)

        sums = self.sum_over_tokens([self._sequence(rollouts, i) for i in counted], values_of)
        found = torch.zeros(valid.numel(), dtype=torch.float64)
        found[counted] = sums.double().cpu()
        return found

    def _num_scored_tokens(self, rollouts: Rollouts, valid: Tensor) -> int:
        return sum(len(c.ids) for c, keep in zip(rollouts.completions, valid.flatten().tolist(), strict=True) if keep)

    @torch.no_grad()
    def _old_logprobs(self, sequences: list[TokenSequence]) -> dict[int, Tensor]:
        """The log-probabilities before the first of several updates, as the training pass computes them, of this rank's share.

        Those of the rollout are computed by other kernels: their rounding alone would count as a change of the policy.
        """

        def compute() -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}
            for batch, indices, _ in self.passes(sequences):
                values = self.policy.logprobs(batch, self.settings.temperature).detach()
                sizes = [sequences[indices[i]].num_targets for i in batch.order]
                for i, part in zip(batch.order, values.split(sizes), strict=True):
                    found[indices[i]] = part.clone()
            return found

        kept: list[dict[int, Tensor]] = []

        def keep() -> None:
            kept[:] = [compute()]

        self.together(keep)
        return kept[0]

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
        found = {**super()._identity(data, validation), "reward": self.rewards_identity, "on_reward_error": on_error}
        if self.config.rollout is not None and self.config.rollout.engine != "in_process":
            found["rollout_engine"] = self.config.rollout.engine
        if self.config.rollout is not None and self.config.rollout.max_staleness:
            found["max_staleness"] = self.config.rollout.max_staleness
        return found

    def _start(self, data: Prepared, validation: Prepared | None) -> None:
        settings = self.settings
        self.data = data
        self._phases: deque[Phases] = deque(maxlen=BOTTLENECK_STEPS)
        self.end_ids = end_tokens(self.policy.causal, self.tokenizer)
        self.decoder = Decoder(self.tokenizer, self.end_ids, self._stop_tokens())
        self._hidden_tokens: set[int] = set()
        self._said_hidden = False
        self._synced: dict[str, float] = {}
        self.sampling = Sampling(
            settings.num_generations_per_prompt,
            settings.max_new_tokens,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            stops=self.stops,
        )
        self.rollout_engine = self._new_engine(data, validation)
        if self.config.rollout is not None and self.config.rollout.max_staleness:
            schedule = Schedule(self.config.rollout.max_staleness, self.total_steps)
            abort = getattr(self.rollout_engine, "abort", None)
            self.ahead = RolloutsAhead(self, schedule, self._saved_ahead, abort)
        self.reference = self.initial_policy() if self.needs_reference else None
        self.runner.should_stop = self.poll
        calls = [self._calls(row, [""], 0)[0] for row in data.examples[:PREFLIGHT_ROWS]]

        def first_calls() -> list[str]:
            self.runner.start()
            return preflight(self.runner, calls, on_error=self.runner.on_error)

        for warning in self.ranks.together(first_calls):
            self.display.note(warning)

    def policies(self) -> list[Policy]:
        reference = getattr(self, "reference", None)
        return [self.policy, *([reference] if reference is not None else [])]

    @property
    def reward_names(self) -> list[str]:
        return list(self.rewards_identity) if hasattr(self, "rewards_identity") else []

    @property
    def needs_reference(self) -> bool:
        return self.settings.beta > 0 and self.training.lora_rank is None

    def initial_policy(self) -> Policy:
        if self.current_step == 0 and self.policy.sharded is None:  # a sharded model cannot be copied
            return self.loader.policy(self.loader.frozen(Loaded(copy.deepcopy(self.model))))
        return super().initial_policy()

    def _new_engine(self, data: Prepared, validation: Prepared | None) -> RolloutEngine:
        spec = self.config.rollout
        if spec is None or spec.engine == "in_process":
            with self.policy.gathered():
                prove_rollouts(self.policy)
            return InProcess(self.end_ids)
        from nemo_rl.rollout.vllm.engine import VLLMRollouts

        longest = max(prepared.examples.longest for prepared in (data, validation) if prepared is not None)
        return VLLMRollouts(
            spec,
            self.policy,
            self.tokenizer,
            self.ranks,
            end_ids=self.end_ids,
            longest=longest + self.settings.max_new_tokens,
            probe=self.sampling,
            log_file=self.run_dir / "rollout" / "vllm.log",
            poll=self.poll,
            note=self.display.note,
            tell=self.note_servers,
        )

    def note_servers(self, servers: list[dict[str, Any]]) -> None:
        """Told what is known of each rollout server, from any thread of the first rank. For those who watch a trainer."""
        self.servers = servers

    def _release(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
            self.ahead = None
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
                on_tokens=lambda count: self._count(tokens=count),
            )
            decoded = [self._decoded(example, group) for example, group in zip(examples, groups, strict=True)]
            calls = [
                self._calls(example, texts, 0, raws)[0]
                for example, (texts, raws) in zip(examples, decoded, strict=True)
            ]
            return self.runner.score(calls)

        if self.ahead is not None:
            self.ahead.wait_until_idle()
        self.sync_weights()
        examples = validation.examples
        with self.weights_to_sample():
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
        metrics |= self._synced
        self._synced = {}
        self._observe_phases(metrics)

    def _observe_phases(self, metrics: dict[str, Any]) -> None:
        """Finds what took longest in the last steps, and what would help, and says so once. The seconds are in the metrics."""
        phases = Phases.of(metrics)
        if phases is None:
            return
        self._phases.append(phases)
        self._phase_steps += 1
        if len(self._phases) < BOTTLENECK_AFTER:
            return
        found = sum(list(self._phases)[1:], self._phases[0])
        rollout = self.config.rollout
        servers = (
            max(1, len(getattr(self.rollout_engine, "members", ()))) if rollout and rollout.engine == "vllm" else 0
        )
        workers = self.config.reward.workers if self.config.reward is not None else 1
        on_policy = self.ahead is None and not self.settings.dynamic_sampling_rounds
        setup = {"servers": servers, "reward_workers": workers, "ranks": self.ranks.size, "on_policy": on_policy}
        self.bottleneck = bottleneck(found, self.servers, **setup)
        if self._phase_steps == ADVICE_AFTER:
            self.display.note(self.bottleneck.advice)

    def take_checkpoint_metric(self) -> float | None:
        """Returns the mean reward since the checkpoint before."""
        mean = self.reward_sum / self.reward_steps if self.reward_steps else None
        self.reward_sum, self.reward_steps = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        found = {**super().state(), "reward_sum": self.reward_sum, "reward_steps": self.reward_steps}
        return found if self.ahead is None else {**found, "rollouts_ahead": self.ahead.state()}

    def _load_state(self, state: dict[str, Any]) -> None:
        super()._load_state(state)
        self.reward_sum, self.reward_steps = state.get("reward_sum", 0.0), state.get("reward_steps", 0)
        self._saved_ahead = state.get("rollouts_ahead", [])

    def _reward_metrics(self, rollouts: Rollouts) -> dict[str, Any]:
        rewards, valid = self.rewards_of(rollouts)
        counts = valid.sum(-1)
        means = (rewards * valid).sum(-1) / counts.clamp(min=1)
        variances = ((rewards - means[:, None]).square() * valid).sum(-1) / (counts - 1).clamp(min=1)
        lengths = [len(c.ids) for c in rollouts.completions]
        scored = counts > 0
        measured = {
            "reward": ((rewards * valid).sum() / valid.sum().clamp(min=1)).item(),
            "reward_std": (variances.sqrt() * scored).sum().item() / max(int(scored.sum()), 1),
            "flat_group_fraction": flat_groups(rewards, valid).float().mean().item(),
        }
        metrics: dict[str, Any] = {
            **(measured if valid.any() else {}),  # of no reward there is no mean
            **mean_parts(rollouts.outcomes),
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
