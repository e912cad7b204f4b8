"""`Policy`: the one place where a model turns token sequences into log-probabilities."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from nemo_rl.model.attention import Flat, PackedAttention
from nemo_rl.model.head import Fp32Head, Head, cast_to_fp32, measure_head, undo_cast
from nemo_rl.model.kinds import describe
from nemo_rl.model.load import compute_dtype
from nemo_rl.model.logprobs import token_logprobs
from nemo_rl.model.norms import make_norms_lean
from nemo_rl.model.packing import PackedBatch
from nemo_rl.model.probe import SHORT, Probe, exact, reset_positions
from nemo_rl.model.proof import check_causal, choose_path, length_limit

if TYPE_CHECKING:
    from nemo_rl.model.sharding import ShardedModel

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Way:
    """How a batch goes through transformers' modules. `layout`: "packed", flat tokens in one row with our attention, a shared
    prompt once; "apart", the same with each sequence whole and its boundaries told to layers that take them; "padded" to views;
    "alone", one sequence a row. `logits`: the model's own logits of the trained tokens, not its last hidden states through the
    chunked head."""

    layout: str
    logits: bool = False


PATHS = {
    "packed": Way("packed"),
    "packed, logits": Way("packed", logits=True),
    "packed, prompts apart": Way("apart"),
    "packed, prompts apart, logits": Way("apart", logits=True),
    "hidden": Way("padded"),
    "logits": Way("padded", logits=True),
    "hidden, one by one": Way("alone"),
    "logits, one by one": Way("alone", logits=True),
}
"""Ways to log-probabilities, from fast to slow."""


@dataclass(frozen=True)
class _Call:
    """One forward of a batch. `select`: where in the flattened output the trained tokens are predicted; `where`: which of the
    batch's trained tokens those are, None for all in order."""

    inputs: dict[str, Any]
    select: Tensor
    where: Tensor | None = None


class Policy:
    """A causal language model with the fastest right way to its log-probabilities.

    PATHS are tried in order and compared with the plain model, log-probabilities and gradients (`nemo_rl.model.proof`). The
    model is only ever called as a whole, and its output layer's weights are read within that call, so that its modules may be
    sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str = "auto",
        recompute: bool = False,
        longest: int | None = None,
        sharded: ShardedModel | None = None,
        cast_lm_head_to_fp32: bool = False,
    ) -> None:
        """`recompute`: make activations again in the backward pass. `longest`: tokens of the longest sequence of the run.
        `sharded`: the model's shards, where ranks share its weights; then every call here is collective.
        `cast_lm_head_to_fp32`: logits in float32, also where the rest is not.

        Raises ValueError for a model that is not a causal language model, or that no way computes right.
        """
        self.model, self.sharded = model, sharded
        self.recompute = recompute
        self.device = next(model.parameters()).device
        self.dtype = compute_dtype(precision, self.device)
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        make_norms_lean(self.causal)
        if cast_lm_head_to_fp32:
            cast_to_fp32(self.causal)
        else:
            undo_cast(self.causal)
        self.head_facts: Head | None = None
        self.rollout: Any = None
        """What `nemo_rl.rollout.in_process.proof` found out about decoding."""
        self._recomputing: list[nn.Module] = []
        self.attention: PackedAttention | None = None
        with suppress(ValueError):
            self.attention = PackedAttention(self.causal)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.causal.forward).parameters
        self.probe = Probe(self.causal, longest)
        self.path = self._choose_path()
        log.debug("log-probabilities of %s: %s", describe(self.causal), self.path)

    @property
    def head(self) -> nn.Module:
        return self.causal.get_output_embeddings()

    @property
    def logit_scale(self) -> float:
        return self.head_facts.scale if self.head_facts is not None else 1.0

    @property
    def softcap(self) -> float | None:
        return self.head_facts.cap if self.head_facts is not None else None

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def logprobs(self, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
        """Returns the log-probability of each trained token, (S,), float32, differentiable where gradients are on."""
        return self.by_path(batch, temperature, self.path)

    @property
    def layout(self) -> str:
        """How batches go through the model; `nemo_rl.model.packing.plan_microbatches` counts by it."""
        return PATHS[self.path].layout

    def by_path(self, batch: PackedBatch, temperature: float, path: str) -> Tensor:
        """Returns the log-probability of each trained token, (S,), by one of the ways."""
        return self.run(lambda: self._by_path(batch, temperature, path))

    def run(self, work: Callable[[], T]) -> T:
        """Returns what `work` returns, which calls the model or reads its weights; through it a sharded one has them."""
        return work() if self.sharded is None else self.sharded.run(work)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it a sharded model is whole on each rank, for forward passes without gradient."""
        with self.sharded.gathered() if self.sharded is not None else nullcontext():
            yield

    def worst(self, values: Tensor) -> Tensor:
        """Returns the largest of each value over the ranks of a sharded model, so that all of them decide the same."""
        return values if self.sharded is None else self.sharded.largest(values)

    def norm(self, vector: Tensor) -> Tensor:
        """Returns the norm of a vector, of which each rank of a sharded model has a part."""
        return vector.norm() if self.sharded is None else self.sharded.norm(vector)

    @property
    def one_by_one(self) -> bool:
        """Whether each sequence is a forward pass of its own."""
        return self.layout == "alone"

    def _by_path(self, batch: PackedBatch, temperature: float, path: str) -> Tensor:
        way = PATHS[path]
        self.set_recomputing(True)
        calls = {"packed": self._packed, "apart": self._apart, "padded": self._padded, "alone": self._alone}
        found, places = [], []
        for call in calls[way.layout](batch):
            targets = batch.targets_S if call.where is None else batch.targets_S[call.where]
            with self._attending(batch, way.layout), self.autocast():
                compute = self._from_logits if way.logits else self._from_hidden
                found.append(compute(call, targets, temperature))
            if call.where is None:
                return found[0]
            places.append(call.where)
        return torch.cat(found).index_select(0, torch.argsort(torch.cat(places)))

    def _from_hidden(self, call: _Call, targets: Tensor, temperature: float) -> Tensor:
        """Runs the model with log-probabilities of the targets in place of its output layer's logits."""
        head: Any = self.head
        found: list[Tensor] = []

        def logprobs(hidden: Tensor) -> Tensor:
            with torch.autocast(self.device.type, enabled=False):
                dtype = torch.float32 if isinstance(head, Fp32Head) else self.dtype
                selected = hidden.flatten(0, -2).index_select(0, call.select).to(dtype)
                values = token_logprobs(
                    selected,
                    head.weight,
                    targets,
                    temperature=temperature,
                    bias_V=head.bias,
                    logit_scale=self.logit_scale,
                    softcap=self.softcap,
                )
            found.append(values)
            return values.view(1, -1, 1)

        own = vars(head).get("forward")
        head.forward = logprobs
        try:
            self.causal(**call.inputs, use_cache=False)
        finally:
            if own is None:
                del head.forward
            else:
                head.forward = own
        if len(found) != 1:
            raise ValueError(f"the output layer was called {len(found)} times in a forward")
        return found[0]

    def _from_logits(self, call: _Call, targets: Tensor, temperature: float) -> Tensor:
        if self._keeps_logits and call.where is None:
            selected = self.causal(**call.inputs, use_cache=False, logits_to_keep=call.select).logits[0]
        else:
            selected = self.causal(**call.inputs, use_cache=False).logits.flatten(0, 1).index_select(0, call.select)
        scaled = selected.float() / temperature
        return scaled.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    def _attending(self, batch: PackedBatch, layout: str) -> AbstractContextManager[None]:
        """Within it attention knows the layout of flat tokens."""
        if layout not in ("packed", "apart"):
            return nullcontext()
        assert self.attention is not None
        return self.attention.running(Flat(batch if layout == "packed" else batch.apart))

    def set_recomputing(self, on: bool) -> None:
        """Switches transformers' activation checkpointing on or off.

        It works in training mode only, and layers inside such a layer are looked at again in the backward pass: so the mode of
        the layers concerned, and of no others, is set, and stays until rollouts, which need the layers' caches, switch it off.
        """
        for module in self._recomputing:
            module.training = on

    def _packed(self, batch: PackedBatch) -> Iterator[_Call]:
        # a mask of ones: masks are then functions of positions, and layers that look for padding find none
        inputs = {"input_ids": batch.ids_N[None], "position_ids": batch.positions_N[None]}
        yield _Call({**inputs, "attention_mask": torch.ones_like(batch.ids_N)[None]}, batch.select_S)

    def _apart(self, batch: PackedBatch) -> Iterator[_Call]:
        """The packed call, with the boundaries of the sequences under the names that transformers' layers know."""
        ends, longest = batch.boundaries, batch.longest
        lengths = torch.tensor(batch.lengths, device=self.device)
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=self.device)
        boundaries = {
            **{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest},
            "seq_idx": torch.repeat_interleave(numbers, lengths)[None],
        }
        for call in self._packed(batch.apart):
            yield _Call({**call.inputs, **boundaries}, call.select)

    def _padded(self, batch: PackedBatch) -> Iterator[_Call]:
        places, begin = batch.back_N[batch.select_S], 0
        for view in batch.views:
            end = begin + view.rows * view.length
            ids = batch.ids_N[view.gather].view(view.rows, view.length)
            columns = torch.arange(view.length, device=ids.device)
            lengths = torch.tensor(view.lengths, device=ids.device)
            mask = (columns[None] < lengths[:, None]).long()
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": columns[None].expand(view.rows, -1)}
            where = ((places >= begin) & (places < end)).nonzero()[:, 0]
            yield _Call(inputs, places[where] - begin, where)
            begin = end

    def _alone(self, batch: PackedBatch) -> Iterator[_Call]:
        """Each sequence by itself, given nothing but its tokens."""
        places, begin = batch.back_N[batch.select_S], 0
        for view in batch.views:
            rows = batch.ids_N[view.gather].view(view.rows, view.length)
            for ids, length in zip(rows, view.lengths, strict=True):
                where = ((places >= begin) & (places < begin + length)).nonzero()[:, 0]
                reset_positions(self.causal)
                yield _Call({"input_ids": ids[None, :length]}, places[where] - begin, where)
                begin += view.length

    @torch.no_grad()
    def next_logits(self, inputs: dict[str, Any], select: Tensor) -> Tensor:
        """Returns the logits at some places of the one row of a forward, (select, V), float32."""
        if self._keeps_logits:
            return self.causal(**inputs, use_cache=False, logits_to_keep=select).logits[0].float()
        return self.causal(**inputs, use_cache=False).logits[0].index_select(0, select).float()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            yield

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within it all ways compute in float32, as proofs need it."""
        dtype, self.dtype = self.dtype, torch.float32
        try:
            with self.sharded.in_float32() if self.sharded is not None else nullcontext():
                yield
        finally:
            self.dtype = dtype

    # ------------------------------------------------------------------ the proof at the door

    def _choose_path(self) -> str:
        while True:
            try:
                with self.in_float32():
                    return self._proved_path()
            except torch.OutOfMemoryError:
                if self.probe.longest <= SHORT:
                    raise
                self.probe.longest = max(SHORT, self.probe.longest // 2)
                torch.cuda.empty_cache()

    def _proved_path(self) -> str:
        check_causal(self, self.probe)
        with exact(self.causal):
            ids = self.probe.ids(min(12, self.probe.longest), 3)
            self.head_facts = self.run(lambda: measure_head(self.causal, ids))
        paths = [path for path, way in PATHS.items() if self._may_be_right(way)]
        if self.recompute:
            return self._path_with_recomputing(paths)
        try:
            path = choose_path(self, self.probe, paths)
        except ValueError as error:
            limit = length_limit(self, self.probe)
            if limit is not None:
                raise ValueError(
                    f"the log-probabilities of {describe(self.causal)} change with the length of the whole sequence beyond "
                    f"{limit} tokens (its rotary embedding is stretched to each call), so sampling and training would disagree; "
                    f"set max_sequence_length to at most {limit}"
                ) from error
            raise ValueError(
                f"{describe(self.causal)} cannot be trained right: no way to its log-probabilities and gradients agrees with "
                f"the plain model of transformers {transformers_version()} ({error}); use another model or another version"
            ) from error
        if PATHS[path].logits:
            log.warning(
                "this model's logits are more than its output embedding of hidden states; memory grows with the vocabulary"
            )
        return path

    def _may_be_right(self, way: Way) -> bool:
        if way.layout in ("packed", "apart") and self.attention is None:
            return False
        if (
            way.layout == "apart" and self.sharded is not None
        ):  # layers that refuse boundaries would cut off a collective pass
            return False
        if way.layout in ("packed", "apart"):
            return way.logits == (self.head_facts is None)
        return way.logits or self.head_facts is not None

    def _path_with_recomputing(self, paths: list[str]) -> str:
        """The same with activation checkpointing, which not every family gets right. Raises ValueError that names the keyword."""
        try:
            # transformers renames the method during its version 5
            enable = getattr(self.causal, "activation_checkpointing_enable", None)
            enable = enable or self.causal.gradient_checkpointing_enable
            kept = {} if self.attention is None else {"context_fn": self.attention.again}
            enable({"use_reentrant": False, **kept})
            self._recomputing = [m for m in self.causal.modules() if getattr(m, "gradient_checkpointing", False)]
            return choose_path(self, self.probe, paths)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"activation_checkpointing does not work with {describe(self.causal)} in transformers {transformers_version()}: "
                f"{str(error).splitlines()[0]}; leave out activation_checkpointing, and make tokens_per_microbatch smaller if memory is short"
            ) from error


def transformers_version() -> str:
    import transformers

    return transformers.__version__
