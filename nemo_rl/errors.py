"""The errors that the public API raises. Each message says what was found, what was expected and the cure."""

from __future__ import annotations


class DatasetError(ValueError):
    """The data set cannot be used: wrong columns, no rows, an unreadable file."""


class RewardError(RuntimeError):
    """A reward raised, hung, or returned what is not a finite number, under `on_reward_error="raise"`.

    `traceback` is the text of the user's traceback (empty for a time-out or a bad value).
    """

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class MissingPackage(ModuleNotFoundError, RuntimeError):
    """A feature needs a package of an extra that is not installed. The message has the command that installs it."""


class NonFiniteTraining(RuntimeError):
    """The gradient stayed NaN or infinite for several steps in a row, or the model gave such numbers before the first step."""


class TrainingInterrupted(RuntimeError):
    """SIGTERM came; the state was saved. Run the same call again to go on."""

    def __init__(self, message: str, checkpoint_path: str | None, step: int) -> None:
        super().__init__(message)
        self.checkpoint_path = checkpoint_path
        self.step = step


class TrainingFailed(RuntimeError):
    """A job on the cluster failed. Carries what is needed to understand and to resume it."""

    def __init__(
        self,
        message: str,
        *,
        cause: str = "",
        step: int | None = None,
        traceback: str = "",
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.step = step
        self.traceback = traceback
        self.checkpoint = checkpoint


class LeaseLost(RuntimeError):
    """Another attempt of the job writes to the output now, for this one's node was taken for lost. Nothing more is published."""


class RolloutLost(RuntimeError):
    """No rollout server could be reached for the time that the run waits, or one could not be started."""


class WeightSyncMismatch(RuntimeError):
    """What samples completions has other weights than what is trained, whatever it says. Nothing of it was trained on."""


class StorageError(RuntimeError):
    """An object store cannot be used, or holds something else than was expected."""
