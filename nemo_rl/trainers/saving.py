"""Checkpoints of a trainer: written in the run's folder or wherever the user says, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_rl.display.phases import Phase
from nemo_rl.job.spec import RLTrainingJobSpec, TrainingSpec
from nemo_rl.model.load import load_model
from nemo_rl.run.card import is_hub_name, make_record, texts_of
from nemo_rl.run.checkpoint import CheckpointStore, load_into, read_checkpoint, write_checkpoint
from nemo_rl.run.directory import default_output_dir
from nemo_rl.trainers.optimizer import Optimizer


class Saving:
    """How a trainer saves: model, tokenizer, optimizer and what a resumed run needs besides. Every rank calls each of these."""

    config: RLTrainingJobSpec
    training: TrainingSpec
    device: torch.device
    model: Any
    tokenizer: Any
    optimizer: Optimizer | None
    current_step: int

    def save_checkpoint(self, path: Path | str) -> Path:
        """Writes model, tokenizer and trainer state to a directory that `AutoModelForCausalLM.from_pretrained` loads.

        On several ranks every rank calls it.
        """
        return write_checkpoint(
            Path(path),
            step=self.current_step,
            **self._parts(),
            state=self.state() if self.optimizer is not None else {},
            texts=texts_of(self.record({})),
        )

    def load_checkpoint(self, path: Path | str) -> None:
        """Loads model weights and, where they are there, optimizer state and step from such a directory."""
        checkpoint = read_checkpoint(Path(path))
        if self.model is None:
            self.model = load_model(str(path), self.training, self.device)
        load_into(checkpoint, self.model, self._parts()["optimizer"])
        self.current_step = checkpoint.step

    def save_to(self, store: CheckpointStore, state: dict[str, Any], metric: float | None) -> Path:
        """Saves the current step with this state."""
        self.begin_phase("saving a checkpoint")
        texts = texts_of(self.record(state.get("metrics", {})))
        return store.save(self.current_step, **self._parts(), state=state, metric=metric, texts=texts)

    def prove_saving(self, store: CheckpointStore) -> None:
        """Writes a checkpoint and removes it: what cannot be saved, or has no room, fails before anything is trained."""
        self.begin_phase("writing a checkpoint on trial")
        store.try_out(**self._parts(), state=self.state())

    def record(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a checkpoint of now says about itself: `nemo_rl.run.card.make_record`."""
        return make_record(
            self.config,
            base_model=self._base_model(),
            rewards=self.reward_names,
            step=self.current_step,
            metrics=metrics,
        )

    def _parts(self) -> dict[str, Any]:
        optimizer = self.optimizer.adamw if self.optimizer is not None else None
        return {"model": self.model, "tokenizer": self.tokenizer, "optimizer": optimizer}

    def _base_model(self) -> str:
        """Returns the name of the model that training began from, without the folder that it lies in."""
        name = str(self.config.model)
        if name.startswith("python:"):
            name = str(getattr(self.model.config, "name_or_path", "") or type(self.model).__name__)
        return name if is_hub_name(name) else default_output_dir(name).name

    # ------------------------------------------------------------------ what a trainer fills in

    @property
    def reward_names(self) -> list[str]:
        return []

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs of the trainer beyond weights and optimizer, JSON-able."""
        raise NotImplementedError

    def begin_phase(self, name: str, total: int | None = None, unit: str = "") -> Phase:
        """Tells the display what is done from now on, and returns the phase, which counts it."""
        raise NotImplementedError
