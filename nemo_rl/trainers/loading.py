"""What a run trains and what it compares with: loaded by name or given, whole on each rank or in shards."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nemo_rl.job.spec import RLTrainingJobSpec, TrainingSpec
from nemo_rl.model.adapters import add_adapters
from nemo_rl.model.load import cast_weights, compute_dtype, load_model, load_sharded, prepare_model
from nemo_rl.model.policy import Policy
from nemo_rl.model.sharding import Distributed, Replicas, ShardedModel, is_sharded
from nemo_rl.run.ranks import Ranks

if TYPE_CHECKING:
    from nemo_rl.model.memory import Estimate

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model, and the shards of it that this rank holds where ranks share its weights."""

    model: Any
    sharded: ShardedModel | None = None


class ModelLoader:
    """Loads the model that is trained, and the frozen one that it is compared with.

    Where ranks share weights, shards of trained weights are float32, and those of frozen ones (a reference, what lies under
    adapters) are in the dtype that passes compute in.
    """

    def __init__(self, name: str, training: TrainingSpec, device: torch.device, ranks: Ranks) -> None:
        """`name`: a hub name or a directory, of which models are read that are not given."""
        self.name, self.training, self.device, self.ranks = name, training, device, ranks
        self.in_shards = is_sharded(training.sharding, ranks)
        self.compute_dtype = compute_dtype(training.precision, device)

    # ------------------------------------------------------------------ the trained model

    def reads_checkpoints(self, given: Any) -> bool:
        """Whether `load` reads the weights of a checkpoint: in shards, unless a model is given or adapters are trained."""
        return self.in_shards and given is None and self.training.lora_rank is None

    def load(self, given: Any = None, checkpoint: Path | None = None) -> Loaded:
        """Returns the model to train, with its adapters. Collective where ranks share its weights.

        A model that is `given` is made ready in place, and is whole on each rank until its shards are made. `checkpoint`: a
        directory that has the weights, where `reads_checkpoints`.
        """
        if not self.in_shards:
            if given is None:
                return Loaded(load_model(self.name, self.training, self.device))
            return Loaded(prepare_model(given, self.training, self.device))
        dtype = torch.float32 if self.training.lora_rank is None else self.compute_dtype
        model, sharded = self._shards(given, dtype, checkpoint if self.reads_checkpoints(given) else None)
        if self.training.lora_rank is not None:
            model.requires_grad_(False)
            with sharded.gathered():
                model = add_adapters(model, self.training)
        return Loaded(model, sharded)

    def distributed(self, trained: Loaded) -> Distributed | None:
        """Returns what sums the gradients of the ranks; None for a single one."""
        if trained.sharded is None and self.ranks.size > 1:
            return Replicas(self.ranks)
        return trained.sharded

    # ------------------------------------------------------------------ the model to compare with

    def keep(self, given: Any) -> Loaded:
        """Returns a copy of a given model as it is now, for `frozen`: whole where it is, or this rank's shards of it."""
        copied = Loaded(copy.deepcopy(given))
        return self.frozen(copied) if self.in_shards else copied

    def frozen(self, kept: Loaded | None = None) -> Loaded:
        """Returns a model without gradients and adapters: one that was kept, else that of the name."""
        if kept is not None and kept.sharded is not None:
            return kept
        given = kept.model if kept is not None else None
        if self.in_shards:
            found = Loaded(*self._shards(given, self.compute_dtype))
        elif given is None:
            plain = self.training.model_copy(update={"lora_rank": None})
            found = Loaded(load_model(self.name, plain, self.device))
        else:
            found = Loaded(prepare_model(given, self.training, self.device, adapters=False))
        found.model.requires_grad_(False)
        return found

    # ------------------------------------------------------------------ shards, log-probabilities

    def _shards(self, given: Any, dtype: torch.dtype, files: Path | None = None) -> tuple[Any, ShardedModel]:
        if given is None:
            read_from = str(files) if files is not None else None
            return load_sharded(self.name, self.training, self.device, self._shard, dtype=dtype, files=read_from)
        model = cast_weights(prepare_model(given, self.training, self.device, adapters=False), dtype)
        return model, self._shard(model)

    def _shard(self, model: Any) -> ShardedModel:
        return ShardedModel(model, self.ranks, self.device, self.compute_dtype)

    def policy(self, loaded: Loaded, recompute: bool = False) -> Policy:
        """Returns what computes the model's log-probabilities. `recompute`: make activations again in backward passes."""
        training = self.training
        return Policy(
            loaded.model,
            training.precision,
            recompute,
            longest=training.max_sequence_length,
            sharded=loaded.sharded,
            cast_lm_head_to_fp32=training.cast_lm_head_to_fp32,
        )


def planned_memory(
    spec: RLTrainingJobSpec, config_of: Callable[[], Any], device: torch.device, ranks: Ranks
) -> Estimate | None:
    """Returns the estimate of a run's memory on the smallest GPU of all ranks, which chooses micro-batches and checkpointing
    before anything is loaded; None on the CPU, and for a model that cannot be estimated. `config_of` returns the model's
    configuration. Raises DoesNotFit."""
    if device.type != "cuda":
        return None
    from nemo_rl.model.memory import DoesNotFit, Planner, Where

    least = min(ranks.gather(lambda: torch.cuda.get_device_properties(device).total_memory))
    try:
        return Planner(config_of(), spec).choose(Where(ranks.size, least))
    except DoesNotFit:
        raise
    except Exception as error:  # whatever a family's code raises without numbers, the model itself may train
        log.warning("the memory of this model cannot be estimated (%s: %s)", type(error).__name__, error)
        return None
