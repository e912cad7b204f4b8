"""The engine that needs nothing else: prompts in, groups of completions with log-probabilities out, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.decode import DecodeState, decode
from nemo_rl.rollout.in_process.proof import prove_rollouts
from nemo_rl.rollout.in_process.ways import new_state
from nemo_rl.rollout.protocol import Completion, Request, Sampling


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Returns every token that ends a completion: those of the generation config (a list for many models) and of the
    tokenizer. Raises ValueError if there is none."""
    found: list[int] = []
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None and token not in found:
                found.append(int(token))
    if not found:
        raise ValueError(
            "found no end-of-sequence token in the model's generation_config, its config or the tokenizer; expected at "
            "least one, so that completions can end: set tokenizer.eos_token or generation_config.eos_token_id"
        )
    return found


def make_state(policy: Policy) -> DecodeState:
    """Returns the decode state of the fastest way that was proved to be right for the model, once, at the first call."""
    prove_rollouts(policy)
    return new_state(policy)


def generate(policy: Policy, prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[list[Completion]]:
    """Returns `num_samples` completions of each prompt (token ids), decoded in the fastest right way; options of `decode`."""
    if not prompts:  # more ranks than prompts
        return []
    return decode(policy, make_state(policy), prompts, sampling, **options)


class InProcess:
    """The engine that needs nothing else: this process samples with the very weights that it trains."""

    def __init__(self, end_ids: list[int]) -> None:
        self.end_ids = end_ids
        self.policy: Policy
        self.version = 0

    def rest(self) -> None:
        pass

    def update(self, policy: Policy, version: int) -> dict[str, float]:
        self.policy, self.version = policy, version
        return {}

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
        count = None if on_tokens is None else lambda tokens, live: on_tokens(live)
        return generate(
            self.policy,
            [request.ids for request in requests],
            sampling,
            end_ids=self.end_ids,
            seed=seed,
            step=step,
            keys=[request.key for request in requests],
            poll=poll,
            on_group=on_group,
            on_tokens=count,
            version=self.version,
        )

    def close(self) -> None:
        pass
