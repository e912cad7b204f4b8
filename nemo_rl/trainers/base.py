"""What the three algorithms share: loading, the loop over steps, evaluation, checkpoints, resume and the result."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nemo_rl.api.result import TrainResult
from nemo_rl.checkpoint import Checkpoint, CheckpointStore
from nemo_rl.data.module import train_and_validation
from nemo_rl.data.prepare import Prepared, batches, describe_example, prepare
from nemo_rl.display import NullDisplay, make_display
from nemo_rl.distributed import Ranks, ShardedModel, join
from nemo_rl.errors import TrainingInterrupted
from nemo_rl.job.spec import Algorithm, RLTrainingJobSpec
from nemo_rl.metrics import MetricsLog
from nemo_rl.model import Policy, choose_device, limit_threads, load_model, load_tokenizer, prepare_model
from nemo_rl.packing import PackedBatch, TokenSequence, pack, plan_microbatches
from nemo_rl.preemption import Interrupted, StopSignals
from nemo_rl.runs import Run, differences, open_run
from nemo_rl.trainers.callbacks import CallbackList
from nemo_rl.trainers.optimizer import Optimizer, learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("nemo_rl")

TOKENS_PER_MICROBATCH_CPU = 4096
TOKENS_PER_MICROBATCH_CUDA = 16384

NOT_IDENTITY = {
    "training": {"log_level", "tensorboard", "logged_completions", "resume", "keep_checkpoints", "save_every"},
}
"""Settings that do not change what a run computes: a run goes on although they differ."""


class Trainer(ABC):
    """Trains one model by one algorithm. `fit` runs it; attributes: model, tokenizer, config, current_step, output_dir.

    Set `should_stop = True` (from a callback) to end the run cleanly after the current step.
    """

    algorithm: ClassVar[Algorithm]

    def __init__(
        self,
        config: RLTrainingJobSpec,
        *,
        output_dir: Path | str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
    ) -> None:
        """`model` and `tokenizer` are used in place of loading `config.model`; a given model is trained in place."""
        if config.algorithm != self.algorithm:
            raise ValueError(
                f"{type(self).__name__} trains {self.algorithm}, but config.algorithm is {config.algorithm}"
            )
        self.config = config
        self.training = config.training
        self.settings: Any = config.settings
        self.output_dir = Path(output_dir) if output_dir is not None else default_output_dir(config.model, model)
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.device = choose_device(config.resources.gpus_per_node)
        self.ranks = Ranks()
        self.sharded: ShardedModel | None = None
        self.current_step = 0
        self.should_stop = False
        self.total_steps = 0
        self._validation_metric: float | None = None
        self._start_model: Any = None
        self.policy: Policy
        self.optimizer: Optimizer | None = None

    @classmethod
    def from_pretrained(
        cls, model: str | PreTrainedModel, *, tokenizer: Any = None, output_dir: Path | str | None = None, **kwargs: Any
    ) -> Trainer:
        """Returns a trainer of a hub name, a directory or a live model; `kwargs` are the keywords of `nemo_rl.train`."""
        from nemo_rl.api.keywords import build_spec

        config = build_spec(model, algorithm=cls.algorithm, caller=cls.__name__, **kwargs)
        live = None if isinstance(model, str | Path) else model
        return cls(config, output_dir=output_dir, model=live, tokenizer=tokenizer)

    # ------------------------------------------------------------------ the loop

    def fit(
        self,
        dataset: Any,
        reward_fn: Any = None,
        *,
        validation_dataset: Any = None,
        callbacks: Any = None,
        reward_weights: Any = None,
    ) -> TrainResult:
        """Trains on the data set and returns the result.

        `dataset` and `validation_dataset`: a hub name, a path, a list of rows, a `datasets.Dataset`, a `DataModule` or a
        `DatasetSpec`. `reward_fn` (GRPO): a callable, an Environment, a list or a dict of them. Raises DatasetError,
        RewardError, TypeError or ValueError for input that cannot work, TrainingInterrupted after SIGTERM.

        Under torchrun every rank calls it with the same arguments. Callbacks run on every rank, so that they may save and
        stop; `trainer.ranks.is_first` tells where to print. What ends the run on one rank ends it on all.
        """
        self.ranks = join(self.device)
        try:
            return self._fit(dataset, reward_fn, validation_dataset, callbacks, reward_weights)
        except BaseException as error:
            told = self.ranks.leave(error)
            if told is error:
                raise
            raise told from error

    def _fit(
        self, dataset: Any, reward_fn: Any, validation_dataset: Any, callbacks: Any, reward_weights: Any
    ) -> TrainResult:
        self.callbacks = CallbackList(callbacks)
        dataset, own_validation = train_and_validation(dataset)
        validation_dataset = own_validation if validation_dataset is None else validation_dataset
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self._model_name(), self.training.trust_remote_code)
        data = self._prepare(dataset, self.training.max_steps * self.training.batch_size)
        validation = self._prepare(validation_dataset, None) if validation_dataset is not None else None
        self._bind(data, validation, reward_fn, reward_weights)
        run = self._open_run(self._identity(data, validation))
        try:
            with StopSignals() as signals:
                self.signals = signals
                result = self._run(run, data, validation)
            if self.ranks.is_first:
                run.finish()
            return result
        finally:
            self._release()
            run.close()

    def _open_run(self, identity: dict[str, Any]) -> Run:
        """The first rank takes the directory for all. Raises ValueError where ranks would train different things."""
        identities = self.ranks.gather(lambda: identity)
        for rank, other in enumerate(identities):
            if other != identity:
                found = "; ".join(differences(identities[0], other))
                raise ValueError(f"rank {rank} trains something else than rank 0: {found}; give all ranks the same")
        opened: list[Run] = []

        def take() -> Run:
            opened.append(open_run(self.output_dir, identity, self.training.resume))
            return dataclasses.replace(opened[0], _lock=None)

        run = self.ranks.first(take)
        return opened[0] if opened else run

    def _run(self, run: Run, data: Prepared, validation: Prepared | None) -> TrainResult:
        store = CheckpointStore(run.dir, self.training.keep_checkpoints)
        checkpoint = self.ranks.first(lambda: store.latest() if run.resuming else None)
        self.run_dir = run.dir
        self._load(store, checkpoint)
        state = checkpoint.state if checkpoint else {}
        self.current_step = checkpoint.step if checkpoint else 0
        self._load_state(state)
        steps_per_epoch = -(-len(data.examples) // self.training.batch_size)
        self.total_steps = min(self.training.max_steps, self.training.max_epochs * steps_per_epoch)
        self.display = make_display(self.training.log_level) if self.ranks.is_first else NullDisplay()
        metrics_log = None
        if self.ranks.is_first:
            metrics_log = MetricsLog(run.dir, resume_step=self.current_step, tensorboard=self.training.tensorboard)
        self.display.start(self.total_steps, self._header(data))
        last_saved, metrics = self.current_step, dict(state.get("metrics", {}))
        order: list[list[int]] | None = None
        try:
            self._announce(run, data, checkpoint)
            self._start(data, validation)
            self.callbacks.on_train_begin(self)
            self._agree_to_stop()
            while self.current_step < self.total_steps and not self.should_stop:
                epoch, position = divmod(self.current_step, steps_per_epoch)
                if position == 0:
                    self.callbacks.on_epoch_begin(self, epoch)
                if position == 0 or order is None:
                    order = batches(
                        len(data.examples), self.training.batch_size, self.training.seed, self.training.shuffle, epoch
                    )
                step = self.current_step + 1
                self.callbacks.on_step_begin(self, step)
                self.ranks.together(self.signals.check)
                metrics = self._step(step, epoch, [data.examples[i] for i in order[position]])
                saving = step == self.total_steps or _due(step, self.training.save_every)
                if validation is not None and (saving or _due(step, self.training.eval_every)):
                    metrics |= self._evaluate_timed(validation)
                self.current_step = step
                if metrics_log is not None:
                    metrics_log.log(metrics)
                    metrics_log.log_completions(step, self.samples)
                self.display.step(metrics, self.samples)
                self.callbacks.on_step_end(self, step, metrics)
                self._agree_to_stop()
                if saving:
                    if metrics_log is not None:
                        metrics_log.sync()
                    self._save(store, metrics, validation)
                    last_saved = step
                if position == steps_per_epoch - 1 or step == self.total_steps or self.should_stop:
                    self.callbacks.on_epoch_end(self, epoch, metrics)
            if last_saved < self.current_step:
                if validation is not None:
                    metrics |= self._evaluate_timed(validation)
                self._save(store, metrics, validation)
            best = self.ranks.first(store.best)
            result = TrainResult(
                trainer=self,
                metrics=metrics,
                checkpoint_path=str(best.path) if best else None,
                total_steps=self.current_step,
            )
            self.callbacks.on_train_end(self, result)
            self.display.note(f"finished after {self.current_step} steps; checkpoint: {result.checkpoint_path}")
            return result
        except Interrupted as interrupted:
            raise self._interrupted(store, interrupted, last_saved, metrics, validation) from None
        finally:
            if metrics_log is not None:
                metrics_log.close()
            self.display.close()

    def _agree_to_stop(self) -> None:
        self.should_stop = any(self.ranks.gather(lambda: self.should_stop))

    def _step(self, step: int, epoch: int, examples: list[Any]) -> dict[str, Any]:
        started = time.perf_counter()
        self.samples: list[dict[str, Any]] = []
        self.rate = learning_rate(self.training, step, self.total_steps)
        found = self.train_step(examples, step)
        seconds = time.perf_counter() - started
        metrics = {"step": step, "epoch": epoch, **found, "learning_rate": self.rate, "step_seconds": seconds}
        metrics["tokens_per_second"] = metrics.get("tokens", 0) / seconds
        self._observe(metrics)
        return metrics

    @abstractmethod
    def train_step(self, examples: list[Any], step: int) -> dict[str, Any]:
        """Makes one optimizer step from these examples and returns its metrics."""

    @abstractmethod
    def evaluate(self, validation: Prepared) -> tuple[dict[str, float], float]:
        """Returns the metrics of the validation data, and the one number of them that is higher for better models."""

    # ------------------------------------------------------------------ what algorithms fill in

    def _bind(self, data: Prepared, validation: Prepared | None, reward_fn: Any, reward_weights: Any) -> None:
        """Checks what belongs to the data before a model is loaded."""

    def _start(self, data: Prepared, validation: Prepared | None) -> None:
        """Prepares what needs the model, once before the first step."""

    def _observe(self, metrics: dict[str, Any]) -> None:
        """Sees each step's metrics before they are logged."""

    def _release(self) -> None:
        """Frees what `_bind` and `_start` took."""

    def _checkpoint_metric(self) -> float | None:
        """Returns the number by which checkpoints are compared when there is no validation data."""
        return None

    def _state(self) -> dict[str, Any]:
        """Returns what a resumed run needs beyond weights and optimizer, JSON-able."""
        return {"callbacks": self.callbacks.state_dict(), "non_finite_steps": self._optimizer.non_finite_steps}

    def _load_state(self, state: dict[str, Any]) -> None:
        if state:
            self.callbacks.load_state_dict(state["callbacks"])
            self._optimizer.non_finite_steps = state["non_finite_steps"]

    # ------------------------------------------------------------------ one optimizer step

    @property
    def _optimizer(self) -> Optimizer:
        assert self.optimizer is not None
        return self.optimizer

    def poll(self) -> None:
        """Raises Interrupted if a signal asked this process to stop; leaves the share of a rank when another one ended."""
        self.signals.check()
        self.ranks.check()

    def microbatches(self, sequences: list[TokenSequence], split_groups: bool = True) -> list[list[int]]:
        """Returns the plan of micro-batches of the sequences under the token budget."""
        budget = self.training.tokens_per_microbatch
        if budget is None:
            budget = TOKENS_PER_MICROBATCH_CUDA if self.device.type == "cuda" else TOKENS_PER_MICROBATCH_CPU
        return plan_microbatches(sequences, budget, split_groups)

    def accumulate(
        self,
        sequences: list[TokenSequence],
        loss_fn: Callable[[PackedBatch, list[int]], Tensor],
        *,
        split_groups: bool = True,
        may_stop: bool = True,
    ) -> float:
        """Adds the gradient of the sum of `loss_fn(batch, indices)` over all micro-batches, and returns that sum.

        `loss_fn` gets the packed micro-batch and the numbers of its sequences, and weighs by totals of the whole step.
        Each rank computes a share of the sequences, and the sum is over all of them; gradients are summed by the optimizer.
        """
        share = self._shares(sequences, split_groups)[self.ranks.rank]

        def compute() -> float:
            total = 0.0
            for plan in self.microbatches([sequences[i] for i in share], split_groups):
                if may_stop:
                    self.poll()
                indices = [share[i] for i in plan]
                loss = loss_fn(pack([sequences[i] for i in indices], self.device), indices)
                loss.backward()
                total += loss.item()
            return total

        return sum(self.ranks.gather(compute))

    def _shares(self, sequences: list[TokenSequence], split_groups: bool = True) -> list[list[int]]:
        """Returns the numbers of the sequences that each rank takes: whole groups, unless there are fewer than ranks."""
        groups: dict[object, list[int]] = {}
        for i, sequence in enumerate(sequences):
            groups.setdefault(("single", i) if sequence.group is None else sequence.group, []).append(i)
        units = list(groups.values())
        if split_groups and len(units) < self.ranks.size:
            units = [[i] for i in range(len(sequences))]
        shares = self.ranks.shares([sum(len(sequences[i].ids) for i in unit) for unit in units])
        return [sorted(i for unit in share for i in units[unit]) for share in shares]

    def sum_logprobs(self, policy: Policy, sequences: list[TokenSequence], temperature: float = 1.0) -> Tensor:
        """Returns the summed log-probability of the trained tokens of each sequence, (len(sequences),), without gradient."""
        sums = torch.zeros(len(sequences), device=self.device)
        shares = self._shares(sequences)

        @torch.no_grad()
        def compute() -> list[float]:
            mine = shares[self.ranks.rank]
            found = torch.zeros(len(mine), device=self.device)
            for indices in self.microbatches([sequences[i] for i in mine]):
                self.poll()
                batch = pack([sequences[mine[i]] for i in indices], self.device)
                found[torch.tensor(indices, device=self.device)] = batch.per_sequence(
                    policy.logprobs(batch, temperature)
                )
            return found.tolist()

        for share, found in zip(shares, self.ranks.gather(compute), strict=True):
            sums[torch.tensor(share, dtype=torch.long, device=self.device)] = torch.tensor(found, device=self.device)
        return sums

    # ------------------------------------------------------------------ loading, saving

    def _model_name(self) -> str:
        if self.model is not None:
            return str(getattr(self.model.config, "_name_or_path", "") or self.config.model)
        return str(Path(self.config.model).expanduser()) if self.config.model.startswith("~") else self.config.model

    def _prepare(self, dataset: Any, needed: int | None) -> Prepared:
        return prepare(self.algorithm, dataset, self.tokenizer, self.training, self.settings, needed=needed)

    def _load(self, store: CheckpointStore, checkpoint: Checkpoint | None) -> None:
        if self.model is None:
            self.model = load_model(self._model_name(), self.training, self.device)
        elif not hasattr(self, "policy"):
            if checkpoint is not None and self.needs_reference:
                self._start_model = copy.deepcopy(self.model)
            self.model = prepare_model(self.model, self.training, self.device)
        if checkpoint is not None:
            store.load_model_weights(checkpoint, self.model)
        limit_threads(getattr(self.model.config.get_text_config(), "hidden_size", 1024))
        self.policy = Policy(self.model, self.training.precision, self.training.activation_checkpointing)
        self._shard(resuming=checkpoint is not None)
        trained = self.sharded.shards if self.sharded is not None else self.policy.trainable
        self.optimizer = Optimizer(trained, self.training, self.sharded)
        if checkpoint is not None:
            store.load_optimizer(checkpoint, self.optimizer.adamw)
        if self.sharded is not None:
            self.sharded.make_whole()

    def _shard(self, resuming: bool) -> None:
        """Shards the model over the ranks; `resuming`: it has the weights of a checkpoint."""
        if self.ranks.size > 1:
            self.sharded = ShardedModel(self.model, self.ranks, self.device)

    @property
    def needs_reference(self) -> bool:
        """Whether training compares the model with the one it started from."""
        return False

    def initial_policy(self) -> Policy:
        """Returns a frozen policy with the weights that training started from."""
        training = self.training.model_copy(update={"lora_rank": None})
        if self._start_model is not None:
            model = prepare_model(self._start_model, training, self.device)
        else:
            model = load_model(self._model_name(), training, self.device)
        return Policy(model.requires_grad_(False), self.training.precision)

    def _save(self, store: CheckpointStore, metrics: dict[str, Any], validation: Prepared | None) -> Path:
        metric = self._validation_metric if validation is not None else self._checkpoint_metric()
        state = {**self._state(), "metrics": metrics}
        path = store.save(
            self.current_step,
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=self._optimizer.adamw,
            state=state,
            metric=metric,
        )
        if self.sharded is not None:
            self.sharded.make_whole()
        return path

    def save_checkpoint(self, path: Path | str) -> Path:
        """Writes model, tokenizer and trainer state to a directory that `AutoModelForCausalLM.from_pretrained` loads.

        On several ranks every rank calls it.
        """
        from nemo_rl.checkpoint import write_checkpoint

        optimizer = self.optimizer.adamw if self.optimizer is not None else None
        written = write_checkpoint(
            Path(path),
            step=self.current_step,
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=optimizer,
            state=self._state() if optimizer is not None else {},
        )
        if self.sharded is not None:
            self.sharded.make_whole()
        return written

    def load_checkpoint(self, path: Path | str) -> None:
        """Loads model weights and, where they are there, optimizer state and step from such a directory."""
        from nemo_rl.checkpoint import load_into, read_checkpoint

        checkpoint = read_checkpoint(Path(path))
        if self.model is None:
            self.model = load_model(str(path), self.training, self.device)
        load_into(checkpoint, self.model, self.optimizer.adamw if self.optimizer is not None else None)
        self.current_step = checkpoint.step

    def _evaluate_timed(self, validation: Prepared) -> dict[str, Any]:
        started = time.perf_counter()
        metrics, self._validation_metric = self.evaluate(validation)
        return {**metrics, "validation_seconds": time.perf_counter() - started}

    def _interrupted(
        self,
        store: CheckpointStore,
        interrupted: Interrupted,
        last_saved: int,
        metrics: dict[str, Any],
        validation: Prepared | None,
    ) -> BaseException:
        """Saves the last completed step, and returns what to raise. The interrupted step is replayed by the next run."""
        if self.current_step > last_saved:
            self._save(store, metrics, validation)
        latest = store.latest()
        path = str(latest.path) if latest else None
        where = f"saved step {self.current_step} to {path}" if path else "before the first step; nothing to save"
        message = f"stopped by {interrupted.signal}; {where}. Run the same call again to go on"
        self.display.note(message)
        if interrupted.signal == "SIGINT":
            return KeyboardInterrupt(message)
        return TrainingInterrupted(message, path, self.current_step)

    # ------------------------------------------------------------------ words

    def _identity(self, data: Prepared, validation: Prepared | None) -> dict[str, Any]:
        """Returns what makes two runs the same: the settings, the data and the model, not where they are written."""
        training = self.training.model_dump(exclude=NOT_IDENTITY["training"])
        return {
            "model": self._model_name(),
            "algorithm": self.algorithm,
            **training,
            **self.settings.model_dump(),
            "data": data.fingerprint,
            "validation_data": validation.fingerprint if validation is not None else None,
        }

    def _header(self, data: Prepared) -> str:
        parameters = sum(p.numel() for p in self.policy.trainable)
        name = self.output_dir.name if self.config.model.startswith("python:") else self.config.model
        return (
            f"{self.algorithm.upper()} · {name} · {parameters:,} trained parameters · {len(data.examples):,} rows · "
            f"{self.total_steps} steps · {self.device.type}"
        )

    def _announce(self, run: Run, data: Prepared, checkpoint: Checkpoint | None) -> None:
        if run.notice:
            self.display.note(run.notice)
        if checkpoint is not None:
            self.display.note(f"going on after step {checkpoint.step} from {checkpoint.path}")
        self.display.note(str(data.report))
        if self.total_steps < self.training.max_steps / 2:
            epochs = self.training.max_epochs
            self.display.note(
                f"the data ends first: {len(data.examples)} rows in batches of {self.training.batch_size} over {epochs} "
                f"epoch{'s' if epochs > 1 else ''} are {self.total_steps} steps, not max_steps={self.training.max_steps}; "
                "raise max_epochs to train longer"
            )
        log.debug("first example: %s", describe_example(self.tokenizer, data.examples[0]))


def default_output_dir(model_name: str, model: Any = None) -> Path:
    """Returns ./outputs/{last component of the model's name}."""
    name = (
        str(getattr(getattr(model, "config", None), "_name_or_path", "") or "model")
        if model is not None
        else model_name
    )
    return Path("outputs") / (name.rstrip("/").split("/")[-1] or "model")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
