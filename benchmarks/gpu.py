"""What a GPU must prove, in at most eight minutes on one card of 80 GB: `make gpu`. Nothing is downloaded.

    python benchmarks/gpu.py [--device cuda|cpu] [--small] [--only NAME ...] [--results FOLDER]

Models are random, by configuration, from tiny to 1.5 billion parameters. Each part is a process with a limit of its own: one
that fails, hangs or runs out of memory is reported, and the others still run. The page benchmarks/results/gpu-<card>.md has
the result of each; the exit code is the number of parts that failed. `--device cpu --small` runs all that a CPU can prove.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 151936
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
"""The shapes of Qwen2.5, and one for the comparison of numbers."""
MEMORY_ERROR = 0.15
DIFFERENCE = 1e-3
"""Largest difference of a log-probability in fp32, in nats."""
PARTS: dict[str, int] = {
    "equal": 70,
    "rollouts": 50,
    "memory": 90,
    "sft": 50,
    "dpo": 50,
    "grpo": 130,
    "sharded": 70,
    "out_of_memory": 50,
}
"""Parts and their limits in seconds; the whole has one of its own."""
WHOLE_SECONDS = 480
CUDA_ONLY = {"out_of_memory"}


# --- models and trainers ----------------------------------------------------------------------------------------------


class Setting:
    """Where a part runs, and how large."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = device, small
        self.gpus = 1 if device == "cuda" else 0

    def model(self, size: str, **changed: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, Qwen2Config

        shape = dict(SIZES["tiny" if self.small else size])
        vocabulary = 512 if self.small or size == "tiny" else VOCABULARY
        config = Qwen2Config(
            **{**shape, "vocab_size": vocabulary, "num_key_value_heads": 2, "eos_token_id": 1, **changed},
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def trainer(self, algorithm: str, model: Any, **keywords: Any) -> Any:
        """A trainer of the model as it is before its first step, without data, folder and checkpoints."""
        from nemo_rl.api.algorithms import get_algorithm
        from nemo_rl.run.signals import StopSignals

        trainer: Any = get_algorithm(algorithm).from_pretrained(model, gpus=self.gpus, **keywords)
        trainer._load(None, None)
        trainer.signals, trainer.rate = StopSignals(), 1e-6
        return trainer

    def number(self, full: int, small: int) -> int:
        return small if self.small else full

    def synchronize(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Any, times: int = 2) -> float:
        """The shortest time of several, after one that warms up."""
        work()
        found = []
        for _ in range(times):
            self.synchronize()
            begun = time.perf_counter()
            work()
            self.synchronize()
            found.append(time.perf_counter() - begun)
        return min(found)


def ids(length: int, seed: int, vocabulary: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocabulary, (length,), generator=generator).tolist()


def texts(count: int, length: int, vocabulary: int) -> list[Any]:
    from nemo_rl.data.prepare import TextExample

    return [TextExample(ids(length, i, vocabulary), [True] * length) for i in range(count)]


# --- parts ------------------------------------------------------------------------------------------------------------


def equal(setting: Setting) -> dict[str, Any]:
    """Packed log-probabilities and gradients against the plain model, one sequence at a time, for several families."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen3Config

    from nemo_rl.model.packing import TokenSequence, pack
    from nemo_rl.model.policy import Policy
    from nemo_rl.model.probe import exact, plain_logprobs

    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    models = {
        "qwen2": setting.model("tiny"),
        "qwen3": AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads)),
        "gemma2": AutoModelForCausalLM.from_config(Gemma2Config(**shape, **heads, sliding_window=32)),
        "gpt2": AutoModelForCausalLM.from_config(GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4)),
    }
    found: dict[str, Any] = {}
    for name, model in models.items():
        policy = Policy(model.to(setting.device).eval(), "fp32")
        sequences = [TokenSequence(ids(n, n, 512), 1) for n in (5, 40, 77, 78)]
        with exact(model):
            values = policy.logprobs(pack(sequences, policy.device))
            batch = pack(sequences, policy.device)
            parts = [values[batch.rows_S == i] for i in range(len(sequences))]
            truth = [plain_logprobs(policy.causal, s.ids) for s in sequences]
            error = max((a - b).abs().max().item() for a, b in zip(parts, truth, strict=True))
            ours = torch.autograd.grad(values.sum(), policy.trainable, allow_unused=True)
            plain = torch.autograd.grad(
                sum(plain_logprobs(policy.causal, s.ids).sum() for s in sequences), policy.trainable, allow_unused=True
            )
        both = [(a, b) for a, b in zip(ours, plain, strict=True) if a is not None and b is not None]
        off = sum((a - b).square().sum() for a, b in both).sqrt() / sum(b.square().sum() for _, b in both).sqrt()
        found[f"{name} by {policy.path}"] = f"{error:.1e} nats, gradient {off.item():.1e}"
        if error > DIFFERENCE or off.item() > DIFFERENCE:
            raise AssertionError(f"{name} differs from the plain model: {found}; expected at most {DIFFERENCE}")
    return found


def rollouts(setting: Setting) -> dict[str, Any]:
    """Sampled completions: their log-probabilities against teacher forcing, in fp32 and in the precision of the device."""
    from nemo_rl.model.probe import exact, plain_logprobs

    found: dict[str, Any] = {}
    for precision, limit in (("fp32", DIFFERENCE), ("auto", 0.1)):
        trainer = setting.trainer("grpo", setting.model("tiny"), precision=precision, max_new_tokens=24)
        prompts = [ids(n, n, 512) for n in (4, 9, 17)]
        groups = _draw(trainer, prompts, samples=4, new=24)
        errors = []
        with exact(trainer.model):
            for prompt, completions in zip(prompts, groups, strict=True):
                for completion in completions:
                    truth = plain_logprobs(trainer.policy.causal, prompt + completion.ids)[len(prompt) - 1 :]
                    errors += [abs(a - b) for a, b in zip(completion.logprobs, truth.tolist(), strict=True)]
        mean = sum(errors) / len(errors)
        found[f"{precision}: mean, largest difference, nats"] = f"{mean:.1e}, {max(errors):.1e}"
        if mean > limit:
            raise AssertionError(f"sampled log-probabilities differ from the plain model by {mean:.2g} nats on average")
    return found


def _draw(trainer: Any, prompts: list[list[int]], samples: int, new: int) -> list[Any]:
    from nemo_rl.rollout.in_process.engine import generate
    from nemo_rl.rollout.protocol import Sampling

    return generate(trainer.policy, prompts, Sampling(samples, new), end_ids=[1], seed=1, step=1)


def memory(setting: Setting) -> dict[str, Any]:
    """The peak of real steps against the estimate, on this device."""
    import torch

    from nemo_rl.model.activations import LiveBytes
    from nemo_rl.model.memory import Planner, Where

    length, budget = setting.number(1024, 96), setting.number(8192, 384)
    cases: dict[str, dict[str, Any]] = {
        "full": {"activation_checkpointing": False},
        "full, checkpointing": {"activation_checkpointing": True},
        "LoRA": {"lora_rank": 16, "activation_checkpointing": False},
    }
    found: dict[str, Any] = {}
    worst = 0.0
    for name, keywords in cases.items():
        model = setting.model("0.5B")
        vocabulary = model.config.vocab_size
        options = {"tokens_per_microbatch": budget, "max_sequence_length": length, **keywords}
        trainer = setting.trainer("sft", model, **options)
        examples = texts(3 * budget // length, length, vocabulary)
        trainer.train_step(examples, 1)
        if setting.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            trainer.train_step(examples, 2)
            measured = torch.cuda.max_memory_allocated()
        else:
            states = [v for state in trainer.optimizer.adamw.state.values() for v in state.values()]
            standing = [*trainer.model.parameters(), *(v for v in states if isinstance(v, torch.Tensor))]
            with LiveBytes(standing) as live:
                trainer.train_step(examples, 2)
            measured = live.peak + sum(t.numel() * t.element_size() for t in standing)
        where = Where(1, device=setting.device)
        recompute = bool(keywords["activation_checkpointing"])
        estimate = Planner(model.config, trainer.config).estimate(where, budget, recompute)
        expected = sum(estimate.phases["training"].values())
        off = expected / measured - 1
        worst = max(worst, abs(off))
        found[name] = f"measured {measured / 2**20:,.0f} MiB, estimated {expected / 2**20:,.0f} MiB ({off:+.1%})"
        del trainer, model
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    if worst > MEMORY_ERROR:
        raise AssertionError(f"the estimate is off by {worst:.0%}, expected at most {MEMORY_ERROR:.0%}: {found}")
    return found


def sft(setting: Setting) -> dict[str, Any]:
    """Tokens per second of SFT."""
    model = setting.model("1.5B")
    length, count = setting.number(1024, 64), setting.number(32, 4)
    trainer = setting.trainer("sft", model, max_sequence_length=length)
    examples = texts(count, length, model.config.vocab_size)
    seconds = setting.seconds(lambda: trainer.train_step(examples, 1))
    return _speed(trainer, count * length, seconds)


def dpo(setting: Setting) -> dict[str, Any]:
    """Tokens per second of DPO, with reference log-probabilities known."""
    from nemo_rl.data.prepare import PairExample

    model = setting.model("1.5B")
    vocabulary = model.config.vocab_size
    prompt, answer, count = setting.number(256, 16), setting.number(512, 32), setting.number(16, 3)
    trainer = setting.trainer("dpo", model, max_sequence_length=prompt + answer)
    pairs = [
        PairExample(ids(prompt, i, vocabulary), ids(answer, 50 + i, vocabulary), ids(answer, 90 + i, vocabulary), i)
        for i in range(count)
    ]
    trainer.reference = trainer._reference(trainer.policy, pairs)
    seconds = setting.seconds(lambda: trainer.train_step(pairs, 1))
    return _speed(trainer, 2 * count * (prompt + answer), seconds)


def _speed(trainer: Any, tokens: int, seconds: float) -> dict[str, Any]:
    chosen = trainer.memory.sentence() if trainer.memory is not None else "no plan on the CPU"
    return {"tokens per second": round(tokens / seconds), "seconds a step": round(seconds, 2), "plan": chosen}


def grpo(setting: Setting) -> dict[str, Any]:
    """A step of GRPO: rollouts of 32 prompts × 16 × 512 tokens, then the update."""
    import torch

    from nemo_rl.data.prepare import PromptExample
    from nemo_rl.data.rows import PromptRow
    from nemo_rl.environments.runner import RewardOutcome
    from nemo_rl.trainers.grpo import Rollouts

    model = setting.model("1.5B")
    prompts, samples, new = setting.number(32, 2), setting.number(16, 4), setting.number(512, 8)
    options = {"num_generations_per_prompt": samples, "max_new_tokens": new, "max_sequence_length": new + 128}
    trainer = setting.trainer("grpo", model, **options)
    requests = [ids(100 if not setting.small else 10, i, model.config.vocab_size) for i in range(prompts)]
    _draw(trainer, requests[:1], samples=2, new=4)
    setting.synchronize()
    begun = time.perf_counter()
    groups = _draw(trainer, requests, samples, new)
    setting.synchronize()
    generated = time.perf_counter() - begun
    completions = [completion for group in groups for completion in group]
    examples = [PromptExample(i, prompt, PromptRow("")) for i, prompt in enumerate(requests)]
    outcomes = [RewardOutcome(0.0) for _ in completions]
    rollouts = Rollouts(examples, completions, ["" for _ in completions], outcomes, {})
    advantages = torch.linspace(-1, 1, len(completions))
    begun = time.perf_counter()
    metrics = trainer.train_on(rollouts, advantages, torch.ones(len(completions), dtype=torch.bool))
    setting.synchronize()
    trained = time.perf_counter() - begun
    tokens = sum(len(completion.ids) for completion in completions)
    if metrics["rollout_logprob_error"] > 0.1:
        raise AssertionError(f"sampling and training differ by {metrics['rollout_logprob_error']:.2g} nats a token")
    return {
        "seconds of rollouts": round(generated, 2),
        "sampled tokens per second": round(tokens / generated),
        "seconds of the update": round(trained, 2),
        "trained tokens per second": round(tokens / trained),
        "rollout_kl": f"{metrics['rollout_kl']:.1e}",
        "rollout_logprob_error": f"{metrics['rollout_logprob_error']:.1e}",
        **({"plan": trainer.memory.sentence()} if trainer.memory is not None else {}),
    }


def sharded(setting: Setting) -> dict[str, Any]:
    """Two processes, on a GPU both on one card, against one: the loss and the gradient's norm of three SFT steps."""
    found = [_ranks(setting, size) for size in (1, 2)]
    off = max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(*found, strict=True))
    limit = 1e-4 if setting.device == "cpu" else 2e-2
    if off > limit:
        raise AssertionError(f"two processes differ from one by {off:.1e} (relative): {found}")
    return {"largest relative difference of loss and gradient": f"{off:.1e}"}


def _ranks(setting: Setting, size: int) -> list[float]:
    command = [sys.executable, __file__, "--part", "rank", "--device", setting.device]
    command += ["--small"] if setting.small else []
    port = str(_free_port())
    processes = []
    for rank in range(size):
        where = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        where["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"  # two ranks of NCCL on one card
        processes.append(subprocess.Popen(command, env={**os.environ, **where}, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")
    return json.loads(outputs[0].strip().splitlines()[-1])["values"]


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def rank(setting: Setting) -> dict[str, Any]:
    """One rank of `sharded`."""
    from nemo_rl.api.algorithms import get_algorithm
    from nemo_rl.run.ranks import join
    from nemo_rl.run.signals import StopSignals

    model = setting.model("0.5B", num_hidden_layers=setting.number(6, 2))
    trainer: Any = get_algorithm("sft").from_pretrained(model, gpus=setting.gpus, max_sequence_length=256)
    trainer.ranks = join(trainer.device)
    trainer.signals, trainer.rate = StopSignals(), 1e-4
    trainer.ranks.requested = trainer.stop_requested
    trainer._load(None, None)
    values = []
    for step in (1, 2, 3):
        metrics = trainer.train_step(texts(6, setting.number(256, 48), model.config.vocab_size), step)
        values += [metrics["loss"], metrics["grad_norm"]]
    return {"values": values}


def out_of_memory(setting: Setting) -> dict[str, Any]:
    """A step whose first pass does not fit is made with smaller passes, and has the same loss."""
    import torch

    model = setting.model("0.5B")
    examples = texts(24, 1024, model.config.vocab_size)
    trainer = setting.trainer("sft", model, tokens_per_microbatch=2048, max_sequence_length=1024)
    expected = trainer.train_step(examples, 1)["loss"]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    taken = torch.cuda.max_memory_allocated()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.25 * taken / total))
    trainer.rate = 0.0
    trainer.training.tokens_per_microbatch = 24576
    loss = trainer.train_step(examples, 2)["loss"]
    torch.cuda.set_per_process_memory_fraction(1.0)
    if abs(loss - expected) > 2e-2 * abs(expected):
        raise AssertionError(f"found the loss {loss:.4f} after running out of memory, expected {expected:.4f}")
    return {"loss with room, and without": f"{expected:.4f}, {loss:.4f}"}


# --- all parts, each in a process of its own --------------------------------------------------------------------------


def run_part(name: str, arguments: argparse.Namespace, limit: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--part", name, "--device", arguments.device]
    command += ["--small"] if arguments.small else []
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"seconds": round(limit, 1), "error": f"did not end within its limit of {limit:.0f} s"}
    seconds = round(time.perf_counter() - begun, 1)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {"seconds": seconds, "error": lines[-1][:500] if lines else f"ended with {done.returncode}"}
    return {"seconds": seconds, "found": json.loads(done.stdout.strip().splitlines()[-1])}


def card(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()


def page(results: dict[str, dict[str, Any]], device: str, seconds: float) -> str:
    import torch
    import transformers

    lines = [
        f"# {card(device)}",
        "",
        f"By `python benchmarks/gpu.py`, {seconds:.0f} s; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}.",
        "",
        "| Part | Result | Seconds |",
        "| --- | --- | ---: |",
    ]
    for name, result in results.items():
        said = "; ".join(f"{key}: {value}" for key, value in result.get("found", {}).items())
        cell = said if "found" in result else f"**failed**: {result['error']}"
        lines.append(f"| {name} | {cell.replace('|', '/')} | {result['seconds']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: seconds in place of minutes")
    parser.add_argument("--only", nargs="*", choices=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(globals()[arguments.part](Setting(arguments.device, arguments.small))))
        return 0
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("found no CUDA device; expected one, or --device cpu --small for what a CPU can prove", file=sys.stderr)
        return 2
    begun = time.perf_counter()
    results = {}
    for name in arguments.only or PARTS:
        if name in CUDA_ONLY and arguments.device != "cuda":
            continue
        left = WHOLE_SECONDS - (time.perf_counter() - begun)
        if left < 5:
            results[name] = {"seconds": 0.0, "error": f"no time was left of {WHOLE_SECONDS} s"}
            continue
        results[name] = run_part(name, arguments, min(PARTS[name], left))
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    seconds = time.perf_counter() - begun
    name = re.sub(r"[^a-z0-9]+", "-", card(arguments.device).lower()).strip("-")
    file = arguments.results / f"gpu-{name}.md"
    file.write_text(page(results, arguments.device, seconds), encoding="utf-8")
    print(f"wrote {file}")
    return sum("error" in result for result in results.values())


if __name__ == "__main__":
    raise SystemExit(main())
