"""The memory of a run before anything of it is loaded: parameters, gradients, optimizer, activations, logits and caches, by phase.

Weights and what belongs to them are counted. Activations are not guessed from a formula: the training pass itself runs on
PyTorch's meta device (`nemo_rl.model.activations`). So a configuration is enough: no weights, no GPU.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nemo_rl.job.spec import Algorithm, GRPOSpec, RLTrainingJobSpec, TrainingSpec
from nemo_rl.model import logprobs
from nemo_rl.model.activations import causal_of, layers_of, measure_pass, meta_model
from nemo_rl.model.packing import TokenSequence, plan_microbatches
from nemo_rl.model.sharding import blocks_of

GIB = 2**30
SHARE = 0.92
"""Of a GPU's memory, what tensors may take: the rest is for the CUDA context, NCCL and what the allocator cannot use."""
RESERVED = int(0.75 * GIB)
BUDGETS = (16384, 8192, 4096, 2048, 1024)
"""Tokens of a micro-batch that are tried where the specification names none; the first is the default on a GPU."""
PHASES = ("load", "rollout", "training", "optimizer", "save")
PROMPT_SHARE = 0.25
"""Of the longest sequence, what is taken to be its prompt where completions are not bounded by themselves."""


# --- the estimate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Where:
    """What a run trains on: `ranks` processes, each with a device of `device_bytes` (None: not known), cuda or cpu."""

    ranks: int = 1
    device_bytes: int | None = None
    device: str = "cuda"

    @property
    def usable(self) -> int | None:
        """What tensors of one rank may take."""
        return None if self.device_bytes is None else int(self.device_bytes * SHARE) - RESERVED


@dataclass(frozen=True)
class Facts:
    """What the modules of a model say; numbers of parameters, not bytes."""

    parameters: int
    trained: int
    largest_block: int
    """The largest layer, which is made whole by itself."""
    outside: int
    """Parameters outside of them (the output layer, norms), which are whole within a pass."""
    outside_trained: int
    largest_part: int
    """The largest part that is made whole by itself, embedding included."""
    largest: int
    """The largest tensor."""
    cache_numbers: int
    """Numbers that one token leaves in the cache of a rollout."""

    @property
    def frozen(self) -> int:
        return self.parameters - self.trained


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank: parts of each phase by name, and the choices that they are for."""

    where: Where
    facts: Facts
    tokens_per_microbatch: int
    activation_checkpointing: bool
    phases: dict[str, dict[str, int]]
    rows_at_once: int | None = None
    """Completions that are decoded together in the memory that rollouts have."""
    chosen: tuple[str, ...] = field(default=())
    """Settings that the estimate has chosen."""

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def fits(self) -> bool:
        """Whether there is room for it, and some to spare."""
        return self.where.usable is None or self.peak <= self.where.usable

    @property
    def is_impossible(self) -> bool:
        """Whether it needs more than there is, whatever is to spare."""
        return self.where.device_bytes is not None and self.peak > self.where.device_bytes - RESERVED

    def table(self) -> str:
        """The parts of each phase in GiB, a line for each part."""
        names = list(dict.fromkeys(name for parts in self.phases.values() for name, size in parts.items() if size))
        width = max(len(name) for name in [*names, "sum"])
        lines = [" " * width + "".join(f"{phase:>11}" for phase in self.phases)]
        for name in names:
            cells = [f"{parts[name] / GIB:>11.2f}" if parts.get(name) else " " * 11 for parts in self.phases.values()]
            lines.append(f"{name:<{width}}" + "".join(cells).rstrip())
        sums = "".join(f"{sum(parts.values()) / GIB:>11.2f}" for parts in self.phases.values())
        return "\n".join([*lines, f"{'sum':<{width}}" + sums])

    def sentence(self) -> str:
        """What it says in one line."""
        of = f" of {self.where.device_bytes / GIB:.0f}" if self.where.device_bytes else ""
        settings = (
            f"tokens_per_microbatch {self.tokens_per_microbatch:,}, activation checkpointing "
            f"{'on' if self.activation_checkpointing else 'off'}"
        )
        chosen = " (chosen)" if self.chosen else ""
        return f"memory: about {self.peak / GIB:.1f}{of} GiB on each rank, most in the phase {self.peak_phase}; {settings}{chosen}"

    def as_json(self) -> str:
        """The same for programs; bytes."""
        return json.dumps(
            {
                "ranks": self.where.ranks,
                "deviceBytes": self.where.device_bytes,
                "fits": self.fits if self.where.device_bytes else None,
                "peakBytes": self.peak,
                "peakPhase": self.peak_phase,
                "tokensPerMicrobatch": self.tokens_per_microbatch,
                "activationCheckpointing": self.activation_checkpointing,
                "chosen": list(self.chosen),
                "rowsAtOnce": self.rows_at_once,
                "phases": self.phases,
            }
        )


class DoesNotFit(ValueError):
    """A run that the estimate says cannot fit; the message names the cheapest change that would. `least`: what it takes."""

    def __init__(self, message: str, least: Estimate) -> None:
        super().__init__(message)
        self.least = least


class Planner:
    """Estimates runs of one model, given by its transformers configuration. Passes are measured once for each setting."""

    def __init__(self, config: Any, spec: RLTrainingJobSpec) -> None:
        self.config, self.spec = config, spec
        self._growth: dict[tuple[Any, ...], int] = {}
        self._models: dict[int | None, Any] = {}
        self._known_cures: dict[Where, list[str]] = {}
        self.by_formula = False
        """Whether activations could not be measured, so that a formula stands for them."""

    # ------------------------------------------------------------------ choices

    def choose(self, where: Where) -> Estimate:
        """Returns the estimate with the settings that the specification leaves open, chosen for speed among those that fit.

        Raises DoesNotFit if none does.
        """
        tried = []
        for settings in self._settings(where):
            tried.append(self.estimate(where, *settings))
            if tried[-1].fits:
                break
        fitting = tried[-1]
        if not fitting.fits:
            fitting = min(tried, key=lambda found: found.peak)
            if fitting.is_impossible:
                raise DoesNotFit(self._refusal(fitting), fitting)
        training = self.spec.training
        given = (training.tokens_per_microbatch is not None, training.activation_checkpointing is not None)
        names = ("tokens_per_microbatch", "activation_checkpointing")
        return replace(fitting, chosen=tuple(n for n, is_given in zip(names, given, strict=True) if not is_given))

    def _settings(self, where: Where) -> Iterator[tuple[int, bool]]:
        """Micro-batches and checkpointing to try, the fastest first: a pass of 4096 tokens is about as fast as a larger one,
        checkpointing costs about a quarter."""
        training = self.spec.training
        if where.device != "cuda":
            from nemo_rl.trainers.passes import TOKENS_PER_MICROBATCH_CPU

            yield training.tokens_per_microbatch or TOKENS_PER_MICROBATCH_CPU, bool(training.activation_checkpointing)
            return
        budgets = [training.tokens_per_microbatch] if training.tokens_per_microbatch else list(BUDGETS)
        given = training.activation_checkpointing
        for recompute in (False, True) if given is None else (given,):
            for budget in budgets:
                if recompute or given is not None or budget >= min(4096, budgets[0]):
                    yield budget, recompute

    def _refusal(self, least: Estimate) -> str:
        where = least.where
        assert where.device_bytes is not None
        cures = self.cures(where)
        parts = least.phases[least.peak_phase]
        largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
        even = ""
        if least.activation_checkpointing:
            even = f", even with activation checkpointing and micro-batches of {least.tokens_per_microbatch:,} tokens"
        cure = f"{cures[0]} would fit" if cures else "nothing that nemo-rl can change would fit; take a smaller model"
        return (
            f"found {where.ranks} × {where.device_bytes / GIB:.0f} GiB, but this run needs about {least.peak / GIB:.1f} GiB on "
            f"each rank in the phase {least.peak_phase} ({said} GiB){even}; {cure}"
        )

    def cures(self, where: Where) -> list[str]:
        """Changes each of which would make the run fit, the cheapest first."""
        if where not in self._known_cures:
            self._known_cures[where] = self._cures(where)
        return self._known_cures[where]

    def _cures(self, where: Where) -> list[str]:
        found = []
        training = self.spec.training
        if training.activation_checkpointing is False or training.tokens_per_microbatch is not None:
            free = training.model_copy(update={"activation_checkpointing": None, "tokens_per_microbatch": None})
            if chosen := self._fits(where, free):
                found.append(
                    f"activation_checkpointing={chosen.activation_checkpointing} with "
                    f"tokens_per_microbatch={chosen.tokens_per_microbatch}"
                )
        open_ended = training.model_copy(update={"activation_checkpointing": None, "tokens_per_microbatch": None})
        length = training.max_sequence_length // 2
        while length >= 512:
            if self._fits(where, open_ended.model_copy(update={"max_sequence_length": length})):
                found.append(f"max_sequence_length={length}")
                break
            length //= 2
        if training.lora_rank is None and self._fits(where, open_ended.model_copy(update={"lora_rank": 16})):
            found.append("lora_rank=16 (adapters in place of all weights)")
        for ranks in (2 * where.ranks, 4 * where.ranks, 8 * where.ranks, 16 * where.ranks):
            if self._fits(replace(where, ranks=ranks), open_ended):
                found.append(f"{ranks} such GPUs")
                break
        return found

    def _fits(self, where: Where, training: TrainingSpec) -> Estimate | None:
        """Returns the estimate of a run with these settings and the least memory, if it fits."""
        other = Planner(self.config, self.spec.model_copy(update={"training": training}))
        if training.lora_rank == self.spec.training.lora_rank:
            other._growth, other._models = self._growth, self._models
        leanest_last = list(other._settings(where))
        found = other.estimate(where, *leanest_last[-1])
        return found if found.fits else None

    # ------------------------------------------------------------------ the estimate

    def estimate(self, where: Where, tokens_per_microbatch: int, activation_checkpointing: bool) -> Estimate:
        """Returns what each phase takes with these settings."""
        training = self.spec.training
        grpo = self.spec.settings if isinstance(self.spec.settings, GRPOSpec) else None
        facts = self.facts
        compute = self.compute_bytes(where)
        sharded = self.is_sharded(where)
        share = where.ranks if sharded else 1
        # frozen weights of shards lie in the dtype of the passes; those of a whole model are fp32 like the others
        frozen_bytes = compute if sharded else 4
        # adapters are whole on each rank: they are small
        trained_share = 1 if training.lora_rank is not None else share
        weights = 4 * facts.trained // trained_share + frozen_bytes * facts.frozen // share
        optimizer = 8 * facts.trained // trained_share
        gradients = 4 * facts.trained // trained_share
        reference = 0
        if grpo is not None and grpo.beta > 0 and training.lora_rank is None:
            reference = frozen_bytes * facts.parameters // share
        tokens, slots_peak = self.activations(where, tokens_per_microbatch, activation_checkpointing)
        phases: dict[str, dict[str, int]] = {
            "load": {"weights": weights, "block being read": 4 * facts.largest_block if sharded else 0},
        }
        standing = {"weights": weights, "optimizer": optimizer, "reference": reference}
        rows = None
        if grpo is not None:
            copy = compute * facts.parameters if sharded or compute < 4 else 0
            rows, cache = self._cache(where, grpo, sum(standing.values()) + copy)
            phases["rollout"] = {**standing, "weights for rollouts": copy, "cache": cache}
            if training.cast_lm_head_to_fp32 and sharded and compute < 4:  # whole weights are float32 anyhow
                head = causal_of(self._whole).get_output_embeddings()
                phases["rollout"]["output layer in float32"] = 4 * head.weight.numel()
        passes: dict[str, int] = {"gradients": gradients, "activations and logits": slots_peak}
        if sharded:
            passes["blocks made whole"] = compute * (2 * facts.largest_block + facts.outside)
            reducing = compute + (4 if compute < 4 else compute)
            trained_block = facts.largest_block if training.lora_rank is None else 0
            passes["gradients on their way"] = reducing * trained_block  # those outside of blocks are in the pass
        elif compute < 4:
            passes["weights cast"] = compute * facts.parameters
        ends = {"gradients": gradients, "embedding made whole": self._embedding(where, compute) if sharded else 0}
        # a pass holds most in its middle, or, with few tokens, where it begins and ends
        phases["training"] = {**standing, **max(passes, ends, key=lambda parts: sum(parts.values()))}
        phases["optimizer"] = {**standing, "gradients": gradients}
        phases["save"] = {**standing, "tensor being written": 4 * facts.largest if sharded else 0}
        return Estimate(where, facts, tokens, activation_checkpointing, phases, rows)

    def _embedding(self, where: Where, compute: int) -> int:
        """What a sharded pass holds where it begins, or ends, with the embedding or what else is larger than a layer: the shards
        of others as they arrive and the weight, or its gradient, the copy that is sent and the sum of this rank's part."""
        facts = self.facts
        begin = compute * (facts.outside + 2 * facts.largest_part)
        if not facts.outside_trained:
            return begin
        sent = 4 if compute < 4 else compute
        sums = facts.largest_part * (compute + sent) + 4 * facts.largest_part // where.ranks
        return max(begin, compute * (facts.outside + facts.outside_trained) + sums)

    def is_sharded(self, where: Where) -> bool:
        """Whether the ranks share the weights."""
        return where.ranks > 1 and self.spec.training.sharding != "none"

    def compute_bytes(self, where: Where) -> int:
        """Bytes of a number in the passes."""
        precision = self.spec.training.precision
        return 2 if precision == "bf16" or (precision == "auto" and where.device == "cuda") else 4

    @functools.cached_property
    def facts(self) -> Facts:
        model = self._whole
        apart = blocks_of(causal_of(model))  # the layers, and the embedding where it is not the output layer too
        inside = {id(p) for block in apart for p in block.parameters()}
        blocks = layers_of(model) or apart
        parameters = list(model.parameters())
        outside = [p for p in parameters if id(p) not in inside]
        return Facts(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            largest_block=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
            outside=sum(p.numel() for p in outside),
            outside_trained=sum(p.numel() for p in outside if p.requires_grad),
            largest_part=max((sum(p.numel() for p in part.parameters()) for part in (*apart, *blocks)), default=0),
            largest=max(p.numel() for p in parameters),
            cache_numbers=_cache_numbers(self.config),
        )

    @property
    def _whole(self) -> Any:
        if None not in self._models:
            self._models[None] = meta_model(self.config, self.spec.training)
        return self._models[None]

    def sequences(self, budget: int) -> list[TokenSequence]:
        """The largest micro-batch of the longest sequences of the run."""
        training, settings = self.spec.training, self.spec.settings
        algorithm: Algorithm = self.spec.algorithm
        longest = max(2, training.max_sequence_length)
        if algorithm == "grpo":
            assert isinstance(settings, GRPOSpec)
            new = min(settings.max_new_tokens, longest - 1)
            prompt = longest - new
            group = settings.num_generations_per_prompt
            wanted = max(1, -(-budget // max(group * new + prompt, 1)))
            found = [
                TokenSequence(range(longest), prompt, group=g, shared=prompt)
                for g in range(wanted)
                for _ in range(group)
            ]
        elif algorithm == "dpo":
            prompt = max(1, int(longest * PROMPT_SHARE))
            pairs = max(1, -(-budget // (2 * longest - prompt)))
            found = [
                TokenSequence(range(longest), prompt, group=p, shared=prompt) for p in range(pairs) for _ in range(2)
            ]
        else:
            found = [TokenSequence(range(longest), 1) for _ in range(max(1, budget // longest))]
        plan = plan_microbatches(found, budget, split_groups=algorithm != "dpo")
        return [found[i] for i in max(plan, key=lambda part: sum(len(found[i].ids) for i in part))]

    def activations(self, where: Where, budget: int, recompute: bool) -> tuple[int, int]:
        """Returns the budget, and the bytes that the training pass of its largest micro-batch holds at its peak beside
        weights and gradients."""
        sequences = self.sequences(budget)
        lengths = tuple((len(s.ids), s.first_target, s.group) for s in sequences)
        wide = torch.float32 if self.spec.training.cast_lm_head_to_fp32 else None
        key = (where.device, self.compute_bytes(where), self.is_sharded(where), recompute, wide, lengths)
        if key not in self._growth:
            dtype = torch.bfloat16 if self.compute_bytes(where) == 2 else torch.float32

            def peak_of(layers: int | None) -> int:
                model = self._whole if layers is None else self._shorter(layers)
                return measure_pass(model, sequences, dtype, recompute, where.device, self.is_sharded(where), wide)

            try:
                if self._period is None:
                    self._growth[key] = peak_of(None)
                else:
                    # what layers keep grows by the same for each of them, so few layers tell of many
                    few, more = (2, 3) if self._period == 1 else (self._period, 2 * self._period)
                    first, second = peak_of(few), peak_of(more)
                    self._growth[key] = first + (second - first) * (self._num_layers - few) // (more - few)
            except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError):
                # the family looks at numbers on its way, such as how many tokens an expert gets
                self._growth[key] = self._by_formula(where, sequences, recompute)
                self.by_formula = True
        return budget, self._growth[key]

    @property
    def _num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @functools.cached_property
    def _period(self) -> int | None:
        """After how many layers their kinds repeat; None where the whole model has to be measured."""
        text = self.config.get_text_config()
        blocks = [sum(p.numel() for p in block.parameters()) for block in layers_of(self._whole)]
        kinds = list(getattr(text, "layer_types", None) or [""] * len(blocks))
        if len(blocks) != getattr(text, "num_hidden_layers", None) or len(kinds) != len(blocks):
            return None
        both = list(zip(kinds, blocks, strict=True))
        for period in range(1, len(both) // 3):
            if all(both[i] == both[i % period] for i in range(len(both))):
                return period
        return None

    def _shorter(self, layers: int) -> Any:
        if layers in self._models:
            return self._models[layers]
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        text.num_hidden_layers = layers
        self._models[layers] = meta_model(config, self.spec.training)
        return self._models[layers]

    def _by_formula(self, where: Where, sequences: list[TokenSequence], recompute: bool) -> int:
        """What a decoder's layer keeps of a token: its inputs, queries, keys, values and the products of its MLP."""
        text = self.config.get_text_config()
        tokens, width, size = sum(len(s.ids) for s in sequences), int(text.hidden_size), self.compute_bytes(where)
        inner = int(
            getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * width
        )
        inner *= int(getattr(text, "num_experts_per_tok", None) or 1)
        layer = tokens * size * (10 * width + 4 * inner)
        kept = self._num_layers * (tokens * size * width if recompute else layer)
        elements = logprobs.CHUNK_ELEMENTS_CUDA if where.device == "cuda" else logprobs.CHUNK_ELEMENTS_CPU
        head = int(text.vocab_size) * width
        cast = 4 * head if self.spec.training.cast_lm_head_to_fp32 and self.is_sharded(where) and size < 4 else 0
        return kept + layer + 12 * min(elements, tokens * int(text.vocab_size)) + 6 * head + cast

    def _cache(self, where: Where, grpo: GRPOSpec, taken: int) -> tuple[int, int]:
        """Returns the rows decoded together, and the bytes of their cache: the share of a rank, or what there is room for."""
        per_row = self.facts.cache_numbers * self.compute_bytes(where) * self.spec.training.max_sequence_length
        rows = -(-self.spec.training.batch_size * grpo.num_generations_per_prompt // where.ranks)
        least = min(rows, grpo.num_generations_per_prompt)
        if where.usable is not None and where.device == "cuda":
            rows = max(least, min(rows, (where.usable - taken) // max(per_row, 1)))
        return rows, rows * per_row


def load_config(name: str, trust_remote_code: bool = False, local_only: bool = False) -> Any:
    """Returns the configuration of a model's folder or name on the hub. ValueError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=local_only)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"found no configuration of the model {name!r} ({str(error).strip().splitlines()[0]}); expected a folder with "
            "config.json, or the name of a model on the hub that this machine can reach"
        ) from error


def _cache_numbers(config: Any) -> int:
    """Numbers that one token leaves in the caches of all layers."""
    text = config.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", 1))
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
    most = max(heads) if isinstance(heads, list | tuple) else heads
    return 2 * layers * int(most or 1) * int(width)
