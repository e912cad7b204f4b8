"""Log-probabilities and gradients of `Policy` against plain transformers, for every way that it can take."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_rl.job.spec import TrainingSpec
from nemo_rl.model.load import prepare_model
from nemo_rl.model.packing import TokenSequence, pack, plan_microbatches
from nemo_rl.model.policy import PATHS, Policy
from unit.engine import tiny
from unit.engine.tiny import FAMILIES, gradient, plain_logprobs, random_ids, relative

LENGTHS = (3, 17, 9, 9, 26, 2, 12)

# the same function in another order of sums; where float32 itself is no nearer to float64, more cannot be asked
EXACT = 2e-6
INVARIANT = 1e-6


def policy_of(model: nn.Module, path: str | None = None, precision: str = "fp32", **options: Any) -> Policy:
    if getattr(model.config, "rope_parameters", None) and model.config.rope_parameters.get("rope_type") == "dynamic":
        options["longest"] = 16  # beyond it the frequencies follow the length of each call
    policy = Policy(model, precision, **options)
    if path is not None:
        policy.path = path
    return policy


def some_sequences() -> list[TokenSequence]:
    """Sequences of many lengths with boundaries, masks, and two groups that share a prompt."""
    found = [TokenSequence(random_ids(n, i), 1 + i % 3) for i, n in enumerate(LENGTHS)]
    ids = random_ids(15, 40)
    found.append(TokenSequence(ids, 1, mask=[i % 3 != 0 for i in range(15)]))
    for group in range(2):
        prompt = random_ids(5 + 4 * group, 50 + group)
        for sample in range(3):
            completion = random_ids(1 + 5 * sample, 60 + 3 * group + sample)
            found.append(TokenSequence(prompt + completion, len(prompt), group=group, shared=len(prompt)))
    return found


def is_trained(sequence: TokenSequence, position: int) -> bool:
    return sequence.mask[position] if sequence.mask is not None else position >= sequence.first_target


def outer_weight(sequence: int, position: int) -> float:
    """A weight that differs from token to token, so that no two can be mixed up unseen."""
    return 0.3 + ((7 * sequence + 3 * position) % 11) / 11


def plain_loss(model: nn.Module, sequences: list[TokenSequence], temperature: float = 1.0) -> Tensor:
    """The weighted sum of log-probabilities, sequence by sequence."""
    total = torch.zeros(())
    for i, sequence in enumerate(sequences):
        logprobs = plain_logprobs(model, sequence.ids, temperature)
        for position in range(1, len(sequence.ids)):
            if is_trained(sequence, position):
                total = total + outer_weight(i, position) * logprobs[position - 1]
    return total


def policy_loss(policy: Policy, sequences: list[TokenSequence], temperature: float, members: list[int]) -> Tensor:
    batch = pack([sequences[i] for i in members])
    weights = [
        outer_weight(members[i], position)
        for i in batch.order
        for position in range(1, len(sequences[members[i]].ids))
        if is_trained(sequences[members[i]], position)
    ]
    return (policy.logprobs(batch, temperature) * torch.tensor(weights)).sum()


def of_policy(
    policy: Policy, sequences: list[TokenSequence], temperature: float = 1.0, budget: int = 10**9
) -> tuple[float, Tensor]:
    total = 0.0
    for members in plan_microbatches(sequences, budget):
        loss = policy_loss(policy, sequences, temperature, members)
        loss.backward()
        total += loss.item()
    return total, gradient(policy.model)


def of_plain(model: nn.Module, sequences: list[TokenSequence], temperature: float = 1.0) -> tuple[float, Tensor]:
    loss = plain_loss(model, sequences, temperature)
    loss.backward()
    return loss.item(), gradient(model)


def assert_same(found: tuple[float, Tensor], expected: tuple[float, Tensor], tolerance: float = EXACT) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert relative(found[1], expected[1]) <= tolerance


# ------------------------------------------------------------------ which way


@pytest.mark.parametrize("family", FAMILIES)
def test_models_run_packed_and_never_make_all_logits(model_of, family: str):
    assert policy_of(model_of(family)).path == "packed"


def test_a_model_that_changes_its_logits_in_its_own_way_is_asked_for_logits():
    model = tiny.make_model("gpt2")
    plain = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * torch.linspace(0.5, 2.0, tiny.VOCABULARY)
        return out

    model.forward = shifted
    policy = policy_of(model)
    assert policy.path == "packed, logits"
    assert_same(of_policy(policy, some_sequences()), of_plain(model, some_sequences()))


# ------------------------------------------------------------------ equality with transformers

WAYS = [(family, "packed") for family in FAMILIES]
WAYS += [(family, path) for family in ("qwen2", "gemma2", "gpt2") for path in PATHS if path != "packed"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("family", "path"), WAYS)
def test_loss_and_gradient_are_those_of_transformers(model_of, family: str, path: str, temperature: float):
    model, sequences = model_of(family), some_sequences()
    if family == "dynamic_rope":  # its frequencies depend on the length of a call beyond the original 16 tokens
        sequences = [s for s in sequences if len(s.ids) <= 16]
    policy = policy_of(model, path)
    assert_same(of_policy(policy, sequences, temperature), of_plain(model, sequences, temperature))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi"])
def test_each_log_probability_is_that_of_transformers(model_of, family: str):
    model, sequences = model_of(family), some_sequences()
    batch = pack(sequences)
    with torch.no_grad():
        found = policy_of(model).logprobs(batch)
        expected = [
            plain_logprobs(model, sequences[i].ids)[position - 1]
            for i in batch.order
            for position in range(1, len(sequences[i].ids))
            if is_trained(sequences[i], position)
        ]
    assert (found - torch.stack(expected)).abs().max().item() <= 1e-5


@pytest.mark.parametrize("budget", [1, 20, 45, 10**9])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_the_token_budget_never_changes_the_gradient(model_of, family: str, budget: int):
    policy, sequences = policy_of(model_of(family)), some_sequences()
    assert_same(of_policy(policy, sequences, budget=budget), of_policy(policy, sequences, budget=60), INVARIANT)


@pytest.mark.parametrize("views", [1, 2, 3, 50])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_padding_never_changes_the_gradient(model_of, monkeypatch, family: str, views: int):
    policy, sequences = policy_of(model_of(family)), some_sequences()
    expected = of_policy(policy, sequences)
    monkeypatch.setattr("nemo_rl.model.packing.ATTENTION_VIEWS", views)
    assert_same(of_policy(policy, sequences), expected, INVARIANT)


def test_sharing_a_prompt_never_changes_the_gradient(model_of):
    policy, sequences = policy_of(model_of("qwen2")), some_sequences()
    apart = [TokenSequence(s.ids, s.first_target, s.mask) for s in sequences]
    assert_same(of_policy(policy, sequences), of_policy(policy, apart), INVARIANT)


def test_the_order_of_sequences_never_changes_the_loss(model_of):
    policy, sequences = policy_of(model_of("mistral")), some_sequences()
    with torch.no_grad():
        alone = [policy_loss(policy, sequences, 1.0, [i]).item() for i in range(len(sequences))]
        backwards = policy_loss(policy, sequences, 1.0, list(reversed(range(len(sequences))))).item()
    assert backwards == pytest.approx(sum(alone), rel=EXACT)


def test_a_long_sequence_after_short_ones_gets_right_positions(model_of):
    """Tables of positions grow; those made in a rollout serve training too."""
    model = tiny.make_model("llama3_rope", max_position_embeddings=4096)
    policy = policy_of(model)
    with torch.inference_mode():
        policy.logprobs(pack([TokenSequence(random_ids(5, 1), 1)]))
    long = [TokenSequence(random_ids(1100, 2), 1080)]
    assert_same(of_policy(policy, long), of_plain(model, long), tolerance=1e-5)


# ------------------------------------------------------------------ activation checkpointing, bf16


def forwards_of_layers(model: nn.Module, counted: type[nn.Module]) -> list[int]:
    calls = [0]
    for module in model.modules():
        if type(module) is counted:
            module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize(
    ("family", "path"), [("qwen2", "packed"), ("qwen2", "hidden"), ("gpt2", "hidden"), ("gpt2", "logits")]
)
def test_activation_checkpointing_gives_the_same_gradient(family: str, path: str):
    sequences = some_sequences()
    expected = of_policy(policy_of(tiny.make_model(family), path), sequences)
    policy = policy_of(tiny.make_model(family), path, recompute=True)
    assert_same(of_policy(policy, sequences), expected, tolerance=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_activation_checkpointing_makes_activations_again_in_the_backward_pass(family: str):
    model = tiny.make_model(family)
    policy = policy_of(model, recompute=True)
    calls = forwards_of_layers(model, type(next(m for m in model.modules() if type(m).__name__.endswith("MLP"))))
    loss = policy_loss(policy, some_sequences(), 1.0, [0, 1, 2])
    forward = calls[0]
    loss.backward()
    assert calls[0] == 2 * forward
    assert not model.training


@pytest.mark.parametrize(
    ("family", "path"), [("qwen2", "packed"), ("llama", "packed"), ("qwen3", "hidden"), ("gpt2", "hidden")]
)
def test_bf16_compute_is_close_to_fp32_with_gradients_in_fp32(model_of, family: str, path: str):
    model, sequences = model_of(family), some_sequences()
    expected = of_policy(policy_of(model, path), sequences)
    found = of_policy(policy_of(model, path, precision="bf16"), sequences)
    assert found[1].dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert found[0] == pytest.approx(expected[0], rel=0.02)
    assert relative(found[1], expected[1]) <= 0.1


def with_exact_head(model: nn.Module, ids: list[int]) -> Tensor:
    """Logits in float32 of what a plain model hands to its output layer while the rest computes in bf16."""
    given: list[Tensor] = []
    taken = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        taken.remove()
    head = model.get_output_embeddings()
    return torch.nn.functional.linear(given[0][0].float(), head.weight, head.bias)


@pytest.mark.parametrize(("family", "path"), [("qwen2", "packed"), ("llama", "hidden"), ("gpt2", "logits")])
def test_logits_in_float32_are_those_of_the_hidden_states_by_the_float32_weights(family: str, path: str):
    model, ids = tiny.make_model(family), random_ids(20, 3)
    expected = with_exact_head(model, ids)[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    batch = pack([TokenSequence(ids, 1)])
    with torch.no_grad():
        rounded = policy_of(model, path, precision="bf16").logprobs(batch)
        policy = policy_of(model, path, precision="bf16", cast_lm_head_to_fp32=True)
        assert torch.allclose(policy.logprobs(batch), expected, atol=2e-6)
        assert (rounded - expected).abs().max() > 1e-4
        with policy.autocast():
            logits = policy.causal(input_ids=torch.tensor([ids]), use_cache=False).logits
    assert logits.dtype == torch.float32  # rollouts too
    assert torch.allclose(logits[0], with_exact_head(tiny.make_model(family), ids), atol=2e-6)


def test_gradients_through_a_float32_output_layer_are_close_to_those_in_float32(model_of):
    sequences = some_sequences()
    expected = of_policy(policy_of(model_of("qwen2")), sequences)
    policy = policy_of(tiny.make_model("qwen2"), precision="bf16", cast_lm_head_to_fp32=True)
    found = of_policy(policy, sequences)
    assert found[1].dtype == torch.float32
    assert relative(found[1], expected[1]) <= 0.1


def test_copies_pickles_and_later_runs_of_a_model_have_its_own_output_layer():
    model = tiny.make_model("llama")
    policy_of(model, precision="bf16", cast_lm_head_to_fp32=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.lm_head) is nn.Linear
    policy = policy_of(model, precision="bf16")
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad(), policy.autocast():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.dtype == torch.bfloat16


def test_an_output_layer_with_adapters_is_not_computed_in_float32():
    with pytest.raises(
        ValueError,
        match=r"found peft\.\S+\.Linear as the output layer of LlamaForCausalLM; expected a plain linear layer",
    ):
        policy_of(with_adapters("llama", lora_target_modules=["lm_head"]), cast_lm_head_to_fp32=True)


# ------------------------------------------------------------------ adapters


def with_adapters(family: str, **options: Any) -> nn.Module:
    """A model with adapters whose second factor is not zero, as after some training."""
    training = TrainingSpec(lora_rank=3, **options)
    model = prepare_model(tiny.make_model(family), training, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_adapters_are_those_of_plain_transformers(family: str, recompute: bool):
    model, sequences = with_adapters(family), some_sequences()
    expected = of_plain(model, sequences)
    assert expected[1].abs().max() > 0
    policy = policy_of(model, recompute=recompute)
    assert_same(of_policy(policy, sequences), expected)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head"], ["gate_proj"]])
def test_adapters_on_any_module_are_part_of_the_model(targets: list[str]):
    """Also when they are new: an adapter starts as zero, so a comparison of outputs at the start cannot find it."""
    training = TrainingSpec(lora_rank=3, lora_target_modules=targets)
    fresh = prepare_model(tiny.make_model("llama"), training, torch.device("cpu"))
    policy = policy_of(fresh)
    grown = with_adapters("llama", lora_target_modules=targets)
    fresh.load_state_dict(grown.state_dict())
    assert_same(of_policy(policy, some_sequences()), of_plain(grown, some_sequences()))


def test_without_adapters_the_policy_is_the_base_model():
    model, sequences = with_adapters("qwen2"), some_sequences()
    policy = policy_of(model)
    with torch.no_grad(), model.disable_adapter():
        found = policy_loss(policy, sequences, 1.0, list(range(len(sequences)))).item()
        expected = plain_loss(tiny.make_model("qwen2"), sequences).item()
    assert found == pytest.approx(expected, rel=EXACT)


# ------------------------------------------------------------------ models ready for training


def test_a_model_made_ready_has_no_dropout_and_fp32_weights():
    config = tiny.config_of("gpt2")
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.5
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model = prepare_model(model, TrainingSpec(), torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    sequences = some_sequences()
    policy = policy_of(model)
    assert_same(of_policy(policy, sequences), of_policy(policy, sequences), tolerance=1e-9)


def test_adapters_start_alike_for_equal_seeds_and_leave_the_global_generator_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, second = (
        prepare_model(tiny.make_model("qwen2"), TrainingSpec(lora_rank=2, seed=seed), torch.device("cpu"))
        for seed in (7, 7)
    )
    other = prepare_model(tiny.make_model("qwen2"), TrainingSpec(lora_rank=2, seed=8), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    values = [torch.cat([p.flatten() for p in m.parameters() if p.requires_grad]) for m in (first, second, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
