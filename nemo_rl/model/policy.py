"""`Policy`: the one place where a model turns token sequences into log-probabilities."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_rl.model.decoder import NativeDecoder, unsupported
from nemo_rl.model.load import compute_dtype
from nemo_rl.model.logprobs import token_logprobs
from nemo_rl.model.packing import PackedBatch, TokenSequence, pack

log = logging.getLogger(__name__)


class Policy:
    """A causal language model with the fastest exact way to its log-probabilities.

    Three ways are tried in this order and compared on a few tokens with the model's own logits, once: packed forward of
    known families; transformers' hidden states through the chunked head; the model's logits as they are.
    """

    def __init__(self, model: nn.Module, precision: str = "auto", recompute: bool = False) -> None:
        self.model = model
        self.recompute = recompute
        self.device = next(model.parameters()).device
        self.dtype = compute_dtype(precision, self.device)
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = self.causal.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them
        self.logit_scale: float = getattr(config, "logit_scale", None) or 1 / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        if recompute and hasattr(self.causal, "gradient_checkpointing_enable"):
            # transformers renames the method during its version 5
            enable = getattr(self.causal, "activation_checkpointing_enable", self.causal.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            self.causal.enable_input_require_grads()
        self.native: NativeDecoder | None = None
        self.path = self._choose_path()
        if self.path != "packed":
            log.info("log-probabilities by transformers' own forward (%s)", unsupported(self.causal) or self.path)

    @property
    def head(self) -> nn.Module:
        return self.causal.get_output_embeddings()

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def logprobs(self, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
        """Returns the log-probability of each trained token, (S,), float32, differentiable where gradients are on."""
        return self._logprobs(batch, temperature, self.path)

    def _logprobs(self, batch: PackedBatch, temperature: float, path: str) -> Tensor:
        if path == "logits":
            return self._from_logits(batch, temperature)
        if path == "packed":
            assert self.native is not None
            hidden = self.native.hidden(batch, self.dtype, self.recompute)
        else:
            hidden = self._padded(batch, lambda **inputs: self.causal.base_model(**inputs).last_hidden_state)
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

    def _padded(self, batch: PackedBatch, forward: Any) -> Tensor:
        """Runs `forward` on each padded view and returns its output for each flat token."""
        outputs = []
        if self.recompute:
            # transformers recomputes in training mode only; without dropout the mode changes nothing else
            self.causal.train(torch.is_grad_enabled())
        for view in batch.views:
            ids = batch.ids_N[view.gather].view(view.rows, view.length)
            columns = torch.arange(view.length, device=ids.device)
            lengths = torch.tensor(view.lengths, device=ids.device)
            mask = (columns[None] < lengths[:, None]).long()
            positions = columns[None].expand(view.rows, -1)
            with self._autocast():
                out = forward(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            outputs.append(out.flatten(0, 1))
        if self.recompute:
            self.causal.eval()
        return torch.cat(outputs).index_select(0, batch.back_N)

    def _from_logits(self, batch: PackedBatch, temperature: float) -> Tensor:
        logits = self._padded(batch, lambda **inputs: self.causal(**inputs).logits)
        selected = logits.index_select(0, batch.select_S).float() / temperature
        return selected.log_softmax(-1).gather(-1, batch.targets_S[:, None]).squeeze(-1)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            yield

    @torch.no_grad()
    def _choose_path(self) -> str:
        vocabulary = self.head.weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, min(vocabulary, 1000), (2, 9), generator=generator).tolist()
        batch = pack([TokenSequence(rows[0], 1), TokenSequence(rows[1][:6], 1)], self.device)
        truth = self._from_logits(batch, 1.0)
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.15
        if unsupported(self.causal) is None:
            self.native = NativeDecoder(self.causal)
        paths = ["packed"] if self.native else []
        # an adapter on the output layer starts as zero, so that the comparison would not miss it
        paths += ["hidden"] if isinstance(self.head, nn.Linear) else []
        for path in paths:
            try:
                found = self._logprobs(batch, 1.0, path)
            except (AttributeError, TypeError, RuntimeError) as error:
                log.debug("%s path not usable: %s", path, error)
                continue
            if torch.allclose(found, truth, atol=tolerance, rtol=tolerance):
                return path
            if path == "packed":
                self.native = None
        log.warning(
            "this model's logits are more than its output embedding of hidden states; memory grows with the vocabulary"
        )
        return "logits"
