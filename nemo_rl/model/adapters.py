"""LoRA adapters (arXiv 2106.09685) by peft: which modules take them, and what to do about names that are not there."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import torch
from torch import nn

from nemo_rl.extras import missing
from nemo_rl.job.spec import TrainingSpec

ALL_LINEAR = "all-linear"


def add_adapters(model: Any, training: TrainingSpec) -> nn.Module:
    """Returns the model with frozen weights and new adapters. Raises MissingPackage without peft, ValueError if modules are not there."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise missing("lora_rank", error.name or "peft") from None
    wanted = training.lora_target_modules
    if wanted:
        _check_names(model, wanted)
    config = LoraConfig(
        r=training.lora_rank,
        lora_alpha=training.lora_alpha if training.lora_alpha is not None else 2 * training.lora_rank,
        target_modules=wanted or _every_linear(model),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # merged checkpoints untie them
        # a name that transformers has replaced and peft still asks for
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        torch.manual_seed(training.seed)
        try:
            return get_peft_model(model, config).eval()
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"peft cannot adapt lora_target_modules={wanted or ALL_LINEAR!r} of {type(model).__name__}: "
                f"{str(error).strip().splitlines()[0]}; give other lora_target_modules, such as {_some_linear(model)}"
            ) from error


def _every_linear(model: Any) -> str | list[str]:
    """Returns peft's word for every linear layer, or the names of those that can be adapted where some cannot.

    A router or a grouped projection that is derived from a linear layer computes something else with its weight; where a
    model reads a layer's weight without calling the layer, as Mamba does, an adapter would have no effect until it is merged;
    and peft goes by the last part of a name, which a module of another kind may have too, as in the towers of Gemma 3n.
    """
    head, unused = model.get_output_embeddings(), _never_called(model)
    good, bad, others = set(), set(), set()
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and module is not head:
            fits = _is_linear(module) and last not in unused and not _read_past_adapters(model, last)
            (good if fits else bad).add(last)
        elif module is not head and list(module.children()):
            others.add(last)
    bad |= good & others
    return sorted(good - bad) if bad else ALL_LINEAR


@torch.no_grad()
def _never_called(model: nn.Module) -> set[str]:
    """Returns the last names of the layers with a weight none of which is called when the model runs."""
    layers = [(name.rsplit(".", 1)[-1], module) for name, module in model.named_modules() if name]
    layers = [(last, module) for last, module in layers if isinstance(module, nn.Linear | nn.Embedding)]
    called: set[str] = set()
    hooks = [layer.register_forward_pre_hook(lambda *_, last=last: called.add(last)) for last, layer in layers]
    try:
        device = next(model.parameters()).device
        model(input_ids=torch.arange(4, 8, device=device)[None], use_cache=False)
    except Exception:  # the proof before step 1 says in words that the model cannot run
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    return {last for last, _ in layers} - called


@torch.no_grad()
def _is_linear(module: nn.Linear) -> bool:
    """Whether a layer computes the product with its weight and nothing else; of a class of its own that is measured."""
    if type(module) is nn.Linear:
        return True
    x = torch.linspace(-1, 1, 2 * module.in_features, device=module.weight.device, dtype=module.weight.dtype)
    x = x.view(1, 2, -1)
    try:
        found = module(x)
    except Exception:  # it wants something else than a linear layer does
        return False
    expected = torch.nn.functional.linear(x, module.weight, module.bias)
    return (
        isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)
    )


def _read_past_adapters(model: Any, name: str) -> bool:
    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    except ImportError:  # other versions of peft may refuse nothing
        return False
    kind: Any = type("Kind", (), {"peft_type": "LORA"})
    try:
        _check_lora_target_modules_mamba(kind, model, name)
    except ValueError:
        return True
    return False


def _check_names(model: nn.Module, wanted: list[str]) -> None:
    modules = [name for name, _ in model.named_modules() if name]
    unused = _never_called(model)
    for name in wanted:
        if name == ALL_LINEAR or any(module == name or module.endswith(f".{name}") for module in modules):
            if name.rsplit(".", 1)[-1] in unused:
                raise ValueError(
                    f"found lora_target_modules {name!r}, but {type(model).__name__} reads the weight of that layer without "
                    "calling it, so an adapter would have no effect in training; leave it out of lora_target_modules"
                )
            continue
        last = sorted(
            {module.rsplit(".", 1)[-1] for module, m in model.named_modules() if not list(m.children())} - {""}
        )
        near = difflib.get_close_matches(name, last, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"found lora_target_modules {name!r}, but {type(model).__name__} has no module of that name; {hint}"
            f"expected names among {', '.join(_some_linear(model))}, or leave it out to adapt every linear layer"
        )


def _some_linear(model: nn.Module) -> list[str]:
    """Returns the last names of the modules that adapters are usually put on."""
    kinds = (nn.Linear, nn.Embedding)
    found = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, kinds)}
    return sorted(name for name in found if not name.isdigit())
