"""What is known about a running or finished job: `status` of the resource, and the two messages a trainer pod sends.

Three wire contracts live here, all in camelCase:

- `Progress`: what the pod with index 0 serves at `GET /progress` (JSON, at most `names.PROGRESS_LIMIT` bytes).
- `TerminationMessage`: what it leaves in `names.TERMINATION_LOG` as its last act (JSON, at most 4096 bytes).
- `JobStatus`: what the operator writes to `/status`, and what clients read.

A pod runs code of users, so nothing that it says is trusted: overlong texts are cut, control characters and surplus metrics
are dropped, and fields that are unknown or do not fit are left out. None of that is an error.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from nemo_rl.job import decode, names
from nemo_rl.job.spec import MAX_REPLICAS
from nemo_rl.job.text import clean

MAX_METRICS = 64
MAX_ATTEMPTS = 10
"""Newest attempts that `status.attempts` keeps."""
TRACEBACK_LINES = 20
SCORES = {"grpo": "reward", "sft": "loss", "dpo": "preference_accuracy"}
"""Metric that `status.score` shows, by algorithm."""


class Cause(StrEnum):
    """Why an attempt ended without success. The first group ends the job, the second counts, the third does not."""

    USER_ERROR = "UserError"
    BAD_DATA = "BadData"
    NON_FINITE = "NonFiniteTraining"
    WEIGHT_SYNC_MISMATCH = "WeightSyncMismatch"
    INVALID_SPEC = "InvalidSpec"
    INVALID_IMAGE = "InvalidImageName"
    DEADLINE = "DeadlineExceeded"
    BUNDLES_MISSING = "BundlesMissing"
    NAME_CONFLICT = "NameConflict"

    OUT_OF_MEMORY = "OutOfMemory"
    STORAGE_EXCEEDED = "StorageExceeded"
    START_FAILED = "StartFailed"
    NO_RESULT = "NoResult"
    STALLED = "Stalled"
    ROLLOUT_LOST = "RolloutLost"
    ERROR = "Error"
    UNKNOWN = "Unknown"

    NODE_REJECTED = "NodeRejected"
    PREEMPTED = "Preempted"
    DISRUPTED = "Disrupted"
    STARTUP_TIMEOUT = "StartupTimeout"
    NODE_LOST = "NodeLost"
    JOB_DELETED = "JobDeleted"
    SUSPENDED = "Suspended"


class Wire(BaseModel):
    """Base of all parts of the status: camelCase outside, unknown fields ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @classmethod
    def of_a_pod(cls, value: Any) -> Self:
        """What a pod said. Fields that do not fit are left out; ValidationError only where one is lacking that must be.

        A time that no calendar has is a fault of the trainer, but none for which a finished run should have failed.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            if not isinstance(value, dict):
                raise
            kept = copy.deepcopy(value)
            for broken in error.errors(include_url=False, include_context=False, include_input=False):
                _leave_out(kept, broken["loc"])
            return cls.model_validate(kept)


def _leave_out(value: Any, path: tuple[str | int, ...]) -> None:
    """Drop what is at this path; where the path leads nowhere, all that its first part leads to."""
    here = value
    try:
        for part in path[:-1]:
            here = here[part]
        del here[path[-1]]
    except (LookupError, TypeError):
        value.pop(path[0] if path else None, None)


def _cut(limit: int) -> BeforeValidator:
    """A text loses what could drive a terminal, and over `limit` characters its end."""

    def cut(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        text = clean(value)
        return text[: limit - 1] + "…" if len(text) > limit else text

    return BeforeValidator(cut)


def _tail(value: Any) -> Any:
    """A traceback keeps its last lines: the error itself stands there."""
    if not isinstance(value, str):
        return value
    return "\n".join(clean(value).rstrip().splitlines()[-TRACEBACK_LINES:])[-4000:]


_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")


def _time_or_none(value: Any) -> Any:
    """A time that the API server takes, or None: it refuses a whole status for one time that is none."""
    if not isinstance(value, str) or not _RFC_3339.fullmatch(value):
        return None
    try:
        datetime.fromisoformat(re.sub(r"\.\d+", "", value.upper()))
    except ValueError:
        return None
    return value


def _inside(value: Any) -> Any:
    """A path that stays below the claim's root; ValueError otherwise."""
    if isinstance(value, str) and (value.startswith("/") or ".." in value.split("/")):
        raise ValueError("leads out of the claim")
    return value.replace("\n", "") if isinstance(value, str) else value


_PLACE = re.compile(r"(rank \d+|the main thread):$")
"""The line above a stack that says whose it is."""


def stacks_together(*stacks: str) -> str:
    """Stacks of several processes in at most 20 lines: of each who it is, and its innermost frames."""
    sections: list[list[str]] = []
    for line in "\n".join(stack for stack in stacks if stack).splitlines():
        if _PLACE.match(line) or not sections:
            sections.append([line])
        else:
            sections[-1].append(line)
    sections = sections[: TRACEBACK_LINES // 2]
    each = TRACEBACK_LINES // max(1, len(sections)) - 1
    return "\n".join("\n".join([head, *frames[-each:]]) for head, *frames in sections)


def _metrics(value: Any) -> Any:
    """Numbers become short texts; what is neither number nor text, or beyond the first 64, is dropped."""
    if not isinstance(value, Mapping):
        return value
    kept: dict[str, str] = {}
    for name, metric in value.items():
        if isinstance(metric, bool) or not isinstance(metric, str | int | float) or len(kept) == MAX_METRICS:
            continue
        text = f"{metric:.6g}" if isinstance(metric, float) else clean(str(metric)) if _short(metric) else "…"
        kept[clean(str(name))[:64]] = text[:64]
    return kept


def _short(metric: Any) -> bool:
    """Python refuses to write integers of thousands of digits."""
    return not isinstance(metric, int) or abs(metric) < 10**60


Word = Annotated[str, _cut(64), Field(max_length=64)]
Text = Annotated[str, _cut(200), Field(max_length=200)]
Sentence = Annotated[str, _cut(1024), Field(max_length=1024)]
Path = Annotated[str, BeforeValidator(_inside), _cut(512), Field(max_length=512)]
Traceback = Annotated[str, BeforeValidator(_tail), Field(max_length=4096)]
Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
Metrics = Annotated[
    dict[str, Annotated[str, Field(max_length=64)]], BeforeValidator(_metrics), Field(max_length=MAX_METRICS)
]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class Checkpoint(Wire):
    """The checkpoints of the run, as paths within the output claim."""

    latest: Path | None = None
    """Path of the newest complete checkpoint, from the claim's root."""
    latest_step: Count | None = None
    """Optimizer step of the newest checkpoint."""
    best: Path | None = None
    """Path of the best checkpoint: highest validation metric, else highest mean reward, else the newest."""
    best_step: Count | None = None
    """Optimizer step of the best checkpoint."""
    best_metric: Text | None = None
    """What made it the best, for example reward=0.61."""


MemberState = Literal["Pending", "Loading", "Ready", "Updating", "Refused", "Lost"]


def _tolerant(value: Any) -> Any:
    """What a pod says of its replicas, without those that do not fit: one must not hide the others."""
    if not isinstance(value, list):
        return value
    found = []
    for one in value[:MAX_REPLICAS]:
        try:
            found.append(ServerReport.of_a_pod(one))
        except ValidationError:
            continue
    return found


class ServerReport(Wire):
    """What the trainer knows of one rollout server: it alone sees whether one has the weights, and has passed the gate."""

    address: Annotated[str, _cut(128), Field(max_length=128)]
    """Host and port."""
    state: MemberState
    """Loading, Ready, Updating, Refused or Lost."""
    weight_version: Count | None = None
    """Optimizer step of the weights that it has proved to have."""
    tokens_per_second: Count | None = None
    """Tokens that it sampled in a second of the last rollouts."""
    message: Text | None = None
    """Why it is in this state, in one sentence."""


Servers = Annotated[list[ServerReport], Field(max_length=MAX_REPLICAS)]


class RolloutMember(Wire):
    """One rollout replica of the job."""

    name: Annotated[str, Field(max_length=253)]
    """Name of its pod."""
    state: MemberState
    """Pending (its pod does not run), Loading, Ready, Updating, Refused (it has other weights, and gets no requests) or Lost."""
    weight_version: Count | None = None
    """Optimizer step of the weights that it has proved to have."""
    tokens_per_second: Count | None = None
    """Tokens that it sampled in a second of the last rollouts."""
    message: Text | None = None
    """Why it is in this state, in one sentence."""


class RolloutStatus(Wire):
    """The rollout replicas of the job."""

    replicas: Count = 0
    """Replicas that are asked of the cluster."""
    ready: Count = 0
    """Replicas that have the weights of now, have passed the gate, and get requests."""
    text: Text | None = None
    """Both for people, for example 1/2."""
    weight_version: Count | None = None
    """Newest optimizer step whose weights a replica has proved to have."""
    selector: Annotated[str, Field(max_length=512)] | None = None
    """Label selector of the replicas' pods, for the scale subresource."""
    missing_since: Time | None = None
    """Since when a replica has no pod, or when that was last looked into."""
    members: Annotated[list[RolloutMember], Field(max_length=MAX_REPLICAS)] = []
    """Each replica, by number."""


class Bottleneck(Wire):
    """What takes most of a step, over the last steps."""

    phase: Literal["Rollout", "Reward", "Training", "WeightSync", "Data"]
    """Rollout, Reward, Training, WeightSync or Data (what is none of the others)."""
    share: Annotated[str, _cut(8), Field(max_length=8)]
    """Its share of a step, for example 0.71."""
    advice: Text | None = None
    """What takes so long, and what would help, in one sentence."""


class Progress(Wire):
    """How far training is; served by the pod with index 0 at /progress, and copied to the status every few seconds.

    A trainer must give `step`. What it leaves out of `text`, `percent` and `eta` is derived from the rest.
    """

    step: Count
    """Optimizer steps done, counted over all attempts."""
    total_steps: Count | None = None
    """Optimizer steps that the run will take."""
    text: Text | None = None
    """Steps as text, for example 120/500."""
    percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """Share of the steps that are done, in percent."""
    seconds_remaining: Count | None = None
    """Estimated seconds until the end of training."""
    eta: Word | None = None
    """The same for people, for example 14m."""
    epoch: Count | None = None
    """Pass over the data, from 0."""
    metrics: Metrics = {}
    """Newest metrics as text, for example reward: "0.61". At most 64."""
    time: Annotated[Time | None, BeforeValidator(_time_or_none)] = None
    """When the step ended (RFC 3339)."""
    checkpoint: Annotated[Checkpoint | None, Field(exclude=True)] = None
    """Checkpoints so far; the status shows them beside the progress."""
    rollout: Annotated[Servers | None, BeforeValidator(_tolerant), Field(exclude=True)] = None
    """Rollout servers as the trainer sees them; the status shows them beside the progress."""
    bottleneck: Annotated[Bottleneck | None, Field(exclude=True)] = None
    """What takes most of a step; the status shows it beside the progress."""

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        """Trainers compute these by division; a fraction of a second or of a percent is not an error."""
        if not isinstance(value, Mapping):
            return value
        whole = dict(value)
        for name in ("percent", "secondsRemaining", "seconds_remaining"):
            number = whole.get(name)
            if isinstance(number, float):
                whole[name] = int(number) if math.isfinite(number) else None
        return whole

    @model_validator(mode="after")
    def _derive(self) -> Progress:
        if self.text is None:
            self.text = f"{self.step}/{self.total_steps}" if self.total_steps else str(self.step)
        if self.percent is None and self.total_steps:
            self.percent = min(100, 100 * self.step // self.total_steps)
        if self.eta is None and self.seconds_remaining is not None:
            self.eta = duration(self.seconds_remaining)
        return self


def duration(seconds: float) -> str:
    """Seconds as people write them, in the two largest units: 45s, 14m, 2h5m, 3d4h."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    minutes = seconds // 60
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes}m" if minutes else f"{hours}h"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours}h" if hours else f"{days}d"


class Result(Wire):
    """What a finished job leaves."""

    total_steps: Count = 0
    """Optimizer steps that ran, over all attempts."""
    metrics: Metrics = {}
    """Final metrics as text. At most 64."""
    checkpoint: Checkpoint | None = None
    """The checkpoints that are kept."""


class TerminationMessage(Wire):
    """The trainer's last word, written to names.TERMINATION_LOG before the process of rank 0 exits.

    kind `result` with exit code 0 is what makes a job Succeeded. kind `failure` explains any other exit. Every process
    may write a failure; the first one wins, so write only where the file is still empty. Use `encode`, which keeps
    within the 4096 bytes that the kubelet reads.
    """

    kind: Literal["result", "failure"]
    """result after success, failure otherwise."""
    total_steps: Count | None = None
    """Optimizer steps done, over all attempts."""
    metrics: Metrics = {}
    """Final metrics as text."""
    checkpoint: Checkpoint | None = None
    """The checkpoints that are kept."""
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = None
    """Exit code that the failed process chose (names.ExitCode); torchrun itself always exits with 1."""
    cause: Word | None = None
    """One of Cause, or the name of the exception's class."""
    message: Sentence | None = None
    """The error in one sentence: found, expected, cure."""
    traceback: Traceback | None = None
    """Last 20 lines of the traceback."""

    def encode(self) -> str:
        """JSON of at most 4096 bytes: metrics, then the traceback's beginning, then the message's end are left out."""
        message = self.model_copy(deep=True)
        while len(text := message.model_dump_json(by_alias=True, exclude_none=True).encode()) > names.TERMINATION_LIMIT:
            excess = len(text) - names.TERMINATION_LIMIT
            if message.metrics and not message.traceback:
                message.metrics = dict(list(message.metrics.items())[: len(message.metrics) // 2])
            elif message.traceback:
                lines = message.traceback.splitlines()
                message.traceback = "\n".join(lines[1:]) if len(lines) > 1 else lines[0][excess:] or None
            elif message.message:
                message.message = message.message[: max(0, len(message.message) - excess)] or None
            else:
                message.checkpoint = None
        return text.decode()

    @classmethod
    def parse(cls, text: str | None) -> TerminationMessage | None:
        """The message in `text`, or None if it holds none: a pod may end without one, or write anything."""
        try:
            value = decode.loads(text or "")
            return cls.of_a_pod(value) if isinstance(value, dict) else None
        except ValueError:
            return None


class Condition(Wire):
    """One observation about the job, as in the Kubernetes API conventions."""

    type: Word
    """Accepted, Running, Suspended, Blocked, OutputServed, Complete, Failed or Finished."""
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    reason: Word
    """One word, for programs."""
    message: Sentence = ""
    """One sentence, for people."""
    observed_generation: Count | None = None
    """metadata.generation that this was computed from."""
    last_transition_time: Time
    """When status last changed."""


class Attempt(Wire):
    """One run of the trainer pods."""

    number: Annotated[int, Field(ge=1)]
    """Number of the attempt, from 1."""
    job: Annotated[str, Field(max_length=63)]
    """Name of its batch/v1 Job."""
    start_time: Time | None = None
    """When its Job was created."""
    running_time: Time | None = None
    """When all its pods ran for the first time; not set where they never did."""
    end_time: Time | None = None
    """When it ended; not set while it is live."""
    cause: Word | None = None
    """Why it ended: Succeeded, or the cause of its failure."""
    counted: bool | None = None
    """Whether it counts towards backoffLimit."""
    exit_code: Annotated[int, Field(ge=-255, le=255)] | None = None
    """Exit code of the trainer."""
    message: Text | None = None
    """What happened, in one sentence."""
    from_step: Count | None = None
    """Optimizer step of the checkpoint that it began with."""
    to_step: Count | None = None
    """Last optimizer step that it reported."""


class Failure(Wire):
    """Why the job failed; outlives the pods."""

    cause: Word
    """One word, for example UserError, OutOfMemory, DeadlineExceeded."""
    exit_code: Annotated[int, Field(ge=-255, le=255)] | None = None
    """Exit code of the trainer."""
    pod: Annotated[str, Field(max_length=253)] | None = None
    """Pod that failed first."""
    message: Sentence | None = None
    """What happened and what to do about it."""
    traceback: Traceback | None = None
    """Last 20 lines of the trainer's traceback."""


Phase = Literal["Pending", "Queued", "Starting", "Running", "Suspended", "Succeeded", "Failed"]


class JobStatus(Wire):
    """What the operator knows about the job. Written by the operator alone."""

    observed_generation: Count | None = None
    """metadata.generation that this status was computed from."""
    phase: Phase | None = None
    """Pending (waits for something), Queued (in Kueue), Starting, Running, Suspended, Succeeded or Failed."""
    reason: Word | None = None
    """Why it is in this phase, in one word."""
    message: Sentence | None = None
    """One sentence a person can act on."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
        ),
    ] = []
    """Accepted, Running, Suspended, Blocked (a call about its objects is refused), OutputServed, Complete, Failed, Finished (true after either outcome)."""
    start_time: Time | None = None
    """When the first attempt started."""
    completion_time: Time | None = None
    """When the job succeeded or failed."""
    active_since: Time | None = None
    """Since when the clock of activeDeadlineSeconds runs; set only while a pod of the job may run."""
    active_seconds: Count | None = None
    """Seconds of that clock before activeSince."""
    gpus: Count | None = None
    """GPUs of all pods together."""
    gpu_seconds: Count | None = None
    """GPU seconds that its pods have used, over all attempts: of each its GPUs, from when it has a node until it ends. Not set for jobs without GPUs."""
    gpu_seconds_time: Time | None = None
    """When that was counted; what has run since comes on top."""
    attempt: Count | None = None
    """Number of the newest attempt."""
    job_digest: Word | None = None
    """Begins the SHA-256 of the job as it was when its first attempt started: that is what all attempts read."""
    counted_failures: Count | None = None
    """Failed attempts that count towards backoffLimit."""
    attempts: Annotated[list[Attempt], Field(max_length=MAX_ATTEMPTS)] = []
    """The newest 10 attempts, oldest first."""
    progress: Progress | None = None
    """How far training is."""
    score: Text | None = None
    """What the algorithm is judged by, as text: reward of grpo, loss of sft, preference accuracy of dpo."""
    checkpoint: Checkpoint | None = None
    """The checkpoints so far."""
    rollout: RolloutStatus | None = None
    """The rollout replicas, where the job has some and they run."""
    bottleneck: Bottleneck | None = None
    """What takes most of a step of grpo, over the last steps."""
    result: Result | None = None
    """The outcome of a job that succeeded."""
    failure: Failure | None = None
    """Why the job failed."""

    @property
    def finished(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    def condition(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)

    def dump(self) -> dict[str, Any]:
        """The status as written to the API: JSON values, camelCase, empty fields left out."""
        found: dict[str, Any] = _clean_all(self.model_dump(mode="json", by_alias=True, exclude_none=True))
        for name in ("conditions", "attempts"):
            if not found[name]:
                del found[name]
        return found

    def duplicate(self) -> JobStatus:
        """A copy that shares nothing that can be changed; four times as fast as `model_copy(deep=True)`."""
        found: JobStatus = _duplicate(self)
        return found

    @classmethod
    def load(cls, status: Mapping[str, Any] | None) -> JobStatus:
        """The status in a resource. A top-level field that does not fit is left out, to be computed anew."""
        value = dict(status or {})
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            for broken in error.errors():
                value.pop(str(broken["loc"][0]), None)
            return cls.model_validate(value)


def _duplicate(value: Any) -> Any:
    if isinstance(value, BaseModel):
        inner = {n: _duplicate(v) for n, v in value.__dict__.items() if isinstance(v, BaseModel | list | dict)}
        return value.model_copy(update=inner)
    if isinstance(value, list):
        return [_duplicate(each) for each in value]
    return {name: _duplicate(each) for name, each in value.items()} if isinstance(value, dict) else value


def _clean_all(value: Any) -> Any:
    """The value with all its texts clean: some come from nodes and from other programs, and pass no model on their way."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {name: _clean_all(inner) for name, inner in value.items()}
    return [_clean_all(inner) for inner in value] if isinstance(value, list) else value
