"""The proof at the door: the fastest right way is taken, slower ones where it is wrong, and a sentence where none is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures.tiny_models import make_model
from nemo_rl.job.spec import TrainingSpec
from nemo_rl.model.kinds import kind_of
from nemo_rl.model.load import load_model, prepare_model
from nemo_rl.model.packing import TokenSequence, pack
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.in_process.engine import generate
from nemo_rl.rollout.in_process.proof import prove_rollouts
from nemo_rl.rollout.protocol import Sampling
from unit.engine import tiny
from unit.engine.tiny import plain_logprobs, random_ids

CPU = torch.device("cpu")


def changed(model: nn.Module, change: Any) -> nn.Module:
    """The model with `change(hidden, inputs)` in place of its last hidden states."""
    plain = model.base_model.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        out = plain(*args, **inputs)
        out.last_hidden_state = change(out.last_hidden_state, inputs)
        return out

    model.base_model.forward = forward
    return model


# ------------------------------------------------------------------ training


def test_a_way_that_is_wrong_beyond_some_tokens_only_is_not_taken():
    """As a sliding window that is left out: a short sequence would not show it."""

    def change(hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        later = (torch.arange(hidden.shape[1]) >= 20)[:, None]
        return torch.where(later, hidden * 1.5, hidden) if inputs.get("attention_mask") is not None else hidden

    assert Policy(changed(tiny.make_model("gpt2"), change), "fp32").path == "hidden, one by one"


def test_padding_that_a_model_mishandles_is_not_there_when_it_runs_packed():
    def change(hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        mask = inputs.get("attention_mask")
        return hidden if mask is None else hidden * (1 + 0.1 * (mask == 0).any(-1).float()[:, None, None])

    model = changed(tiny.make_model("gpt2"), change)
    policy = Policy(model, "fp32")
    assert policy.path == "packed"
    sequences = [TokenSequence(random_ids(n, n), 1) for n in (5, 12, 3)]
    batch = pack(sequences)
    with torch.no_grad():
        found = policy.logprobs(batch)
        for i, sequence in enumerate(sequences):
            assert torch.allclose(found[batch.rows_S == i], plain_logprobs(model, sequence.ids), atol=1e-5)


def test_a_fresh_convolution_that_leaks_less_than_the_tolerance_is_not_packed():
    """Its leak is 2e-5 nats before the first step, but a quarter of the gradient of its own weights."""
    import transformers as t

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 3, "full_attn_idxs": [1], "conv_L_cache": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(t.Lfm2Config(**sizes), dtype=torch.float32).eval()
    assert Policy(model, "fp32").path == "hidden"


def test_a_wrong_gradient_alone_is_found():
    def change(hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        if inputs.get("attention_mask") is None:
            return hidden
        return hidden.detach() + (hidden - hidden.detach()) * torch.linspace(0.5, 1.5, hidden.shape[1])[:, None]

    assert Policy(changed(tiny.make_model("gpt2"), change), "fp32").path == "hidden, one by one"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_soft_cap_in_the_text_configuration_is_part_of_the_fast_way(precision: str):
    policy = Policy(prepare_model(make_model("gemma4"), TrainingSpec(), CPU), precision)
    assert (policy.path, policy.softcap) == ("packed", 4.0)


@pytest.mark.parametrize(
    ("family", "scale", "cap"),
    [("gemma2", 1.0, 4.0), ("cohere", 0.25, None), ("granite", 1 / 3.0, None), ("phi", 1.0, None)],
)
def test_scales_and_caps_are_measured(model_of, family: str, scale: float, cap: float | None):
    policy = Policy(model_of(family), "fp32")
    assert (policy.logit_scale, policy.softcap) == (pytest.approx(scale, rel=1e-7), cap)


def test_a_rotary_embedding_that_follows_the_length_names_the_longest_right_length():
    with pytest.raises(ValueError, match="set max_sequence_length to at most 16"):
        Policy(tiny.make_model("dynamic_rope"), "fp32")


def test_a_model_that_looks_ahead_is_refused():
    def change(hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        return hidden + 0.3 * hidden.mean(1, keepdim=True)

    with pytest.raises(ValueError, match="is not a causal language model"):
        Policy(changed(tiny.make_model("gpt2"), change), "fp32")


def test_the_proof_leaves_no_trace():
    model = tiny.make_model("gemma2")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    before, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    policy = Policy(model, "bf16")
    prove_rollouts(policy)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_float32_matmul_precision() == precision
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert policy.dtype == torch.bfloat16


# ------------------------------------------------------------------ rollouts


def exact_rollouts(policy: Policy) -> None:
    prompts = [random_ids(n, n) for n in (3, 9, 6, 9)]
    groups = generate(policy, prompts, Sampling(3, 9), end_ids=list(range(0, 90, 6)), seed=1, step=2)
    with torch.no_grad():
        for prompt, group in zip(prompts, groups, strict=True):
            for completion in group:
                expected = plain_logprobs(policy.causal, prompt + completion.ids)[len(prompt) - 1 :]
                assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)


def wrong_with(condition: Any) -> nn.Module:
    """A model whose hidden states are others where `condition(inputs)` holds, in rollouts only."""

    def change(hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        decoding = inputs.get("use_cache") or hidden.shape[1] == 1
        return hidden * 1.2 if decoding and condition(inputs) else hidden

    return changed(tiny.make_model("gpt2"), change)


@pytest.mark.parametrize(
    ("condition", "path", "way"),
    [
        (lambda inputs: False, "packed", "packed"),
        (lambda inputs: not inputs.get("use_cache"), "packed", "cache"),
        (lambda inputs: False, "hidden", "cache"),
        (lambda inputs: inputs.get("attention_mask") is not None, "hidden, one by one", "cache, one length at a time"),
        (lambda inputs: inputs.get("past_key_values") is not None, "hidden", "no cache, one length at a time"),
    ],
)
def test_rollouts_take_the_fastest_way_that_is_right(condition: Any, path: str, way: str):
    policy = Policy(wrong_with(condition), "fp32")
    policy.path = path
    assert prove_rollouts(policy).way == way
    exact_rollouts(policy)


def test_rows_that_are_not_independent_run_one_by_one():
    def change(hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        return hidden * (1 + 0.1 * (len(hidden) > 1))

    policy = Policy(changed(tiny.make_model("gpt2"), change), "fp32")
    assert policy.path == "packed"
    assert prove_rollouts(policy).way == "no cache, one row at a time"
    exact_rollouts(policy)


def test_where_no_way_of_decoding_is_right_a_sentence_says_so():
    model = tiny.make_model("gpt2")
    plain = model.forward

    def forward(**inputs: Any) -> Any:
        out = plain(**inputs)
        decoding = inputs.get("logits_to_keep") or inputs["input_ids"].shape[1] == 1
        out.logits = out.logits * 1.3 if decoding else out.logits
        return out

    model.forward = forward
    policy = Policy(model, "fp32")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel .*cannot be sampled from right.*GRPO needs another model"):
        prove_rollouts(policy)


def test_the_size_of_a_cache_is_measured():
    policy = Policy(tiny.make_model("gpt2"), "fp32")
    constant, each = prove_rollouts(policy).cache_bytes
    assert (constant, each) == (0.0, 2 * 2 * 32 * 4)  # keys and values of 2 layers of 32 numbers


# ------------------------------------------------------------------ models that cannot be trained


@pytest.mark.parametrize(
    "kind",
    ["bert", "roberta", "xlm-roberta", "bart", "mbart", "marian", "pegasus", "git", "trocr", "whisper", "electra"],
)
def test_encoders_and_parts_are_told_apart(kind: str):
    assert kind_of(kind) is not None


@pytest.mark.parametrize("kind", ["llama", "qwen3_5", "mamba2", "gemma4", "nemotron_h", "gpt2", "rwkv", "an-own-type"])
def test_decoders_are_not_refused_by_their_names(kind: str):
    assert kind_of(kind) is None


def test_a_model_without_output_layer_names_its_class_and_the_cure():
    from transformers import AutoModel

    with pytest.raises(ValueError, match=r"Qwen2Model has no output layer.*AutoModelForCausalLM"):
        prepare_model(AutoModel.from_config(tiny.config_of("qwen2")), TrainingSpec(), CPU)


def test_weights_that_are_not_in_the_files_are_named(tmp_path):
    model = tiny.make_model("qwen2")
    model.save_pretrained(tmp_path)
    tiny.config_of("qwen2", num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights of Qwen2ForCausalLM .*model\.layers\.2.*config\.json says 4 layers"):
        load_model(str(tmp_path), TrainingSpec(), CPU)


def test_dropout_of_every_kind_is_off_and_the_saved_configuration_keeps_it():
    model = make_model("seed_oss")
    assert model.config.residual_dropout > 0
    model = prepare_model(model, TrainingSpec(), CPU).train()
    ids = torch.tensor([random_ids(12, 1)])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert model.config.residual_dropout > 0


def test_router_noise_is_off():
    model = prepare_model(make_model("mixtral"), TrainingSpec(), CPU).train()
    ids = torch.tensor([random_ids(12, 1)])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_family_without_activation_checkpointing_names_the_keyword():
    with pytest.raises(ValueError, match="leave out activation_checkpointing"):
        Policy(prepare_model(make_model("ctrl"), TrainingSpec(), CPU), "fp32", recompute=True)


def test_misspelt_modules_of_adapters_get_the_nearest_names():
    training = TrainingSpec(lora_rank=2, lora_target_modules=["qproj"])
    with pytest.raises(ValueError, match=r"lora_target_modules 'qproj'.*did you mean .*q_proj"):
        prepare_model(tiny.make_model("qwen2"), training, CPU)


def test_adapters_that_the_model_would_read_past_are_refused():
    training = TrainingSpec(lora_rank=2, lora_target_modules=["dt_proj"])
    with pytest.raises(ValueError, match="leave it out of lora_target_modules"):
        prepare_model(make_model("mamba"), training, CPU)


def test_tokens_beyond_the_embedding_name_both_sizes():
    from nemo_rl.model.limits import check_tokens

    model = tiny.make_model("qwen2")
    check_tokens(model, 96)
    with pytest.raises(ValueError, match=r"token 97 .*has 97 rows.*resize_token_embeddings"):
        check_tokens(model, 97)


def test_sequences_beyond_a_table_of_positions_are_refused_and_others_are_not():
    from nemo_rl.model.limits import check_positions

    check_positions(tiny.make_model("gpt2"), 256, "rows")
    check_positions(tiny.make_model("qwen2"), 100_000, "rows")
    with pytest.raises(ValueError, match=r"up to 257 tokens.*positions for 256.*max_sequence_length to at most 256"):
        check_positions(tiny.make_model("gpt2"), 257, "rows")
