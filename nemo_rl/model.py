"""Loading of models and tokenizers, and `Policy`: the one place where a model turns token sequences into log-probabilities."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemo_rl.decoder import NativeDecoder, unsupported
from nemo_rl.job.spec import TrainingSpec
from nemo_rl.logprobs import token_logprobs
from nemo_rl.packing import PackedBatch, TokenSequence, pack

log = logging.getLogger(__name__)

SMALL_HIDDEN_SIZE = 96
"""Below this width a second CPU thread costs more than it brings."""


def choose_device(gpus_per_node: int = 1) -> torch.device:
    """Returns the accelerator of this process, or the CPU where there is none or none is wanted."""
    if gpus_per_node > 0 and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of matrix products: bf16 on CUDA and fp32 on the CPU, unless the specification says otherwise."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def available_cpus() -> float:
    """Returns the CPUs that this process may use: its affinity, and less where a cgroup grants less."""
    cpus = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, int(quota) / int(period))
    except (OSError, ValueError):
        pass
    return max(cpus, 1.0)


def limit_threads(hidden_size: int) -> None:
    """Sets torch's CPU threads to what the machine grants, and to one for tiny models; OMP_NUM_THREADS has precedence."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if hidden_size <= SMALL_HIDDEN_SIZE else max(1, int(available_cpus())))


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a hub name or directory. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_not_loadable("tokenizer", name, error)) from error


def load_model(name: str, training: TrainingSpec, device: torch.device) -> nn.Module:
    """Returns the causal language model of a hub name or directory, in fp32 on `device`, without dropout.

    Weights are fp32 whatever the checkpoint's dtype: with bf16 weights, updates at usual learning rates round to nothing.
    Raises ValueError if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _without_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=training.trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise ValueError(_not_loadable("model", name, error)) from error
    return prepare_model(model, training, device)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Reading weights from disk takes a moment; a bar for it would tear the run's own display."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def prepare_model(model: nn.Module, training: TrainingSpec, device: torch.device) -> nn.Module:
    """Makes a loaded model ready for training: fp32, on the device, no dropout, adapters if asked. Returns it."""
    model = model.to(device=device, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.eval()  # no layer of a causal model but dropout depends on the mode; gradients flow in either
    if training.lora_rank is not None:
        model = _add_adapters(model, training)
    return model


def _add_adapters(model: nn.Module, training: TrainingSpec) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(
            "lora_rank is set, but peft is not installed; install it with: pip install 'nemo-rl[lora]'"
        ) from error
    config = LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha if training.lora_alpha is not None else 2 * training.lora_rank,
        target_modules=training.lora_target_modules or "all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        return get_peft_model(model, config).eval()


def _not_loadable(what: str, name: str, error: Exception) -> str:
    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if os.path.sep in name and name.count("/") != 1 and not Path(name).exists():
        cure = f"there is no directory {name}"
    elif Path(name).is_dir():
        found = ", ".join(sorted(p.name for p in Path(name).iterdir())[:8]) or "nothing"
        cure = (
            f"expected a Hugging Face directory with config.json, tokenizer files and *.safetensors; it holds {found}"
        )
    else:
        cure = "expected a directory, or the name of a model on the hub that this machine can reach (see HF_TOKEN, HF_HUB_OFFLINE)"
    return f"Cannot load the {what} {name!r}: {cause}; {cure}"


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
