"""How much memory a rank takes when ranks share a model: peak bytes of tensors in a step, and host memory while loading.

    python benchmarks/memory.py [--models 125M 350M] [--ranks 1 2 4 8] [--out results.md]

CPU, processes with gloo, float32. Each rank trains two steps of SFT by `nemo_rl.train` on sequences of a few tokens, so that
activations are small beside weights, gradients and optimizer; all tensors alive count, those that travel too. Beside it the
same model under PyTorch's FSDP2 as its documentation has it (`fully_shard` on each layer and the root, AdamW), in the same
processes, on sequences of the same length.

Limits: (16 / N + 1) bytes a trained parameter and two blocks; 1.05 x plain FSDP2; while loading 1.2 x the shard and one block.
A block is the largest part that is made whole at once: in a step its weights and their gradient, while loading its weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

MODELS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 512},
    "125M": {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "vocab_size": 32000},
    "350M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "vocab_size": 32000},
}
TOKENS = 6
STEP_FACTOR, PLAIN_FACTOR, LOAD_FACTOR = 1.0, 1.05, 1.2
SEEN = 2**12
"""Smaller tensors are not followed: there are many of them, and they weigh nothing."""


class PeakOfTensors(TorchDispatchMode):
    """Follows the storages of all tensors that are alive; `peak` is the most that they held since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, StorageWeakRef] = {}
        self.peak = 0
        for found in gc.get_objects():
            if issubclass(type(found), Tensor) and not issubclass(type(found), DTensor):
                self._follow(found)

    def restart(self) -> None:
        self.peak = 0
        self._measure()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does inside comes here
        result = function(*args, **(kwargs or {}))
        made = [each for each in torch.utils._pytree.tree_leaves(result) if isinstance(each, Tensor)]
        if any([self._follow(each) for each in made]):
            self._measure()
        return result

    def _follow(self, tensor: Tensor) -> bool:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return False
        if tensor.device.type == "meta" or (storage.nbytes() < SEEN and storage.nbytes() > 0):
            return False
        self.storages[storage._cdata] = StorageWeakRef(storage)
        return True

    def _measure(self) -> None:
        total = 0
        for key, reference in list(self.storages.items()):
            if reference.expired():
                del self.storages[key]
                continue
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                total += storage.nbytes()
        self.peak = max(self.peak, total)


class HostMemory(threading.Thread):
    """The most memory of its own that this process had while it ran, beyond what it had before."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.most, self.done = anonymous(), 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, anonymous() - self.before)

    def end(self) -> int:
        self.most = max(self.most, anonymous() - self.before)
        self.done.set()
        return self.most


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this measurement needs Linux")


# --- the model -------------------------------------------------------------------------------------------------------


def write_model(folder: Path, settings: dict[str, int]) -> None:
    """A Qwen2 model of random weights, and a tokenizer of digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    # byte-level, as transformers rebuilds the tokenizer of a Qwen2 model
    tokens = {token: i for i, token in enumerate(["<pad>", "<|endoftext|>", *"0123456789"])}
    tokenizer = Tokenizer(models.BPE(tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    heads = settings["hidden_size"] // 64
    config = Qwen2Config(
        **settings,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


# --- one rank --------------------------------------------------------------------------------------------------------


def ours(folder: Path, output: Path) -> dict[str, Any]:
    """Trains as a user does; measures loading and the second step."""
    import nemo_rl
    from nemo_rl.model import load
    from nemo_rl.model.sharding import blocks_of
    from nemo_rl.trainers import loading

    found: dict[str, Any] = {}
    name = "load_sharded" if int(os.environ["WORLD_SIZE"]) > 1 else "load_model"
    whole = getattr(loading, name)

    def measured(*args: Any, **options: Any) -> Any:
        gc.collect()
        memory = HostMemory()
        memory.start()
        try:
            return whole(*args, **options)
        finally:
            found["loading"] = memory.end()

    setattr(loading, name, measured)
    assert getattr(load, name) is whole

    class Watch:
        def on_train_begin(self, trainer: Any) -> None:
            blocks = trainer.sharded.blocks if trainer.sharded else blocks_of(trainer.policy.causal)
            parts = [list(block.parameters()) for block in blocks]
            inside = {id(p) for part in parts for p in part}
            parts.append([p for p in trainer.model.parameters() if id(p) not in inside])
            found["block"] = max(sum(p.numel() for p in part) for part in parts)
            found["parameters"] = sum(p.numel() for p in trainer.policy.trainable)

        def on_epoch_begin(self, trainer: Any, epoch: int) -> None: ...
        def on_step_begin(self, trainer: Any, step: int) -> None:
            if step == 2:
                gc.collect()
                self.peak = PeakOfTensors()
                self.peak.__enter__()
                self.peak.restart()

        def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
            if step == 2:
                self.peak.__exit__(None, None, None)
                found["step"] = self.peak.peak

        def on_epoch_end(self, trainer: Any, epoch: int, metrics: dict[str, Any]) -> None: ...
        def on_train_end(self, trainer: Any, result: Any) -> None: ...

    rows = [{"prompt": "01", "completion": "0123456789"[: TOKENS - 3]}] * 16  # and the end of the text
    nemo_rl.train(
        str(folder),
        rows,
        algorithm="sft",
        output_dir=output,
        backend="local",
        log_level="error",
        callbacks=[Watch()],
        batch_size=int(os.environ["WORLD_SIZE"]),
        max_steps=2,
        max_epochs=9,
        save_every=None,
        resume="never",
    )
    return found


def plain(folder: Path) -> int:
    """The peak of the second step of the same model under FSDP2 as PyTorch's documentation applies it."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if dist.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.arange(2, 2 + TOKENS)[None]
    peak = None
    for step in range(2):
        if step == 1:
            gc.collect()
            peak = PeakOfTensors()
            peak.__enter__()
            peak.restart()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert peak is not None
    peak.__exit__(None, None, None)
    return peak.peak


def rank(folder: Path, small: Path, scratch: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(small)  # what libraries make once is not the model's memory
    found = ours(folder, scratch / "run")
    gc.collect()
    found["plain"] = plain(folder)
    return found


# --- all ranks -------------------------------------------------------------------------------------------------------


def on_ranks(size: int, work: Callable[[int], Any], seconds: float) -> list[Any]:
    """What `work` returned on each rank, which gets its number; JSON. The ranks are forked from this process, which has all
    that they import, with the environment that torchrun makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as kept:
        pids = []
        for number in range(size):
            pid = os.fork()
            if pid == 0:
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
                os.environ |= where | {"RANK": str(number), "LOCAL_RANK": str(number)}
                try:
                    Path(kept, f"rank{number}.json").write_text(json.dumps(work(number)))
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            pids.append(pid)
        wait_for(pids, time.monotonic() + seconds)
        return [json.loads(Path(kept, f"rank{number}.json").read_text()) for number in range(size)]


def wait_for(pids: list[int], deadline: float) -> None:
    """Returns when all have ended well; ends the others where one has not, or at the deadline."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        if any(codes.values()) or time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            raise RuntimeError(f"ranks ended with {codes}; see above")
        time.sleep(0.05)


def load_libraries() -> None:
    """Imports what every rank needs; this process computes nothing, so that it can be forked."""
    import datasets  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import nemo_rl.api.training
    import nemo_rl.run.checkpoint_tensors
    import nemo_rl.trainers.sft  # noqa: F401


def row(model: str, size: int, ranks: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """A line of the table, and what is over its limit."""
    parameters, block = ranks[0]["parameters"], ranks[0]["block"]
    step, loading, beside = (max(found[what] for found in ranks) for what in ("step", "loading", "plain"))
    limit = (16 / size + STEP_FACTOR) * parameters + 2 * 8 * block
    limit_loading = LOAD_FACTOR * 4 * parameters / size + 4 * block
    over = []
    if step > limit:
        over.append(f"{model}, {size} ranks: a step took {step / 1e6:.0f} MB, the limit is {limit / 1e6:.0f}")
    if size > 1 and step > PLAIN_FACTOR * beside:
        over.append(f"{model}, {size} ranks: a step took {step / beside:.3f} x plain FSDP2")
    if size > 1 and loading > limit_loading:
        over.append(
            f"{model}, {size} ranks: loading took {loading / 1e6:.0f} MB, the limit is {limit_loading / 1e6:.0f}"
        )
    shown = [model, str(size), f"{parameters / 1e6:.1f} M", f"{block / 1e6:.1f} M"]
    shown += [f"{step / 1e6:.0f}", f"{limit / 1e6:.0f}", f"{beside / 1e6:.0f}", f"{step / beside:.3f}"]
    shown += [f"{loading / 1e6:.0f}", f"{limit_loading / 1e6:.0f}" if size > 1 else "–"]
    return f"| {' | '.join(shown)} |", over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["125M", "350M"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=1800, help="after which a measurement counts as hanging")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    heads = [
        "model",
        "ranks",
        "parameters",
        "block",
        "step, MB",
        "limit",
        "plain FSDP2, MB",
        "ratio",
        "loading, MB",
        "limit",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    exceeded = []
    with tempfile.TemporaryDirectory() as kept:
        small = Path(kept) / "small"
        load_libraries()
        on_ranks(1, lambda _: write_model(small, MODELS["tiny"]), options.seconds)
        for model in options.models:
            folder = Path(kept) / model
            on_ranks(1, lambda _, folder=folder, model=model: write_model(folder, MODELS[model]), options.seconds)
            for size in options.ranks:
                with tempfile.TemporaryDirectory() as scratch:
                    work = partial(rank, folder, small, Path(scratch))
                    line, over = row(model, size, on_ranks(size, lambda _, work=work: work(), options.seconds))
                print(line, flush=True)
                lines.append(line)
                exceeded += over
    text = "\n".join(lines)
    print(f"\n{text}\n")
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    for sentence in exceeded:
        print(f"over the limit: {sentence}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
