"""What a trainer asks of whatever samples its completions, and gets: of its own decode loop and of vLLM servers alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_rl.rollout.stops import Stops


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: `num_samples` for each prompt; greedy takes the likeliest token instead of drawing.
    `stops`: texts that end a completion, beside the end tokens.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    greedy: bool = False
    stops: Stops | None = None


@dataclass(frozen=True)
class Request:
    """A prompt as token ids. `key` is its number in the data: with the run's seed and the step it decides what is drawn."""

    ids: list[int]
    key: int


@dataclass(frozen=True)
class Completion:
    """The tokens of one completion with the log-probability of each; `finished` if it ended with an end token.

    The log-probabilities are in nats, of the whole temperature-scaled distribution that the token was drawn from. `version`
    is that of the weights: the number of optimizer steps behind them.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool
    version: int = 0


class RolloutEngine(Protocol):
    """Samples completions with the weights that `update` gave it last."""

    def update(self, policy: Any, version: int) -> dict[str, float]:
        """Takes the policy's weights, and returns what it measured, as metrics. Every rank calls it; cheap where nothing changed.

        Raises WeightSyncMismatch where what samples has other weights than what trains.
        """
        ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        poll: Callable[[], None] = lambda: None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Returns `num_samples` completions of each request. `poll` is called often and may raise to stop; `on_group(i,
        completions)` is called as soon as all completions of request i are done, once for each, and `on_tokens` with the
        number of tokens that were sampled since, for people to see; engines may call it late."""
        ...

    def rest(self) -> None:
        """Gives memory of the GPU back to training where it can, until the next `update`. Every rank calls it."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds: processes, ports, files."""
        ...
