"""Which models can be post-trained as causal language models at all; for the others, why not in a sentence."""

from __future__ import annotations

from typing import Any

from torch import nn

PARTS = {
    "bert-generation": "an encoder",
    "gemma4_assistant": "a draft model that needs the hidden states of another model",
    "gemma4_unified_assistant": "a draft model that needs the hidden states of another model",
    "git": "the text part of an image captioner",
    "moshi": "a speech model",
    "musicgen": "a music model",
    "musicgen_melody": "a music model",
    "trocr": "the decoder of an image-to-text model",
    "xlnet": "a permutation language model",
}
"""Types that transformers also opens by AutoModelForCausalLM and that are in none of its own tables of encoders."""


def check_kind(model: nn.Module) -> None:
    """Raises ValueError for encoders, for parts of encoder-decoder models, and for models without an output layer."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if refusal := refusal_of(name, getattr(config, "model_type", "")):
        raise ValueError(refusal)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or getattr(head, "weight", None) is None:
        raise ValueError(
            f"{name} has no output layer over the vocabulary, so it is not a causal language model; "
            "load it with AutoModelForCausalLM.from_pretrained instead of AutoModel"
        )
    if not _loads_again(config):
        raise ValueError(
            f"{name} is the text part of a composite model: what transformers saves of it ({getattr(config, 'model_type', '')}) is not a "
            "causal language model for AutoModelForCausalLM, so no checkpoint of this run could be loaded again; "
            "train a model whose checkpoints load, such as the language model that the composite was made from"
        )


def _loads_again(config: object) -> bool:
    """Whether AutoModelForCausalLM opens what a checkpoint names that is saved with it; of classes of others, that is theirs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    made_by = type(config)
    return not made_by.__module__.startswith("transformers.") or made_by in MODEL_FOR_CAUSAL_LM_MAPPING


def refusal_of(name: str, model_type: str) -> str | None:
    """Returns why models of a type, whose class has this name, cannot be post-trained; None where nothing speaks against it."""
    kind = kind_of(model_type)
    return kind and (
        f"{name} ({model_type}) is {kind}, not a causal (decoder) language model, although "
        "AutoModelForCausalLM opens it; post-training needs a model that is trained to continue text, such as Qwen3, Llama or Gemma"
    )


def kind_of(model_type: str) -> str | None:
    """Returns what a type is according to transformers' own tables, None where nothing speaks against it."""
    from transformers.models.auto import modeling_auto as tables

    if model_type in PARTS:
        return PARTS[model_type]
    if model_type in tables.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return "the decoder of a speech recogniser"
    if model_type in tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "one half of an encoder-decoder model"
    if model_type in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder, which sees a text in both directions"
    return None


def describe(model: nn.Module) -> str:
    """Returns the class and the type of a model, as messages name it."""
    kind: Any = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} ({kind})" if kind else type(model).__name__
