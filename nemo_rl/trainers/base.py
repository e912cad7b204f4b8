"""What the three algorithms share: the course of a run, from the data to the result."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

from nemo_rl.api.result import TrainResult
from nemo_rl.data.clock import set_clock, writes_the_time
from nemo_rl.data.module import train_and_validation
from nemo_rl.data.prepare import Prepared, prepare
from nemo_rl.data.templates import end_tokens_of, with_template
from nemo_rl.display.logs import log_lines
from nemo_rl.display.phases import Phase
from nemo_rl.display.terminal import Display, NullDisplay, RecordedDisplay, make_display
from nemo_rl.job.spec import Algorithm, RLTrainingJobSpec
from nemo_rl.job.uris import is_store
from nemo_rl.model.ends import teach_ends
from nemo_rl.model.limits import check_positions, check_tokens
from nemo_rl.model.load import choose_device, limit_threads, load_tokenizer
from nemo_rl.model.policy import Policy
from nemo_rl.model.sharding import ShardedModel, is_sharded
from nemo_rl.run.checkpoint import Checkpoint, CheckpointStore
from nemo_rl.run.directory import METRICS_FILE, Run, check_output_dir, default_output_dir, open_run
from nemo_rl.run.identity import (
    model_identity,
    refuse_adapter,
    remember_trained,
    rows_identity,
    settings_identity,
    tokenizer_identity,
    was_trained,
)
from nemo_rl.run.lease import Claim, Lease
from nemo_rl.run.metrics import read_history
from nemo_rl.run.ranks import Ranks, join
from nemo_rl.run.signals import Interrupted, StopSignals
from nemo_rl.run.sources import keeps_models, local_model
from nemo_rl.run.stored.head import LOG
from nemo_rl.run.stored.runs import StoredRuns
from nemo_rl.trainers.announcement import header, notes
from nemo_rl.trainers.callbacks import CallbackList
from nemo_rl.trainers.loading import Loaded, ModelLoader, planned_memory
from nemo_rl.trainers.loop import Loop
from nemo_rl.trainers.opening import check_same, open_on_all
from nemo_rl.trainers.optimizer import Optimizer, learning_rate
from nemo_rl.trainers.passes import Passes
from nemo_rl.trainers.saving import Saving

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nemo_rl.api.arguments import Reward, Rows
    from nemo_rl.api.typed import TrainerKeywords
    from nemo_rl.model.memory import Estimate
    from nemo_rl.trainers.callbacks import Callback


class Trainer(Passes, Saving, ABC):
    """Trains one model by one algorithm. `fit` runs it; attributes: model, tokenizer, config, current_step, output_dir.

    Set `should_stop = True` (from a callback) to end the run cleanly after the current step.
    """

    algorithm: ClassVar[Algorithm]
    runs_inside: ClassVar[bool] = False
    """Whether a run that cannot go on in output_dir begins in a folder within it, rather than beside it."""

    def __init__(
        self,
        config: RLTrainingJobSpec,
        *,
        output_dir: Path | str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
    ) -> None:
        """`model` and `tokenizer` are used in place of loading `config.model`; a given model is trained in place."""
        if not isinstance(config, RLTrainingJobSpec):
            what = repr(config) if isinstance(config, str) else f"an object of type {type(config).__name__}"
            shown = repr(config) if isinstance(config, str) else "model"
            raise TypeError(
                f"{type(self).__name__}() takes an RLTrainingJobSpec, found {what}; for a model write "
                f"{type(self).__name__}.from_pretrained({shown}, …), and give data set and reward to fit()"
            )
        if config.algorithm != self.algorithm:
            raise ValueError(
                f"{type(self).__name__} trains {self.algorithm}, but config.algorithm is {config.algorithm}"
            )
        self.config = config
        self.training = config.training
        self.settings: Any = config.settings
        given = (
            output_dir if output_dir is not None else default_output_dir(model if model is not None else config.model)
        )
        self.stored = StoredRuns(str(given)) if is_store(given) else None
        """What publishes the run where output_dir is the address of an object store."""
        self.output_dir = self._asked_dir = Path() if self.stored is not None else check_output_dir(given)
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.device = choose_device(config.resources.gpus_per_node)
        self.ranks = Ranks()
        self.sharded: ShardedModel | None = None
        """The trained model's shards, where ranks share its weights."""
        self.recompute = bool(config.training.activation_checkpointing)
        self.memory: Estimate | None = None
        """On a GPU, what the run is expected to take."""
        self.current_step = 0
        self.making_step, self.making_epoch = 0, 0
        self.should_stop = False
        self.total_steps = self.first_total_steps = 0
        self._given_was_trained = False
        self.lease_claim: Claim | None = None
        """Set in a pod: what asks for the right to write to output_dir, which an earlier attempt may still believe to have."""
        self.lease: Lease | None = None
        self.complete_lines = False
        """Set in a pod: a step's line has all of its metrics, for programs elsewhere read it."""
        self.stored_root: Path | None = None
        """Set in a pod: the folder for runs that are kept in a store; default one of the cache."""
        self._start_model: Loaded | None = None
        """Of a model that was given, what it was before training, where that is compared with."""
        self._model_folder: str | None = None
        """The copy on this machine of a model in an object store."""
        self.policy: Policy
        self.loader: ModelLoader
        self.batch_of: Callable[[int], tuple[int, list[Any]]]
        """The epoch and the examples of a step that is not trained yet; set by the loop."""
        self.optimizer: Optimizer | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: Any = None,
        output_dir: Path | str | None = None,
        **kwargs: Unpack[TrainerKeywords],
    ) -> Self:
        """Returns a trainer of a hub name, a directory or a live model; `kwargs` are the keywords of `nemo_rl.train`."""
        from nemo_rl.api.keywords import build_spec

        config = build_spec(model, algorithm=cls.algorithm, caller=cls.__name__, **kwargs)
        live = None if isinstance(model, str | Path) else model
        return cls(config, output_dir=output_dir, model=live, tokenizer=tokenizer)

    # ------------------------------------------------------------------ the loop

    def fit(
        self,
        dataset: Rows,
        reward_fn: Reward | None = None,
        *,
        validation_dataset: Rows | None = None,
        callbacks: Iterable[Callback] | None = None,
        reward_weights: Sequence[float] | Mapping[str, float] | None = None,
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
        if reward_fn is not None and self.algorithm != "grpo":
            warnings.warn(f"{self.algorithm} uses no reward; reward_fn is ignored", UserWarning, stacklevel=4)
        self.callbacks = CallbackList(callbacks)
        level, every = self.training.log_level, self.training.log_every
        self.display: Display = NullDisplay()
        if self.ranks.is_first:
            self.display = make_display(level, log_every=every, complete=self.complete_lines)
        try:
            with log_lines(level, (lambda text: self.display.note(text)) if self.ranks.is_first else None):
                return self._prepare_and_run(dataset, reward_fn, validation_dataset, reward_weights)
        finally:
            self.display.close()

    def _prepare_and_run(
        self, dataset: Any, reward_fn: Any, validation_dataset: Any, reward_weights: Any
    ) -> TrainResult:
        dataset, own_validation = train_and_validation(dataset)
        validation_dataset = own_validation if validation_dataset is None else validation_dataset
        if self.model is None:
            if is_store(self.config.model):
                self.begin_phase("fetching the model")
                in_parts = is_sharded(self.training.sharding, self.ranks) and not keeps_models(self.config.cache.claim)
                self._model_folder = str(self.ranks.together(lambda: local_model(self.config.model, in_parts=in_parts)))
            refuse_adapter(self._model_name())
        if self.tokenizer is None and self.model is not None and self._model_name().startswith("python://"):
            raise ValueError(
                f"found a {type(self.model).__name__} in memory that was loaded from nowhere, and no tokenizer; expected both; "
                "give tokenizer=..., a tokenizer, its name or its folder"
            )
        if self.tokenizer is None or isinstance(self.tokenizer, str | os.PathLike):
            self.begin_phase("loading the tokenizer")  # for which a hub that is away may be asked for a minute
            name = self._model_name() if self.tokenizer is None else os.fspath(self.tokenizer)
            self.tokenizer = load_tokenizer(name, self.training.trust_remote_code)
        self.tokenizer = with_template(self.tokenizer, self.training.chat_template)
        self.begin_phase("reading the data")
        if isinstance(dataset, Iterator):
            dataset = list(dataset)
        self._started = datetime.datetime.now().astimezone()
        set_clock(self.tokenizer, self._started)
        data, validation = self._prepare_both(dataset, validation_dataset)
        self._bind(data, validation, reward_fn, reward_weights)
        self.total_steps = self._planned_steps(data)
        identity = self._identity(data, validation)
        self._given_was_trained = self.model is not None and was_trained(self.model)
        given = self.model
        run = self._open_run(identity)
        unfinished: dict[str, Any] | None = identity["model"]
        try:
            if run.resuming and writes_the_time(self.tokenizer):
                set_clock(self.tokenizer, run.started)
                data, validation = self._prepare_both(dataset, validation_dataset)
            with StopSignals() as signals:
                self.signals = signals
                self.ranks.requested = self.stop_requested
                result = self._run(run, data, validation)
            if self.ranks.is_first:
                run.finish(result.checkpoint_path)
            unfinished = None
            return result
        finally:
            self._release()
            if self.stored is not None:
                self.stored.close()
            run.close()
            for model in (given, self.model):
                if model is not None and self.current_step > 0:
                    remember_trained(model, unfinished)

    def _open_run(self, identity: dict[str, Any]) -> Run:
        """The first rank takes the directory for all. Raises ValueError where ranks would train different things."""
        check_same(self.ranks, identity)
        claim = self.lease_claim
        if claim is not None:
            self.lease = claim.of(self.ranks.first(lambda: claim.take().generation))

        def take() -> Run:
            if self.stored is not None:
                self._asked_dir = self.stored.open(self.stored_root)
            return open_run(
                self._asked_dir,
                identity,
                self.training.resume,
                total_steps=self.total_steps,
                stored=self.stored,
                inside=self.runs_inside,
                started=self._started,
                lease=self.lease,
            )

        return open_on_all(self.ranks, take, self.stored, self.stored_root)

    def _run(self, run: Run, data: Prepared, validation: Prepared | None) -> TrainResult:
        store = CheckpointStore(
            run.dir, self.training.keep_checkpoints, always=run.kept, lease=self.lease, stored=self.stored
        )
        checkpoint = self.ranks.first(lambda: store.latest() if run.resuming else None)
        if checkpoint is not None and self.stored is not None:  # on another node it lies in a folder of its own
            checkpoint = dataclasses.replace(checkpoint, path=store.root / checkpoint.path.name)
        self.run_dir = self.output_dir = run.dir
        self.first_total_steps = run.first_total_steps
        self.begin_phase("loading the model")
        self._load(store, checkpoint)
        self._check_fits(data, validation)
        self.current_step = checkpoint.step if checkpoint else 0
        self._load_state(checkpoint.state if checkpoint else {})
        if run.lengthened:
            self.should_stop = False  # what a callback said of the run's earlier end
        loop = Loop(self, store, data, validation, checkpoint)
        if self.stored is not None and self.ranks.is_first:
            self.display = RecordedDisplay(self.display, run.dir / LOG)
        self.display.start(self.total_steps, header(self, data))
        try:
            for sentence in notes(self, run, data, checkpoint, store):
                self.display.note(sentence)
            self.begin_phase("getting ready")
            self._start(data, validation)
            if checkpoint is None:
                self.prove_saving(store)
            self.callbacks.on_train_begin(self)
            self.agree_to_stop()
            loop.run()
            self.ranks.together(store.settle)
            best = self.ranks.first(store.best)
            result = TrainResult(
                trainer=self,
                metrics=loop.metrics,
                checkpoint_path=str(best.path) if best else None,
                checkpoint_uri=self.stored.checkpoints.checkpoint_uri(best.path.name) if best and self.stored else None,
                total_steps=self.current_step,
                output_dir=run.dir,
                history=self.ranks.first(lambda: read_history(run.dir / METRICS_FILE)),
            )
            self.callbacks.on_train_end(self, result)
            which = f", the best, of step {best.step}" if best and best.step != self.current_step else ""
            self.display.note(f"finished after {self.current_step} steps; checkpoint: {result.shown_checkpoint}{which}")
            return result
        except Interrupted as interrupted:
            raise loop.interrupted(interrupted) from None
        finally:
            loop.close()

    # ------------------------------------------------------------------ what the loop calls

    def make_step(self, step: int, epoch: int, examples: list[Any]) -> dict[str, Any]:
        """Makes one optimizer step and returns its metrics. After the weights have moved nothing interrupts it."""
        started = time.perf_counter()
        self.making_step, self.making_epoch = step, epoch
        self.samples: list[dict[str, Any]] = []
        self.rate = learning_rate(self.training, step, self.total_steps, self.first_total_steps)
        self.begin_phase("training")
        found = self.train_step(examples, step)
        seconds = time.perf_counter() - started
        metrics = {"step": step, "epoch": epoch, **found, "learning_rate": self.rate, "step_seconds": seconds}
        metrics["tokens_per_second"] = metrics.get("tokens", 0) / seconds
        self._observe(metrics)
        return metrics

    def measure(self, validation: Prepared) -> tuple[dict[str, Any], float | None]:
        """Returns the metrics of the validation data, and the one number of them that is higher for better models.

        None where nothing could be measured.
        """
        started = time.perf_counter()
        self.begin_phase("validation")
        metrics, metric = self.evaluate(validation)
        return {**metrics, "validation_seconds": time.perf_counter() - started}, metric

    def say(self, sentence: str) -> None:
        self.display.note(sentence)

    def begin_phase(self, name: str, total: int | None = None, unit: str = "") -> Phase:
        """Tells the display what is done from now on, and returns the phase, which counts it."""
        self.current_phase = Phase(name, total, unit)
        self.display.phase(self.current_phase)
        return self.current_phase

    def agree_to_stop(self) -> None:
        """Stops all ranks where one was asked to."""
        self.should_stop = any(self.ranks.gather(lambda: self.should_stop))

    def check_may_go_on(self) -> None:
        """Raises Interrupted after a signal, LeaseLost once another process writes to the run."""
        self.signals.check()
        if self.stored is not None:
            self.stored.check()

    def stop_requested(self) -> str | None:
        """Returns the signal that asked this process to stop; called again and again while it waits for other ranks."""
        return self.signals.requested

    def take_checkpoint_metric(self) -> float | None:
        """Returns the number by which checkpoints are compared when there is no validation data; called once for each."""
        return None

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs of the trainer beyond weights and optimizer, JSON-able."""
        return {"callbacks": self.callbacks.state_dict(), "non_finite_steps": self._optimizer.non_finite_steps}

    # ------------------------------------------------------------------ what algorithms fill in

    @abstractmethod
    def train_step(self, examples: list[Any], step: int) -> dict[str, Any]:
        """Makes one optimizer step from these examples and returns its metrics."""

    @abstractmethod
    def evaluate(self, validation: Prepared) -> tuple[dict[str, float], float | None]:
        """Returns the metrics of the validation data, and the one number of them that is higher for better models."""

    def _bind(self, data: Prepared, validation: Prepared | None, reward_fn: Any, reward_weights: Any) -> None:
        """Checks what belongs to the data before a model is loaded."""

    def _start(self, data: Prepared, validation: Prepared | None) -> None:
        """Prepares what needs the model, once before the first step."""

    def _observe(self, metrics: dict[str, Any]) -> None:
        """Sees each step's metrics before they are logged."""

    def _release(self) -> None:
        """Frees what `_bind` and `_start` took."""

    def _load_state(self, state: dict[str, Any]) -> None:
        """Brings back what a checkpoint has of `state`; an empty one is the start of a run."""
        self.should_stop = state.get("should_stop", False)
        if state:
            self.callbacks.load_state_dict(state["callbacks"])
            self._optimizer.non_finite_steps = state["non_finite_steps"]

    @property
    def _optimizer(self) -> Optimizer:
        assert self.optimizer is not None
        return self.optimizer

    # ------------------------------------------------------------------ data and model

    def _model_name(self) -> str:
        if self.model is not None:
            return str(getattr(self.model.config, "_name_or_path", "") or self.config.model)
        if self._model_folder is not None:
            return self._model_folder
        return str(Path(self.config.model).expanduser()) if self.config.model.startswith("~") else self.config.model

    def _prepare_both(self, dataset: Any, validation_dataset: Any) -> tuple[Prepared, Prepared | None]:
        data = self._prepare(dataset, self.training.max_steps * self.training.batch_size)
        return data, self._prepare(validation_dataset, None) if validation_dataset is not None else None

    def _planned_steps(self, data: Prepared) -> int:
        per_epoch = -(-len(data.examples) // self.training.batch_size)
        return min(self.training.max_steps, self.training.max_epochs * per_epoch)

    def _prepare(self, dataset: Any, needed: int | None) -> Prepared:
        return prepare(self.algorithm, dataset, self.tokenizer, self.training, self.settings, needed=needed)

    def _plan_memory(self) -> None:
        """Chooses micro-batches and activation checkpointing for the GPU before anything is loaded. Raises DoesNotFit."""

        def config() -> Any:
            from nemo_rl.model.memory import load_config

            name, trusted = self._model_name(), self.training.trust_remote_code
            return self.model.config if self.model is not None else load_config(name, trusted)

        self.memory = planned_memory(self.config, config, self.device, self.ranks)
        if self.memory is not None:
            self.planned_tokens = self.memory.tokens_per_microbatch
            self.recompute = self.memory.activation_checkpointing

    def _load(self, store: CheckpointStore, checkpoint: Checkpoint | None) -> None:
        """Makes model, policy and optimizer what they were at the checkpoint, or are at the start of a run."""
        self._plan_memory()
        given = self.model
        self.loader = loader = ModelLoader(self._model_name(), self.training, self.device, self.ranks)
        if given is None or not hasattr(self, "policy"):
            if given is not None and self.needs_copy_of_start(checkpoint):
                self._start_model = loader.keep(given)
            self.model, self.sharded = loader.load(given, checkpoint.path if checkpoint is not None else None)
        if checkpoint is not None and not loader.reads_checkpoints(given):
            store.load_model_weights(checkpoint, self.model)
        teach_ends(self.model, self._further_ends())
        limit_threads(getattr(self.model.config.get_text_config(), "hidden_size", 1024))
        loaded = Loaded(self.model, self.sharded)
        self.policy = loader.policy(loaded, self.recompute)
        self.optimizer = Optimizer(self.policy.trainable, self.training, loader.distributed(loaded))
        if checkpoint is not None:
            store.load_optimizer(checkpoint, self.optimizer.adamw)

    def _check_fits(self, *sets: Prepared | None) -> None:
        """Raises ValueError for tokens beyond the model's embedding and sequences beyond its table of positions."""
        added = getattr(self.settings, "max_new_tokens", 0) if self.algorithm == "grpo" else 0
        for data in sets:
            if data is not None:
                check_tokens(self.policy.causal, data.examples.largest_id, self.tokenizer)
                check_positions(
                    self.policy.causal, data.examples.longest + added, "prompts and completions" if added else "rows"
                )

    def _further_ends(self) -> list[int]:
        """Returns the tokens that end a completion beside those that the model knows."""
        if self.tokenizer is None:
            return []
        own = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        return [*own, *end_tokens_of(self.tokenizer, self.training.chat_template_kwargs)]

    @property
    def needs_reference(self) -> bool:
        """Whether training compares the model with the one it started from."""
        return False

    def needs_copy_of_start(self, checkpoint: Checkpoint | None) -> bool:
        """Whether a model that was given must be copied before it is trained: it is compared with, and cannot be copied later."""
        return self.needs_reference and (checkpoint is not None or self.loader.in_shards)

    def initial_policy(self) -> Policy:
        """Returns a frozen policy with the weights that training started from."""
        if self._given_was_trained:
            raise ValueError(
                "the model that was given has been trained since the run began, and the run compares with the model as it was "
                "then; load the model again, and give it to the same call"
            )
        return self.loader.policy(self.loader.frozen(self._start_model))

    def _identity(self, data: Prepared, validation: Prepared | None) -> dict[str, Any]:
        """Returns what makes two runs the same: what decides the gradients, not how long, how often or where to."""
        return {
            "model": model_identity(self._model_name(), self.model),
            "tokenizer": tokenizer_identity(self.tokenizer),
            "algorithm": self.algorithm,
            **settings_identity(self.training, self.settings),
            "dataset": rows_identity(data.fingerprint, data.streamed),
        }
