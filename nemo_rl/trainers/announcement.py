"""What the display says of a run before its first step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemo_rl.data.prepare import Prepared, describe_example
from nemo_rl.model.ends import known_ends
from nemo_rl.run.checkpoint import Checkpoint, CheckpointStore
from nemo_rl.run.directory import Run, nearby

if TYPE_CHECKING:
    from nemo_rl.trainers.base import Trainer


def header(trainer: Trainer, data: Prepared) -> str:
    """One line: what is trained on what, for how long, where."""
    parameters = sum(p.numel() for p in trainer.policy.trainable)
    name = trainer.output_dir.name if trainer.config.model.startswith("python:") else trainer.config.model
    if os.path.isabs(name):
        name = nearby(name)
    return (
        f"{trainer.algorithm.upper()} · {name} · {parameters:,} trained parameters · {len(data.examples):,} rows · "
        f"{trainer.total_steps} steps · {trainer.device.type}"
    )


def notes(
    trainer: Trainer, run: Run, data: Prepared, checkpoint: Checkpoint | None, store: CheckpointStore
) -> Iterator[str]:
    """Sentences on what was chosen, found and left out."""
    if run.notice:
        yield run.notice
    if checkpoint is not None:
        yield f"going on after step {checkpoint.step} from {store.shown(checkpoint.path)}"
    yield str(data.report)
    if rate := trainer.config.default_learning_rate_in_words():
        yield rate
    if trainer.memory is not None:
        yield trainer.memory.sentence()
    if ends := known_ends(getattr(trainer.policy.causal, "generation_config", None)):
        yield f"end tokens: {', '.join(map(str, trainer.tokenizer.convert_ids_to_tokens(ends)))}"
    training = trainer.training
    if trainer.total_steps < training.max_steps / 2:
        epochs = training.max_epochs
        yield (
            f"the data ends first: {len(data.examples)} rows in batches of {training.batch_size} over {epochs} "
            f"epoch{'s' if epochs > 1 else ''} are {trainer.total_steps} steps, not max_steps={training.max_steps}; "
            "raise max_epochs to train longer"
        )
    if training.log_level == "debug":
        yield f"first example: {describe_example(trainer.tokenizer, data.examples[0])}"
