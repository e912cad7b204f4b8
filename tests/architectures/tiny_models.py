"""A tiny random model of each type that AutoModelForCausalLM opens, made from its configuration: nothing is downloaded.

Weights are moved by noise, so that no bias or norm is neutral; windows are 6 tokens; soft caps, scales and dropout are on.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
END = 1

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim"), 8),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "dff", "ffn_hidden_size", "d_ff"), 48
    ),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "block_ff_dim"), 48),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "max_seq_len"), 256
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "altup_num_inputs"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "topk_groups", "n_shared_experts"), 1),
    **dict.fromkeys(("num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("ffn_expert_hidden_size", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "query_pre_attn_scalar", "rotary_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_d_head", "mamba_n_heads", "mamba_chunk_size", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_num_heads", "ssm_state_size", "state_size", "chunk_size", "laurel_rank"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "block_multiple_of"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_mamba_heads", "n_groups", "moe_layer_start_index"), 1),
    **dict.fromkeys(("mamba_d_conv", "mamba_dt_rank", "conv_kernel", "time_step_rank", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_conv_kernel_dim", "linear_num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("mamba_expand", "expand", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("attention_window_size", "sliding_window"), 6),
    **dict.fromkeys(("block_dim", "attention_hidden_size"), 32),
    "index_topk": 64,
    "mamba_d_ssm": 64,
    "conv_L_cache": 3,
    "attention_chunk_size": 1024,
    "block_size": 16,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0, 0.0],
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": END,
    "decoder_start_token_id": None,
    "initializer_range": 0.1,
}

_ALTERNATING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
_CONV = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
_GRANITE = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}
_YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 12},
    **{"llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "max_position_embeddings": 256,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "bloom": {"n_inner": None},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**_ALTERNATING, "logit_scale": 0.25},
    "cohere_compass_text": {
        "layer_types": _ALTERNATING["layer_types"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _ALTERNATING["layer_types"]
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": {"topk_method": "greedy"},
    "exaone4": _ALTERNATING,
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {"lm_head_multiplier": 0.5, "embedding_multiplier": 1.3, "key_multiplier": 0.7},
    "falcon_mamba": {"intermediate_size": 64},
    "gemma2": {**_ALTERNATING, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": _ALTERNATING,
    "gemma3n_text": _ALTERNATING,
    "gemma4_text": {**_ALTERNATING, "final_logit_softcapping": 4.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gpt_oss": _ALTERNATING,
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": {
        **{"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        "logits_scaling": 3.0,
    },
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {
        **{"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    },
    "lfm2": {**_CONV, "full_attn_idxs": None},
    "lfm2_moe": _CONV,
    "llama4_text": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    "longcat_flash": {"num_layers": 1, "zero_expert_num": 2, "moe_topk": 2},
    "mamba": {"intermediate_size": 64},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"scale_emb": 1.0},
    "minimax": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "ministral": {**_ALTERNATING, "head_dim": 8},
    "ministral3": {"head_dim": 8, "rope_parameters": _YARN},
    "mixtral": {"router_jitter_noise": 0.1},
    "nemotron_h": {
        **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mamba", "mlp"]},
        "hybrid_override_pattern": "M*M-",
    },
    "olmo3": _ALTERNATING,
    "phi3": {"sliding_window": None},
    "reformer": {
        **{"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 16]},
        **{"axial_pos_embds_dim": [16, 16], "feed_forward_size": 48, "lsh_attn_chunk_length": 8},
        **{"local_attn_chunk_length": 8, "num_buckets": 4},
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64},
        **{"indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 4},
        **{"split_ngram_parts": 1, "hc_count": 2, "hc_lowrank": 8, "heads_per_ngram": 2},
    },
    "recurrent_gemma": {
        **{"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
        "logits_soft_cap": 4.0,
    },
    "rwkv": {"n_inner": None},
    "xlstm": {"num_heads": 4, "hidden_size": 64, "embedding_dim": 64, "num_blocks": 2},
    "zamba": {
        **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16},
        **{"attention_hidden_size": 64, "n_mamba_heads": 2, "use_mamba_kernels": False},
    },
    "zamba2": {
        **{"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_headdim": 8},
        **{"n_mamba_heads": 8, "num_mem_blocks": 1, "attention_head_dim": 16, "attention_hidden_size": 64},
        **{"hybrid_layer_ids": [1], "use_mem_rope": True},
    },
    "zaya": {"num_experts_per_tok": 1},
}

PER_LAYER = [
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "moe_layers",
    "mlp_only_layers",
    "layers_types",
    "block_types",
]

_VISION = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    **{"patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "embed_dim": 16, "vision_output_dim": 32},
}
_AUDIO = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

TEXT_TYPES = {
    "fuyu": "persimmon",
    "gemma3": "gemma3_text",
    "got_ocr2": "qwen2",
    "moss_transcribe_diarize": "qwen3",
}
"""The type of a composite's text configuration, where its name is not the composite's with `_text`."""

_BLT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
OTHER_PARTS: dict[str, dict[str, Any]] = {
    "blt": {
        **{"vocab_size": VOCABULARY, "encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [2, 3]},
        "patcher_config": {**_BLT, "num_hidden_layers": 1},
        "encoder_config": {**_BLT, "num_hidden_layers": 1, "hidden_size_global": 64},
        "decoder_config": {**_BLT, "num_hidden_layers": 2, "hidden_size_global": 64},
        "global_config": {**_BLT, "hidden_size": 64, "num_hidden_layers": 2},
    },
    "dots3_note": {
        "vision_config": {
            **{"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "moe_intermediate_size": 16},
            **{"num_local_experts": 2, "adapter_in_dim": 16, "adapter_out_dim": 32},
        },
        "audio_config": {**_AUDIO, "downsample_hidden_size": 8, "adapter_input_size": 16, "adapter_out_dim": 32},
    },
    "emu3": {
        "vq_config": {
            **{"codebook_size": 16, "embed_dim": 4, "base_channels": 32, "channel_multiplier": [1, 1]},
            **{"num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 32},
        },
        "vocabulary_map": {"<image>": 7},
    },
    "gemma3n": {
        "vision_config": {"architecture": "test_efficientnet", "hidden_size": 16},
        "audio_config": {
            **{"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1},
            **{"sscp_conv_channel_size": [4, 4]},
        },
    },
    "moss_transcribe_diarize": {"audio_config": _AUDIO},
    "phi4_multimodal": {
        "vision_config": {**_VISION, "crop_size": 28},
        "audio_config": {
            **{"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2},
            **{"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8},
        },
    },
}
"""The other parts of composites, made small too: no token of a text passes through them."""


def all_types() -> list[str]:
    """Returns every type that AutoModelForCausalLM of the installed transformers opens."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_model(model_type: str, seed: int = 0) -> nn.Module:
    """Returns a tiny model of the type, float32, weights random and moved by noise."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = make_config(model_type)
    with contextlib.suppress(Exception):  # only mixtures of experts have it
        config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.ndim >= 2 else 0.03))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = END
        model.generation_config.pad_token_id = 0
        model.generation_config.bos_token_id = None
    return model


def make_config(model_type: str) -> Any:
    """Returns a small configuration of the type."""
    import transformers
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    names = _names(config_class)
    parts = getattr(config_class, "sub_configs", {}) or {}
    if "text_config" in parts:
        text_class = parts["text_config"]
        own = (
            text_class.model_type
            if text_class is not transformers.AutoConfig
            else TEXT_TYPES.get(model_type, model_type + "_text")
        )
        text = make_config(own)
        values: dict[str, Any] = {"text_config": text.to_dict()}
        if model_type.startswith("gemma4"):
            values |= {"vision_config": None, "audio_config": None}
        elif "vision_config" in parts:
            values["vision_config"] = _VISION
        values |= OTHER_PARTS.get(model_type, {})
        values |= {n: SMALL[n] for n in ("pad_token_id", "eos_token_id", "bos_token_id") if n in names}
        if "tie_word_embeddings" in names:
            values["tie_word_embeddings"] = getattr(text, "tie_word_embeddings", True)
        return config_class(**values)
    return _built(config_class, _values(model_type, config_class, names) | OTHER_PARTS.get(model_type, {}))


def _values(model_type: str, config_class: Any, names: set[str]) -> dict[str, Any]:
    default = config_class()

    def has(name: str) -> bool:
        try:
            getattr(default, name)
        except AttributeError:
            return False
        except Exception:  # it differs from layer to layer
            return True
        return True

    values = {name: value for name, value in SMALL.items() if name in names and has(name)}
    aliases = getattr(config_class, "attribute_map", {})
    for alias, real in aliases.items():  # both names of one attribute would fight
        if alias in values and real in values:
            del values[alias]
    for name in ("head_dim", "sliding_window"):  # None where that is the family's default
        if name in values and vars(default).get(name, 0) is None:
            del values[name]
    special = SPECIAL.get(model_type, {})
    given = special.get("num_hidden_layers")
    layers = given or next((values[n] for n in ("num_hidden_layers", "num_layers", "n_layer") if n in values), 2)
    for name in PER_LAYER:
        value = getattr(default, name, None) if has(name) else None
        if name not in names or name in special or aliases.get(name) in special or not isinstance(value, list | tuple):
            continue
        if value:
            distinct = list(dict.fromkeys(value))
            values[name] = (distinct * layers)[:layers]
        if name in ("moe_layers", "mlp_only_layers") and value:
            values[name] = [i for i in range(layers) if i % 2]
    rope = getattr(default, "rope_parameters", None) if has("rope_parameters") else None
    if isinstance(rope, dict) and rope.get("rope_type") in ("longrope", "yarn"):
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    values |= special
    for name in list(values):  # names that are only read
        found = getattr(config_class, aliases.get(name, name), None)
        if isinstance(found, property) and found.fset is None:
            del values[name]
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values


def _built(config_class: Any, values: dict[str, Any]) -> Any:
    """Makes the configuration; a strict field that wants another type stays as it is by default."""
    for _ in range(6):
        try:
            return config_class(**values)
        except Exception as error:
            named = re.search(r"field '(\w+)'|'(\w+)' is a per-layer attribute", str(error))
            field = (named[1] or named[2]) if named else None
            if field not in values:
                raise
            del values[field]
    return config_class(**values)


def _names(config_class: Any) -> set[str]:
    found: set[str] = set(getattr(config_class, "attribute_map", {}))
    for base in config_class.__mro__:
        found |= set(getattr(base, "__annotations__", {}))
        with contextlib.suppress(ValueError, TypeError):
            found |= set(inspect.signature(base.__init__).parameters)
    return found
