"""What autograd keeps of a training pass, by the bytes of the tensors that it saves, and that gradients are plain transformers'."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from nemo_rl.model.norms import LeanNorm, make_norms_lean, own_norms
from nemo_rl.model.packing import TokenSequence, pack
from nemo_rl.model.policy import Policy
from unit.engine.tiny import config_of, random_ids

ROWS, WIDTH = 40, 32


def kept(work: Callable[[], Tensor], known: list[Tensor]) -> tuple[Tensor, int]:
    """What `work` returns, and the bytes that autograd keeps for it beside the tensors that are there anyway."""
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = work()
    there = {tensor.untyped_storage()._cdata for tensor in known}
    return out, sum(storage.nbytes() for key, storage in storages.items() if key not in there)


def norm_of(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    norm = kind(WIDTH, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))
    return norm.to(dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm])
def test_a_norm_keeps_its_input_and_one_number_a_row(
    kind: type[nn.Module], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    plain = norm_of(kind, weight_dtype)
    lean = copy.deepcopy(plain)
    assert make_norms_lean(nn.ModuleList([lean])) == 1
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, ROWS // 2, WIDTH, generator=generator).to(dtype)
    direction = torch.randn(2, ROWS // 2, WIDTH, generator=generator)
    found = []
    for norm in (plain, lean):
        inputs = x.clone().requires_grad_()
        out, size = kept(lambda norm=norm, inputs=inputs: norm(inputs), [inputs, *norm.parameters()])
        gradients = torch.autograd.grad((out.float() * direction).sum(), (inputs, norm.weight))
        found.append((size, out.detach(), *gradients))
    assert found[0][0] >= ROWS * WIDTH * dtype.itemsize, "transformers' own keeps at least one copy of the input"
    assert found[1][0] == ROWS * 4
    exact = dtype == weight_dtype == torch.float32
    for own, ours in zip(found[0][1:], found[1][1:], strict=True):
        assert own.dtype == ours.dtype
        size = own.float().abs().max().item()
        torch.testing.assert_close(ours.float(), own.float(), rtol=0, atol=(2e-6 if exact else 2e-2) * size)


def test_a_norm_that_computes_something_else_stays_as_it_is() -> None:
    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 0.01

    kinds = [
        Shifted(WIDTH),
        MambaRMSNormGated(WIDTH, WIDTH),
        Qwen3NextRMSNormGated(WIDTH),
        nn.LayerNorm(WIDTH),
        nn.RMSNorm(WIDTH, eps=1e-5),
    ]
    model = nn.ModuleList(kinds)
    before = [type(module) for module in kinds]
    assert make_norms_lean(model) == 0
    assert [type(module) for module in kinds] == before


def test_copies_and_pickles_of_a_model_have_the_norms_of_transformers() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of("qwen2"))
    own = type(model.model.norm)
    assert make_norms_lean(model) > 0
    assert isinstance(model.model.norm, LeanNorm) and isinstance(model.model.norm, own)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.model.norm) is own
        assert torch.equal(other.model.norm.weight, model.model.norm.weight)
        assert other.model.norm.weight is not model.model.norm.weight
    with own_norms(model):
        assert type(model.model.norm) is own
    assert isinstance(model.model.norm, LeanNorm)


SEQUENCES = [TokenSequence(random_ids(n, n), 1) for n in (30, 31, 9)]
TOKENS = sum(len(sequence.ids) for sequence in SEQUENCES)


def kept_by(family: str, **changes: Any) -> int:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes))
    policy = Policy(model, "fp32")
    assert policy.layout == "packed"
    return kept(lambda: policy.logprobs(pack(SEQUENCES)), [*model.parameters(), *model.buffers()])[1]


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_keys_and_values_are_not_kept_once_for_each_head_of_queries(family: str) -> None:
    """As fused attention has it, and, with soft caps, attention that is written out."""
    heads, layers = 4, 2
    width = 8
    saved = kept_by(family, num_key_value_heads=heads) - kept_by(family, num_key_value_heads=1)
    assert saved > 0.9 * layers * 2 * (heads - 1) * width * TOKENS * 4, "repeated heads would be kept of either model"


def test_a_pass_keeps_no_second_copy_of_what_norms_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, width = 2, 32
    lean = kept_by("qwen2")
    monkeypatch.setattr("nemo_rl.model.policy.make_norms_lean", lambda model: 0)
    assert kept_by("qwen2") - lean >= 2 * layers * width * TOKENS * 4
