"""Rollouts that run ahead of training: batches that are sampled, or being sampled, and not yet trained."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from nemo_rl.data.prepare import PromptExample
from nemo_rl.display.phases import Phase
from nemo_rl.environments.runner import RewardOutcome
from nemo_rl.rollout.protocol import Completion
from nemo_rl.rollout.schedule import Schedule
from nemo_rl.run.signals import Interrupted

if TYPE_CHECKING:
    from nemo_rl.trainers.grpo import GRPOTrainer

_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Group:
    """The completions of one prompt, their texts and their rewards, which may still be under way."""

    completions: list[Completion]
    responses: list[str]
    outcomes: Future[list[RewardOutcome]]


@dataclasses.dataclass
class _Batch:
    """The rollouts of one step. `groups`: those of this rank's share that are sampled, by their place in the batch."""

    step: int
    examples: list[PromptExample]
    groups: dict[int, Group] = dataclasses.field(default_factory=dict)
    sampled: Future[None] = dataclasses.field(default_factory=Future)


Known = dict[int, tuple[list[Completion], list[RewardOutcome] | None]]
"""Groups of a batch by their place, with their rewards where these are known."""


class RolloutsAhead:
    """Begins rollouts as early as the schedule allows, and hands them out step by step.

    An engine of this process samples at the start of a step, by the weights of then: what runs ahead are the rewards, and
    which version samples what is the schedule's alone. Another engine samples in a thread while this process trains; it is
    given newer weights only between two batches, so that all tokens of a completion come from one version.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        schedule: Schedule,
        saved: Iterable[dict[str, Any]],
        abort: Callable[[], None] | None = None,
    ) -> None:
        """`saved`: what `state` returned in the run that goes on. `abort`: ends the requests of an engine of other processes."""
        self.trainer, self.schedule = trainer, schedule
        self._saved = {record["step"]: _read(record) for record in saved}
        self._batches: list[_Batch] = []
        self._begun = 0
        self._abort = abort
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead") if abort is not None else None
        self._stopping = threading.Event()

    # ------------------------------------------------------------------ batches

    def take(self, step: int) -> tuple[list[Completion], list[str], list[RewardOutcome], dict[str, float]]:
        """Returns completions, texts and rewards of a step's batch, prompt by prompt, and the seconds that this step waited.

        Begins first what may be begun. The batch stays part of `state` until its step is trained.
        """
        trainer = self.trainer
        self._batches = [batch for batch in self._batches if batch.step > trainer.current_step]
        seconds = self._begin_due(step)
        batch = next(batch for batch in self._batches if batch.step == step)
        started = sampled = time.perf_counter()

        def finish() -> list[tuple[int, list[Completion], list[str], list[RewardOutcome]]]:
            nonlocal sampled
            self._wait(batch.sampled)
            trainer.begin_phase("waiting for rewards")
            sampled = time.perf_counter()
            groups = sorted(batch.groups.items())
            return [(place, g.completions, g.responses, trainer.runner.wait(g.outcomes)) for place, g in groups]

        parts = sorted((part for share in trainer.ranks.gather(finish) for part in share), key=lambda part: part[0])
        assert [part[0] for part in parts] == list(range(len(batch.examples)))
        seconds["generate_seconds"] += sampled - started
        seconds["reward_seconds"] = time.perf_counter() - sampled
        completions = [completion for _, found, _, _ in parts for completion in found]
        for completion in completions:
            self.schedule.staleness(step, completion.version)
        return (
            completions,
            [text for _, _, texts, _ in parts for text in texts],
            [outcome for _, _, _, outcomes in parts for outcome in outcomes],
            seconds,
        )

    def _begin_due(self, step: int) -> dict[str, float]:
        """Begins the batches that the weights of now may sample, and returns the seconds that this took of generation."""
        trainer, version = self.trainer, self.trainer.current_step
        due = self.schedule.to_sample(version, self._begun)
        started = time.perf_counter()
        trainer.begin_phase("waiting for rollouts")
        if not due or self._better_train(step):
            return {"generate_seconds": time.perf_counter() - started}
        self.wait_until_idle()
        idle = time.perf_counter()
        trainer.begin_phase("giving weights to what samples")
        trainer.sync_weights()
        synced = time.perf_counter()
        for number in due:
            self._begin(number)
        return {"generate_seconds": time.perf_counter() - synced + idle - started}

    def _better_train(self, step: int) -> bool:
        """Whether this step's rollouts are here while later ones are still sampled: then it is trained first, and nobody
        waits. What is due is begun after it, by newer weights."""
        if self._thread is None:
            return False
        batch = next((batch for batch in self._batches if batch.step == step), None)
        found = self.trainer.ranks.gather(
            lambda: (batch is not None and batch.sampled.done(), all(b.sampled.done() for b in self._batches))
        )
        return all(here for here, _ in found) and not all(idle for _, idle in found)

    def _begin(self, step: int) -> None:
        trainer = self.trainer
        epoch, examples = trainer.batch_of(step)
        known: Known = self._saved.pop(step, {})
        share = trainer.ranks.shares([len(example.ids) for example in examples])[trainer.ranks.rank]
        batch = _Batch(step, examples)
        for place in share:
            if place in known:
                completions, outcomes = known[place]
                batch.groups[place] = trainer.scored(examples[place], completions, step, epoch, outcomes)
        missing = [place for place in share if place not in known]

        def sample(poll: Callable[[], None], phase: Phase) -> None:
            def keep(i: int, group: Group) -> None:
                batch.groups[missing[i]] = group

            trainer.sample([examples[place] for place in missing], step, epoch, keep, poll, phase)

        if self._thread is not None:
            batch.sampled = self._thread.submit(
                sample, self._check_may_go_on, Phase("rollout")
            )  # what is shown is training
        else:
            with trainer.weights_to_sample():
                phase = trainer.begin_phase("rollout", len(missing), "prompts")
                trainer.ranks.together(lambda: sample(trainer.poll, phase))
            batch.sampled.set_result(None)
        self._batches.append(
            batch
        )  # sampled in this process it is whole, so that a resumed run makes it by the same numbers
        self._begun = step

    def wait_until_idle(self) -> None:
        """Until nothing is sampled, on all ranks: only then may the engine get other weights or requests."""
        if self._thread is not None:
            self.trainer.ranks.together(lambda: [self._wait(batch.sampled) for batch in self._batches])

    def _wait(self, future: Future[None]) -> None:
        while True:
            self.trainer.poll()
            try:
                return future.result(_POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    raise

    def _check_may_go_on(self) -> None:
        """Polled by the thread; signals are the main thread's."""
        if self._stopping.is_set():
            raise Interrupted("SIGTERM")

    def close(self) -> None:
        """Ends what is sampled; nothing of it is waited for."""
        self._stopping.set()
        if self._thread is not None and self._abort is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            while not all(batch.sampled.done() for batch in self._batches):
                self._abort()
                time.sleep(_POLL_SECONDS)

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> list[dict[str, Any]]:
        """Returns what is sampled and not yet trained, JSON-able. Every rank calls it, and gets that of all."""
        current = self.trainer.current_step

        def own() -> dict[int, Known]:
            begun = [batch for batch in self._batches if batch.step > current]
            return {
                batch.step: {place: (g.completions, _done(g.outcomes)) for place, g in list(batch.groups.items())}
                for batch in begun
            }

        found: dict[int, Known] = {step: dict(known) for step, known in self._saved.items()}
        for part in self.trainer.ranks.gather(own):
            for step, groups in part.items():
                found.setdefault(step, {}).update(groups)
        return [_record(step, groups) for step, groups in sorted(found.items()) if groups]


def _done(outcomes: Future[list[RewardOutcome]]) -> list[RewardOutcome] | None:
    """The rewards, None where they are still under way or failed: a resumed run scores such completions anew."""
    return outcomes.result() if outcomes.done() and outcomes.exception() is None else None


def _record(step: int, groups: Known) -> dict[str, Any]:
    written = [
        {
            "place": place,
            "completions": [dataclasses.asdict(completion) for completion in completions],
            "outcomes": None if outcomes is None else [dataclasses.asdict(outcome) for outcome in outcomes],
        }
        for place, (completions, outcomes) in sorted(groups.items())
    ]
    return {"step": step, "groups": written}


def _read(record: dict[str, Any]) -> Known:
    found: Known = {}
    for group in record["groups"]:
        outcomes = group["outcomes"]
        found[group["place"]] = (
            [Completion(**completion) for completion in group["completions"]],
            None if outcomes is None else [RewardOutcome(**outcome) for outcome in outcomes],
        )
    return found
