"""A trained model that is asked as it was trained: the same chat template, end tokens and decode loop as in rollouts."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nemo_rl.data.chat import encode_prompts
from nemo_rl.data.clock import set_clock
from nemo_rl.data.rows import Message, PromptRow
from nemo_rl.data.templates import Template, end_tokens_of
from nemo_rl.errors import DatasetError
from nemo_rl.job.spec import GRPOSpec, TrainingSpec
from nemo_rl.model.ends import teach_ends
from nemo_rl.model.limits import position_limit
from nemo_rl.model.load import choose_device, limit_threads, load_model, load_tokenizer
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.engine import end_tokens, generate
from nemo_rl.rollout.protocol import Completion, Sampling
from nemo_rl.rollout.responses import Decoder
from nemo_rl.rollout.stops import Stops
from nemo_rl.run.card import read_record
from nemo_rl.run.identity import refuse_adapter

Prompt = str | Sequence[Mapping[str, Any]]


class TextGenerator:
    """A model of a folder or a hub name, ready to answer. A checkpoint's own record says how its prompts are written.

    Attributes: tokenizer; record, what the checkpoint says about itself ({} for other models); device.
    """

    def __init__(self, model: str, *, trust_remote_code: bool = False, tokenizer: Any = None) -> None:
        """Loads it in float32, onto the GPU where there is one. Raises ValueError for what is no causal language model."""
        refuse_adapter(model)
        self.name = model
        self.record = read_record(model)
        self.device = choose_device()
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model, trust_remote_code)
        self.template_arguments: dict[str, Any] = self.record.get("chat_template_kwargs", {})
        self.training = TrainingSpec(
            trust_remote_code=trust_remote_code, chat_template_kwargs=self.template_arguments, **self._lengths()
        )
        sampling = self.record.get("sampling") or {}
        self.defaults = GRPOSpec(**{name: value for name, value in sampling.items() if value is not None})
        self.stops = Stops(self.tokenizer, self.defaults.stop)
        stop_ids = [*self.defaults.stop_token_ids, *self.stops.tokens]
        loaded: Any = load_model(model, self.training, self.device)
        own = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        turn = end_tokens_of(self.tokenizer, self.template_arguments)
        teach_ends(loaded, [*own, *turn, *stop_ids])
        limit_threads(getattr(loaded.config.get_text_config(), "hidden_size", 1024))
        loaded.requires_grad_(False)
        self.policy = Policy(loaded)
        self.end_ids = end_tokens(self.policy.causal, self.tokenizer)
        self.decoded = Decoder(self.tokenizer, self.end_ids, stop_ids)
        """Completions of one prompt as text, as rewards saw them in training."""

    def _lengths(self) -> dict[str, int]:
        longest = self.record.get("settings", {}).get("max_sequence_length")
        return {"max_sequence_length": longest} if isinstance(longest, int) else {}

    @property
    def has_template(self) -> bool:
        """Whether conversations can be told from bare text."""
        return bool(self.tokenizer.chat_template)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The token ids of prompts, each a text or a conversation, up to where the answer begins. Raises DatasetError."""
        set_clock(self.tokenizer, datetime.datetime.now().astimezone())
        rows = [_row(prompt) for prompt in prompts]
        return encode_prompts(self.tokenizer, rows, Template(self.tokenizer, self.template_arguments))

    def sampling(
        self,
        num_samples: int = 1,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Sampling:
        """How to draw; what is None is as in training. A temperature of 0 takes the likeliest token each time.

        Raises ValueError for a number that is out of range.
        """
        given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        greedy = temperature == 0
        wanted = {name: value for name, value in given.items() if value is not None and not (greedy and value == 0)}
        chosen = GRPOSpec.model_validate(self.defaults.model_dump(exclude_none=True) | wanted)
        return Sampling(
            num_samples,
            chosen.max_new_tokens,
            chosen.temperature,
            chosen.top_k,
            chosen.top_p,
            greedy=greedy,
            stops=self.stops,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seed: int = 0,
        on_tokens: Callable[[Tensor, int], None] | None = None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """The completions of prompts (token ids). Raises ValueError where a model's table of positions is too short."""
        limit = position_limit(self.policy.causal)
        longest = max(map(len, prompts), default=0)
        if limit is not None and longest + sampling.max_new_tokens > limit:
            raise ValueError(
                f"found a prompt of {longest} tokens and max_new_tokens {sampling.max_new_tokens}, but the model has positions "
                f"for {limit}; give a shorter prompt, or max_new_tokens of at most {max(1, limit - longest)}"
            )
        return generate(
            self.policy,
            [list(prompt) for prompt in prompts],
            sampling,
            end_ids=self.end_ids,
            seed=seed,
            step=0,
            on_tokens=on_tokens,
            on_group=on_group,
        )

    def texts(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int = 0) -> list[str]:
        """One answer to each prompt."""
        encoded = self.encode(prompts)
        groups = self.generate(encoded, sampling, seed=seed)
        return [self.decoded(ids, [group[0].ids]).texts[0] for ids, group in zip(encoded, groups, strict=True)]

    def stream(
        self, prompt: Prompt, sampling: Sampling, write: Callable[[str], None], *, seed: int = 0
    ) -> tuple[str, bool]:
        """Answers one prompt, and gives each part of the text to `write` as it comes. Returns the text, and whether it ended."""
        (ids,) = self.encode([prompt])
        written, seen = "", []

        def on_tokens(tokens: Tensor, live: int) -> None:
            nonlocal written
            seen.append(int(tokens[0]))
            text = self.decoded(ids, [seen]).texts[0]
            # a character of several tokens is shown when it is whole
            if text.startswith(written) and not text.endswith("\ufffd"):
                write(text[len(written) :])
                written = text

        ((completion,),) = self.generate([ids], sampling, seed=seed, on_tokens=on_tokens)
        text = self.decoded(ids, [completion.ids]).texts[0]
        write(text[len(written) :] if text.startswith(written) else "")
        return text, completion.finished


def _row(prompt: Prompt) -> PromptRow:
    if isinstance(prompt, str):
        return PromptRow(prompt)
    alike = isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)
    messages: list[Message] = [dict(message) for message in prompt] if alike else []
    if not messages or not all("role" in m and "content" in m for m in messages):
        raise DatasetError(
            f"found {prompt!r:.80} as a prompt; expected a text, or a conversation such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    last = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    return PromptRow(str(last), messages)
