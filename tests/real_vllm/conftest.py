"""Real vLLM servers on the CPU. Starting one takes up to minutes, so that tests share those of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.job.spec import RolloutSpec, TrainingSpec
from nemo_rl.model.load import prepare_model
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.protocol import Sampling
from nemo_rl.rollout.vllm.engine import VLLMRollouts
from nemo_rl.rollout.vllm.server import ServerProcess
from nemo_rl.run.ranks import Ranks
from real_vllm.environment import interpreter
from real_vllm.warm import Warm, warm_starts
from unit.engine.tiny import make_model

STARTUP_SECONDS = 1800.0
LONGEST = 96
WIDE = 128
"""Hidden size: vLLM's attention on the CPU takes heads of 32 and more."""
ENDS = list(range(0, 97, 13))
"""Tokens that end completions in these tests: enough of them that lengths differ."""


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Where servers come from that are started with `vllm_python`."""
    python = str(interpreter())
    process = Warm(python, tmp_path_factory.mktemp("warm"))
    with pytest.MonkeyPatch.context() as patched:
        warm_starts(patched.setattr, python, process.address)
        yield process
    process.close()


@pytest.fixture(scope="session")
def vllm_python(warm: Warm) -> str:
    """An interpreter with vLLM; servers with it are forks of one process that has imported vLLM."""
    return str(interpreter())


@pytest.fixture(scope="session")
def cold_python() -> str:
    """The same interpreter by another name, whose servers are started as users' are."""
    return str(interpreter().with_name("python3"))


class Plain:
    """A tokenizer of 97 tokens that vLLM can load, for models whose tokens mean nothing."""

    def __new__(cls) -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {f"<{i}>": i for i in range(97)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<1>", unk_token="<0>")


Start = Callable[..., tuple[VLLMRollouts, Policy]]


@contextmanager
def _starting(vllm_python: str, folder: Path) -> Iterator[Start]:
    engines: list[VLLMRollouts] = []

    def started(model: Any, *, lora_rank: int | None = None, probe: Sampling | None = None, **spec: Any) -> Any:
        training = TrainingSpec(lora_rank=lora_rank, precision="fp32")
        policy = Policy(prepare_model(model, training, torch.device("cpu")), "fp32", longest=LONGEST)
        given = {"engine": "vllm", "python": vllm_python, "timeout_seconds": STARTUP_SECONDS, **spec}
        engine = VLLMRollouts(
            RolloutSpec(**given),
            policy,
            Plain(),
            Ranks(),
            end_ids=ENDS,
            longest=LONGEST,
            probe=probe or Sampling(1, 1),
            log_file=folder / "vllm.log",
            poll=lambda: None,
            note=print,
        )
        engines.append(engine)
        return engine, policy

    try:
        yield started
    finally:
        for engine in engines:
            engine.close()


COMMON = ("--dtype", "float32", "--max-model-len", "96", "--enforce-eager", "--max-num-seqs", "64")


def served_alone(vllm_python: str, model: str, log: Path, *options: str) -> ServerProcess:
    """A server as somebody else would start it, for `urls`. It is to be closed."""
    given = [*COMMON, "--kv-cache-memory-bytes", str(2**29), *options]
    server = ServerProcess(vllm_python, Path(model), given, log)
    try:
        server.start(lambda: None, STARTUP_SECONDS)
    except BaseException:
        server.close()
        raise
    return server


@contextmanager
def serving(vllm_python: str, model: str, log: Path, *options: str) -> Iterator[ServerProcess]:
    server = served_alone(vllm_python, model, log, *options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def start(vllm_python: str, tmp_path: Path) -> Iterator[Start]:
    """Starts a server for a model, and ends it with the test."""
    with _starting(vllm_python, tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def tied(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VLLMRollouts, Policy]]:
    """A server of a Qwen2 model with tied embeddings, which vLLM's own reload gets wrong; tests of a module share it."""
    with _starting(vllm_python, tmp_path_factory.mktemp("server")) as start:
        yield start(make_model("qwen2", hidden_size=WIDE))
