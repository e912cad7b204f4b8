"""`Policy`: the one place where a model turns token sequences into log-probabilities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_rl.model.decoder import NativeDecoder, unsupported
from nemo_rl.model.head import Head, measure_head
from nemo_rl.model.kinds import describe
from nemo_rl.model.load import compute_dtype
from nemo_rl.model.logprobs import token_logprobs
from nemo_rl.model.packing import PackedBatch
from nemo_rl.model.probe import SHORT, Probe, exact, reset_positions
from nemo_rl.model.proof import check_causal, choose_path, length_limit

if TYPE_CHECKING:
    from nemo_rl.model.sharding import ShardedModel

log = logging.getLogger(__name__)

T = TypeVar("T")

PATHS = ("hidden", "logits", "hidden, one by one", "logits, one by one")
"""Ways to log-probabilities through transformers' own modules, from fast to slow: sequences padded to views, or each by itself;
its last hidden states through the chunked head, or its logits as they are."""


class Policy:
    """A causal language model with the fastest right way to its log-probabilities.

    The ways are tried in order and compared with the plain model, log-probabilities and gradients (`nemo_rl.model.proof`):
    the packed forward of known families, then PATHS.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str = "auto",
        recompute: bool = False,
        longest: int | None = None,
        sharded: ShardedModel | None = None,
    ) -> None:
        """`recompute`: make activations again in the backward pass. `longest`: tokens of the longest sequence of the run.
        `sharded`: the model's shards, where ranks share its weights; then every call here is collective.

        Raises ValueError for a model that is not a causal language model, or that no way computes right.
        """
        self.model, self.sharded = model, sharded
        self.recompute = recompute
        self.device = next(model.parameters()).device
        self.dtype = compute_dtype(precision, self.device)
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head_facts: Head | None = None
        self.rollout: Any = None
        """What `nemo_rl.rollout.in_process.proof` found out about decoding."""
        self._recomputing: list[nn.Module] = []
        self.native: NativeDecoder | None = None
        self.probe = Probe(self.causal, longest)
        self.path = self._choose_path()
        if self.path != "packed" and sharded is None:
            log.info("log-probabilities by transformers' own forward (%s)", unsupported(self.causal) or self.path)

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
        return self.path.endswith("one by one")

    def _by_path(self, batch: PackedBatch, temperature: float, path: str) -> Tensor:
        if path == "packed":
            assert self.native is not None
            hidden = self.native.hidden(batch, self.dtype, self.recompute)
        else:
            self.set_recomputing(True)
            slots = self._alone if path.endswith("one by one") else self._padded
            if path.startswith("logits"):
                logits = slots(batch, lambda **inputs: self.causal(**inputs).logits)
                selected = logits.index_select(0, batch.select_S).float() / temperature
                return selected.log_softmax(-1).gather(-1, batch.targets_S[:, None]).squeeze(-1)
            backbone = self.head_facts.backbone if self.head_facts is not None else self.causal.base_model
            hidden = slots(batch, lambda **inputs: backbone(**inputs).last_hidden_state)
        head = self.head
        return token_logprobs(
            hidden.index_select(0, batch.select_S).to(self.dtype),
            head.weight,
            batch.targets_S,
            temperature=temperature,
            bias_V=getattr(head, "bias", None),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )

    def set_recomputing(self, on: bool) -> None:
        """Switches transformers' activation checkpointing on or off.

        It works in training mode only, and layers inside such a layer are looked at again in the backward pass: so the mode of
        the layers concerned, and of no others, is set, and stays until rollouts, which need the layers' caches, switch it off.
        """
        for module in self._recomputing:
            module.training = on

    def _padded(self, batch: PackedBatch, forward: Any) -> Tensor:
        """Runs `forward` on each padded view and returns its output for each flat token."""
        outputs = []
        for view in batch.views:
            ids = batch.ids_N[view.gather].view(view.rows, view.length)
            columns = torch.arange(view.length, device=ids.device)
            lengths = torch.tensor(view.lengths, device=ids.device)
            mask = (columns[None] < lengths[:, None]).long()
            positions = columns[None].expand(view.rows, -1)
            with self.autocast():
                out = forward(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            outputs.append(out.flatten(0, 1))
        return torch.cat(outputs).index_select(0, batch.back_N)

    def _alone(self, batch: PackedBatch, forward: Any) -> Tensor:
        """Runs `forward` on each sequence by itself, given nothing but its tokens, and returns its output for each flat token."""
        outputs = []
        for view in batch.views:
            rows = batch.ids_N[view.gather].view(view.rows, view.length)
            for ids, length in zip(rows, view.lengths, strict=True):
                reset_positions(self.causal)
                with self.autocast():
                    out = forward(input_ids=ids[None, :length], use_cache=False)[0]
                outputs.append(F.pad(out, (0, 0, 0, view.length - length)))
        return torch.cat(outputs).index_select(0, batch.back_N)

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
        if self.sharded is None and unsupported(self.causal) is None:
            self.native = NativeDecoder(self.causal)
            with suppress(ValueError):
                return choose_path(self, self.probe, ["packed"])
            self.native = None
        with exact(self.causal):
            ids = self.probe.ids(min(12, self.probe.longest), 3)
            self.head_facts = self.run(lambda: measure_head(self.causal, ids))
        paths = [path for path in PATHS if self.head_facts is not None or path.startswith("logits")]
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
        if path.startswith("logits"):
            log.warning(
                "this model's logits are more than its output embedding of hidden states; memory grows with the vocabulary"
            )
        return path

    def _path_with_recomputing(self, paths: list[str]) -> str:
        """The same with activation checkpointing, which not every family gets right. Raises ValueError that names the keyword."""
        try:
            # transformers renames the method during its version 5
            enable = getattr(self.causal, "activation_checkpointing_enable", None)
            enable = enable or self.causal.gradient_checkpointing_enable
            enable({"use_reentrant": False})
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
