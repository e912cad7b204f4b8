"""What makes two runs the same: that which decides the sequence of gradients, and nothing else.

Model, tokenizer, rows, algorithm and its settings, seed, batches, sampling, and the reward with all that it reaches. Not
the length of the run, evaluation, what only takes memory or time, nor what is logged.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

from nemo_rl.run.directory import DIGEST, STREAMED
from nemo_rl.storage.left import left_in_store

NOT_IDENTITY = frozenset(
    {
        *("max_steps", "max_epochs", "save_every", "keep_checkpoints", "eval_every", "resume"),
        *("log_level", "log_every", "tensorboard", "report_to", "logged_completions", "trust_remote_code"),
        *("tokens_per_microbatch", "activation_checkpointing", "sharding", "memory", "offload"),
        "checkpoint_dtype",
    }
)
"""Settings of any section that a run goes on with although they differ."""

LATER = frozenset(
    {
        *("advantage_statistics", "dynamic_sampling_rounds", "mini_batch_size", "use_kl_in_reward"),
        *("importance_correction", "importance_max", "importance_min", "cast_lm_head_to_fp32"),
    }
)
"""Settings that runs of earlier versions do not know: at its default such a one is left out, so that these runs go on."""

_WEIGHTS = (".safetensors", ".bin", ".pt")
_EDGE = 1 << 16
_SAMPLES = 256

_trained_here: weakref.WeakKeyDictionary[Any, tuple[dict[str, Any], str]] = weakref.WeakKeyDictionary()
"""Live models that interrupted runs of this process have trained: their identity before, and their weights now."""


def settings_identity(*sections: Any) -> dict[str, Any]:
    """The settings of these sections of the specification that decide the gradients, by name."""
    found: dict[str, Any] = {}
    for section in sections:
        fields = type(section).model_fields
        for name, value in section.model_dump().items():
            if name not in NOT_IDENTITY and not (name in LATER and value == fields[name].default):
                found[name] = value
    return found


def rows_identity(fingerprint: str, streamed: int | None = None) -> str:
    """The rows by their content; of a stream that has more it says how many were read."""
    return DIGEST + fingerprint + ("" if streamed is None else f"{STREAMED}{streamed}")


def model_identity(reference: str, model: Any = None) -> dict[str, Any]:
    """A model by its content: of a folder its configuration and weights, of a live model these too, else its hub name.

    Weights count by their sizes and a sample. A folder is the same model wherever it lies.
    """
    if model is not None:
        now = live_weights(model)
        before, after = _trained_here.get(model, ({}, None))
        return before if after == now else {"class": type(model).__name__, "weights": now}
    folder = Path(reference).expanduser()
    if not folder.is_dir():
        return {"name": reference}
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    digest, left = hashlib.sha256(), left_in_store(folder)
    for file in sorted(f for f in folder.iterdir() if f.suffix in _WEIGHTS and f.is_file()):
        remote = left.files.get(file.name) if left is not None else None
        size = remote.size if remote is not None else file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        for place in sorted({0, max(0, size // 2 - _EDGE // 2), max(0, size - _EDGE)}):
            if left is not None and remote is not None:
                digest.update(left.read(file.name, place, min(place + _EDGE, size)))
                continue
            with open(file, "rb") as stream:
                stream.seek(place)
                digest.update(stream.read(_EDGE))
    text = json.dumps(settings, sort_keys=True)
    return {
        "config": DIGEST + hashlib.sha256(text.encode()).hexdigest()[:24],
        "weights": DIGEST + digest.hexdigest()[:24],
    }


def refuse_adapter(reference: str) -> None:
    """ValueError for the folder of a PEFT adapter, which holds no model of its own."""
    folder = Path(reference).expanduser()
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    raise ValueError(
        f"model {reference!r} is the folder of a PEFT adapter{f' of {base!r}' if base else ''}, not of a model; merge it first: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({reference!r}).merge_and_unload().save_pretrained(FOLDER), save its "
        "tokenizer beside it, and train FOLDER"
    )


def live_weights(model: Any) -> str:
    """Digest of names, shapes and a sample of the weights of a model in memory."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        here: Any = parameter.detach()
        flat = (here.to_local() if hasattr(here, "to_local") else here).reshape(-1)  # of shards those of this rank
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][: 2 * _SAMPLES].double().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(sample.tobytes())
    return DIGEST + digest.hexdigest()[:24]


def remember_trained(model: Any, before: dict[str, Any] | None) -> None:
    """Notes that a run which is not finished has trained this model, so that the same call finds its run again."""
    if before is None:
        _trained_here.pop(model, None)
    else:
        _trained_here[model] = (before, live_weights(model))


def was_trained(model: Any) -> bool:
    """Whether an interrupted run of this process has trained the model, so that it is not the one of the run's start."""
    return model in _trained_here and _trained_here[model][1] == live_weights(model)


def tokenizer_identity(tokenizer: Any) -> str:
    """Digest of what a tokenizer makes of rows: its vocabulary, special tokens and chat template."""
    known = [
        sorted(tokenizer.get_vocab().items()),
        sorted((name, str(value)) for name, value in tokenizer.special_tokens_map.items()),
        getattr(tokenizer, "chat_template", None),
    ]
    return DIGEST + hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:24]
