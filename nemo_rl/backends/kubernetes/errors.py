"""The errors of talking to a cluster."""

from __future__ import annotations

from nemo_rl.errors import TrainingInterrupted


class ClusterError(RuntimeError):
    """The cluster cannot be used. Says what was found and the command that cures it."""


class ConnectionCut(ClusterError):
    """The connection was there and broke off: asking again may well help."""


class ApiError(ClusterError):
    """An answer of the API server that is no success: its status `code` and its own words."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"the API server answered {code}: {message}")
        self.code = code
        self.reason = message


class JobNotFound(ClusterError, LookupError):
    """There is no job of that name."""


class DownloadError(ClusterError):
    """What a pod serves cannot be fetched: it is unsafe, too large, or not what its digest says."""


class JobCancelled(TrainingInterrupted):
    """The job was cancelled while it was followed; its checkpoint (a path on the claim) waits for `resume`."""
