"""Trains on several ranks: reads one run after the other as JSON lines, forks its ranks, and prints their exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


def count_a(prompt: str, response: str) -> float:
    return response.count("a") / 6


def fail_on_rank_1(prompt: str, response: str) -> float:
    if os.environ["RANK"] == "1" and prompt:
        raise ZeroDivisionError("the reward of rank 1")
    return float(len(response))


def rows_of(algorithm: str, count: int) -> list[dict[str, str]]:
    rows = [
        {
            "prompt": f"{i}" * (1 + i % 3) + "=",
            "completion": f"{i % 10}a" * (1 + i % 4),
            "chosen": "ab",
            "rejected": f"c{i % 3}",
        }
        for i in range(count)
    ]
    keep = {"grpo": ("prompt",), "sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}[algorithm]
    return [{name: row[name] for name in keep} for row in rows]


def slow_on_rank_1(prompt: str, response: str) -> float:
    if os.environ["RANK"] == "1" and Path(os.environ["SLOW"]).exists():
        time.sleep(150)
    return float(len(response))


REWARDS = {"count": count_a, "fails on rank 1": fail_on_rank_1, "slow on rank 1": slow_on_rank_1}


class SignalRank:
    """Sends a signal to its own process, on one rank only, in the middle of training."""

    def __init__(self, rank: int, step: int, number: int = signal.SIGTERM, after: float = 0.0) -> None:
        self.rank, self.step, self.number, self.after = rank, step, number, after

    def on_train_begin(self, trainer: Any) -> None: ...
    def on_epoch_begin(self, trainer: Any, epoch: int) -> None: ...
    def on_step_begin(self, trainer: Any, step: int) -> None:
        if step == self.step and trainer.ranks.rank == self.rank:
            threading.Timer(self.after, os.kill, (os.getpid(), self.number)).start()
            while not self.after and self.number == signal.SIGTERM and trainer.signals.requested is None:
                time.sleep(0.01)

    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None: ...
    def on_epoch_end(self, trainer: Any, epoch: int, metrics: dict[str, Any]) -> None: ...
    def on_train_end(self, trainer: Any, result: Any) -> None: ...


class SignalWaitingRank0(SignalRank):
    """Sends SIGTERM to rank 0 while rank 1 is at its rewards, from now on slow."""

    def __init__(self) -> None:
        super().__init__(0, 2, after=3.0)

    def on_step_begin(self, trainer: Any, step: int) -> None:
        if step == self.step:
            Path(os.environ["SLOW"]).touch()
        super().on_step_begin(trainer, step)


class SignalInEvaluation(SignalRank):
    """Sends SIGTERM to its own process, on one rank only, when the validation data is scored after a step."""

    def on_train_begin(self, trainer: Any) -> None:
        evaluate = trainer.evaluate

        def signalled(validation: Any) -> Any:
            super(SignalInEvaluation, self).on_step_begin(trainer, trainer.current_step)
            return evaluate(validation)

        trainer.evaluate = signalled

    def on_step_begin(self, trainer: Any, step: int) -> None: ...


class StopOnRank1(SignalRank):
    """Asks for the end of the run on rank 1 alone."""

    def __init__(self) -> None: ...

    def on_step_begin(self, trainer: Any, step: int) -> None: ...
    def on_step_end(self, trainer: Any, step: int, metrics: dict[str, Any]) -> None:
        if step == 2 and trainer.ranks.rank == 1:
            trainer.should_stop = True


class RaiseOnRank1(SignalRank):
    """Raises outside of the shared work of a step, on rank 1 alone."""

    def __init__(self) -> None: ...

    def on_step_begin(self, trainer: Any, step: int) -> None:
        if step == 2 and trainer.ranks.rank == 1:
            raise KeyError("the callback of rank 1")


class InPass(SignalRank):
    """Raises in the middle of a forward pass, in the last block, on rank 1 alone: where the others wait for its weights."""

    def __init__(self, error: type[Exception], tokens: int, step: int = 1) -> None:
        self.error, self.tokens, self.step, self.now = error, tokens, step, 0

    def on_train_begin(self, trainer: Any) -> None:
        def refuse(block: Any, args: Any, kwargs: Any) -> None:
            if self.now >= self.step and args[0].shape[0] * args[0].shape[1] > self.tokens:
                raise self.error("in a block of rank 1")

        if trainer.ranks.rank == 1:
            trainer.policy.causal.model.layers[-1].register_forward_pre_hook(refuse, with_kwargs=True)

    def on_step_begin(self, trainer: Any, step: int) -> None:
        self.now = step

    def on_train_end(self, trainer: Any, result: Any) -> None:
        if trainer.ranks.is_first:
            Path(f"{trainer.run_dir}.budget").write_text(str(trainer.budget_share))


SMALL_FILE = 2**15
"""Bytes of a file of weights, where saving is measured."""


class MeasuresSaving(SignalRank):
    """Writes down how many bytes of tensors each rank holds while it saves the model, beside those that it trains."""

    def __init__(self) -> None: ...

    def on_step_begin(self, trainer: Any, step: int) -> None: ...
    def on_train_begin(self, trainer: Any) -> None:
        from nemo_rl.model.activations import LiveBytes
        from nemo_rl.model.sharding import local
        from nemo_rl.run import checkpoint_tensors

        checkpoint_tensors.FILE_BYTES = SMALL_FILE
        save = checkpoint_tensors.save_model

        def measured(path: Path, model: Any) -> None:
            with LiveBytes([local(tensor) for tensor in model.state_dict(keep_vars=True).values()]) as live:
                save(path, model)
            Path(f"{trainer.run_dir}.saving{trainer.ranks.rank}").write_text(str(live.peak))

        checkpoint_tensors.save_model = measured


class MeasuresWholeWeights(SignalRank):
    """Writes down how many bytes of weights each rank has that are not shards, as soon as the model is loaded."""

    def __init__(self) -> None:
        from nemo_rl.trainers.base import Trainer

        check_fits = Trainer._check_fits

        def measured(trainer: Any, *sets: Any) -> None:
            Path(f"{trainer.run_dir}.whole{trainer.ranks.rank}").write_text(str(whole_weights()))
            check_fits(trainer, *sets)

        Trainer._check_fits = measured  # type: ignore[method-assign]

    def on_step_begin(self, trainer: Any, step: int) -> None: ...


def whole_weights() -> int:
    import gc

    import torch
    from torch.distributed.tensor import DTensor

    gc.collect()
    found = [p for p in gc.get_objects() if isinstance(p, torch.nn.Parameter) and not isinstance(p, DTensor)]
    return sum({p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in found}.values())


def out_of_memory() -> InPass:
    import torch

    return InPass(torch.OutOfMemoryError, 15)


CALLBACKS = {
    "out of memory": out_of_memory,
    "fails in a pass": lambda: InPass(ZeroDivisionError, 0, step=2),
    "signal 0": lambda: SignalRank(0, 3),
    "signal 1": lambda: SignalRank(1, 3),
    "evaluation 1": lambda: SignalInEvaluation(1, 2),
    "kill 0": lambda: SignalRank(0, 3, signal.SIGKILL),
    "kill 1": lambda: SignalRank(1, 3, signal.SIGKILL),
    "signal waiting 0": SignalWaitingRank0,
    "measures saving": MeasuresSaving,
    "measures whole weights": MeasuresWholeWeights,
    "stop": StopOnRank1,
    "raise": RaiseOnRank1,
}


def given(folder: str) -> Any:
    """A live model, as a user loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main(job: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    import nemo_rl
    from nemo_rl.errors import TrainingInterrupted

    algorithm = job["algorithm"]
    rows = rows_of(algorithm, job.get("rows", 10))
    reward = None
    if algorithm == "grpo":
        reward = REWARDS[job.get("reward", "count")]
        job["keywords"] = {"num_generations_per_prompt": 4, "max_new_tokens": 6, "logged_completions": 4} | job[
            "keywords"
        ]
    callbacks = [CALLBACKS[job["callback"]]()] if "callback" in job else None
    said = Path(f"{job['output']}.rank{os.environ.get('RANK', '0')}")
    if job.get("validation"):
        job["keywords"]["validation_dataset"] = rows[:3]
    try:
        nemo_rl.train(
            given(job["model"]) if job.get("live") else job["model"],
            rows,
            reward,
            algorithm=algorithm,
            output_dir=job["output"],
            backend="local",
            log_level="warning",
            callbacks=callbacks,
            **{"max_steps": 3, "max_epochs": 9, "batch_size": 4, "learning_rate": 1e-3, "seed": 7, **job["keywords"]},
        )
    except TrainingInterrupted as interrupted:
        said.write_text(str(interrupted))
        os._exit(75)
    except BaseException as error:
        notes = " ".join(getattr(error, "__notes__", []))
        said.write_text(f"{type(error).__name__}: {error} {notes}")
        if job.get("lives_on") and said.suffix == ".rank1":
            deadline = time.monotonic() + 150
            while not said.with_suffix(".rank0").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        raise


def serve() -> None:
    # a forked rank imports nothing that takes time: seconds of each run, else
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import nemo_rl.api.training
    import nemo_rl.run.checkpoint_tensors
    import nemo_rl.trainers.dpo
    import nemo_rl.trainers.grpo
    import nemo_rl.trainers.sft  # noqa: F401

    print("ready", flush=True)
    while line := sys.stdin.readline():
        job = json.loads(line)
        ranks = [fork(job, rank) for rank in range(job["size"])]
        codes: dict[int, int] = {}
        deadline = time.monotonic() + job["seconds"]
        while len(codes) < len(ranks):
            for pid in ranks:
                if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                    codes[pid] = os.waitstatus_to_exitcode(ended[1])
                elif pid not in codes and time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        print(json.dumps([codes[pid] for pid in ranks]), flush=True)


def fork(job: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "WORLD_SIZE": str(job["size"])}
        where["SLOW"] = f"{job['output']}.slow"
        os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = os.open(f"{job['output']}.log{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        main(job)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    serve()
