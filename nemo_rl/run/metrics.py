"""The record of a run: metrics.jsonl and completions.jsonl, each step exactly once, and steps and samples as lines of a log."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

from nemo_rl.extras import missing
from nemo_rl.run.directory import COMPLETIONS_FILE, METRICS_FILE, TENSORBOARD_DIR
from nemo_rl.run.lease import Lease, guarded

logger = logging.getLogger(__name__)

LINE_ORDER = (
    "epoch",
    "reward",
    "reward_std",
    "loss",
    "kl",
    "grad_norm",
    "learning_rate",
    "completion_length",
    "truncated_fraction",
    "reward_errors",
    "tokens_per_second",
    "step_seconds",
)
"""What a step line shows first. The other metrics follow by name; the phases' seconds are in metrics.jsonl only."""


class MetricsLog:
    """Appends to the files of one run. After a resume from step n, what was written after step n is cut off first.

    Call `log` for a step before its checkpoint is saved: what a checkpoint has behind it is then in the files.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_step: int,
        tensorboard: bool,
        lease: Lease | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`resume_step` is the step of the checkpoint that the run goes on from, 0 for a new run; `settings` are those that
        TensorBoard shows of the run.

        With a lease all files begin as copies: what an earlier holder still writes goes to files without a name.
        """
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lease = lease
        self._metrics, self._last_step = _go_on(run_dir / METRICS_FILE, resume_step, lease)
        if self._last_step != resume_step:
            logger.warning("%s ends at step %d, the run goes on after step %d: the steps between are lost",
                           run_dir / METRICS_FILE, self._last_step, resume_step)  # fmt: skip
            self._last_step = resume_step
        self._completions, _ = _go_on(run_dir / COMPLETIONS_FILE, resume_step, lease)
        self.has_start = any(record["step"] == 0 for record, _ in _intact_records(run_dir / METRICS_FILE)[:1])
        """Whether step 0, the measurement before training, is there already."""
        self._path = run_dir / METRICS_FILE
        self._board = _Board(_board_folder(run_dir), resume_step, lease, settings or {}) if tensorboard else None

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one step. Values are numbers (tensors of one element, too), text or None; NaN and ±inf become null."""
        if self._lease is not None:
            self._lease.check()
        step = metrics["step"]
        if step <= self._last_step and (step > 0 or self.has_start):
            raise ValueError(
                f"step {step} was logged already (the last one is {self._last_step}); each step is logged once"
            )
        values = {name: plain(value) for name, value in metrics.items()}
        _append(self._metrics, [values])
        self._last_step = step
        self.has_start = self.has_start or step == 0
        if self._board is not None:
            scalars = {n: v for n, v in values.items() if n != "step" and isinstance(v, (int, float))}
            self._board.add(step, scalars)

    def replace(self, metrics: dict[str, Any]) -> None:
        """Write the last step anew: of a run that was stopped, the validation data is measured after its line was written."""
        records = _intact_records(self._path)
        if not records or records[-1][0]["step"] != metrics["step"]:
            raise ValueError(f"step {metrics['step']} is not the last one of {self._path}")
        end = records[-2][1] if len(records) > 1 else 0
        self._metrics.flush()
        os.ftruncate(self._metrics.fileno(), end)
        self._last_step = metrics["step"] - 1
        self.log(metrics)

    def log_completions(self, step: int, completions: list[dict[str, Any]]) -> None:
        """Append sample completions of a step, one line each, with the step as first field."""
        _append(
            self._completions,
            [{"step": step, **{name: plain(value) for name, value in c.items()}} for c in completions],
        )
        if self._board is not None and completions:
            self._board.add_samples(step, completions)

    def sync(self) -> None:
        """Bring both files to the disk. Call it before a checkpoint is saved, so that no crash can part them."""
        for stream in (self._metrics, self._completions):
            os.fsync(stream.fileno())

    def close(self) -> None:
        self._metrics.close()
        self._completions.close()
        if self._board is not None:
            self._board.close()


def read_history(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or completions.jsonl in order, without a torn last line; [] when it is absent."""
    return [record for record, _ in _intact_records(Path(path))]


def _board_folder(run_dir: Path) -> Path:
    """Where a run's event files go: a folder with the run's name, by which TensorBoard calls it; that of an earlier part of
    the run stays.
    """
    root = run_dir / TENSORBOARD_DIR
    earlier = (
        sorted(path for path in root.iterdir() if path.is_dir() or "tfevents" in path.name) if root.is_dir() else []
    )
    if not earlier:
        return root / (run_dir.resolve().name or "run")
    return earlier[0] if earlier[0].is_dir() else root


_BOARD_GROUPS = {
    "completions": ("completion_length", "truncated_fraction", "entropy", "flat_group_fraction", "resampled_groups"),
    "rollout": ("rollout_kl", "rollout_logprob_error", "rollout_staleness", "importance_bounded_fraction"),
    "speed": ("tokens", "trained_tokens"),
}
_BOARD_GROUP = {name: group for group, names in _BOARD_GROUPS.items() for name in names}


def board_tag(name: str) -> str:
    """What a metric is called in TensorBoard, which shows what is before the first slash as one group."""
    if "/" in name:
        return name
    if name.endswith(("_seconds", "_per_second")):
        return f"speed/{name}"
    if name.startswith("validation_"):
        return f"validation/{name.removeprefix('validation_')}"
    return f"{_BOARD_GROUP.get(name, 'train')}/{name}"


class _Board:
    """An event file of TensorBoard: scalars of each step, sample completions, the run's settings.

    On a resume TensorBoard drops what it read of later steps.

    It is written through one descriptor, and not by TensorBoard's own writer, which opens the file anew by its name for
    each flush: with a lease, the files that are there are replaced by copies, so that a descriptor of an earlier holder
    leads to a file without a name.
    """

    _made = itertools.count()

    def __init__(self, directory: Path, resume_step: int, lease: Lease | None, settings: Mapping[str, Any]) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise missing("tensorboard=True", "tensorboard") from None
        self._event, self._summary = Event, Summary
        directory.mkdir(parents=True, exist_ok=True)
        if lease is not None:
            for path in sorted(directory.iterdir()):
                with lease.guard():
                    shutil.copyfile(path, lease.staging / path.name)
                lease.publish(lease.staging / path.name, path)
        # TensorBoard reads the files of a folder by the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(self._made)}"
        with guarded(lease):
            self._records = RecordWriter(_create((lease.staging if lease else directory) / name))
        first = resume_step + 1 if resume_step else 0
        self._write(Event(step=first, file_version="brain.Event:2"))
        if resume_step:
            self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        if settings:
            self._write(Event(step=first, summary=self._summary(value=_settings_values(settings))))
        self._records.flush()
        if lease is not None:
            lease.publish(lease.staging / name, directory / name)

    def add(self, step: int, scalars: dict[str, int | float]) -> None:
        value = [self._summary.Value(tag=board_tag(name), simple_value=number) for name, number in scalars.items()]
        self._write(self._event(step=step, summary=self._summary(value=value)))
        self._records.flush()

    def add_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Each sample as a text: its reward, prompt and completion, as they are."""
        value = [_text_value(f"samples/{number}", _sample_text(sample)) for number, sample in enumerate(samples, 1)]
        self._write(self._event(step=step, summary=self._summary(value=value)))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _text_value(tag: str, text: str) -> Any:
    """A text in the form of TensorBoard's plugin for texts, which shows Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text.metadata import create_summary_metadata

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    content = text.encode("utf-8", errors="backslashreplace")
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=create_summary_metadata(None, ""), tensor=tensor)


def _sample_text(sample: Mapping[str, Any]) -> str:
    reward = plain(sample.get("reward"))
    shown = f"{reward:.4g}" if isinstance(reward, int | float) else "none"
    texts = [str(sample.get(name, ""))[:BOARD_CHARACTERS] for name in ("prompt", "completion")]
    # four spaces make a line code: what a model writes is shown as it is
    prompt, completion = ("\n".join(f"    {line}" for line in text.splitlines()) or "    " for text in texts)
    return f"reward {shown}\n\nprompt\n\n{prompt}\n\ncompletion\n\n{completion}"


BOARD_CHARACTERS = 2000
"""Of each text of a sample in TensorBoard; the whole is in completions.jsonl."""


def _settings_values(settings: Mapping[str, Any]) -> list[Any]:
    """The settings as a table, and for TensorBoard's page that compares runs by them."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in settings.items()]
    values = [_text_value("settings", "\n".join(["| setting | value |", "| --- | --- |", *lines]))]
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in settings.items():
        entry = start.hparams[name]
        if isinstance(value, bool):
            entry.bool_value = value
        elif isinstance(value, int | float):
            entry.number_value = value
        else:
            entry.string_value = str(value)
    data = plugin_data_pb2.HParamsPluginData(session_start_info=start, version=metadata.PLUGIN_DATA_VERSION)
    about = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    tag = metadata.SESSION_START_INFO_TAG
    return [*values, Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=about), tensor=metadata.NULL_TENSOR)]


def _go_on(path: Path, resume_step: int, lease: Lease | None) -> tuple[IO[str], int]:
    """The file to append to, cut after `resume_step`, and the last step in it. With a lease it is a copy in its place."""
    if lease is None:
        last = _cut(path, resume_step)
        return _open_lines(path), last
    aside = lease.staging / path.name
    with lease.guard():
        if path.exists():
            shutil.copyfile(path, aside)
        last = _cut(aside, resume_step)
        stream = _open_lines(aside)
    lease.publish(aside, path)
    return stream, last


def _cut(path: Path, resume_step: int) -> int:
    """Cut what is torn or of steps after `resume_step` off the end of the file; returns the last step that stays."""
    last_step = end = 0
    for record, record_end in _intact_records(path):
        if record["step"] > resume_step:
            break
        last_step, end = record["step"], record_end
    if path.exists() and path.stat().st_size > end:
        os.truncate(path, end)
    return last_step


def _intact_records(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Each record with the byte offset of its end, up to the first line that is torn or no record."""
    records = []
    end = 0
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append((record, end))
    return records


def _open_lines(path: Path) -> IO[str]:
    # Half of a surrogate pair, which a tokenizer may decode to, becomes the \\uXXXX that JSON has for it.
    return open(path, "a", encoding="utf-8", errors="backslashreplace")


def _create(path: Path) -> IO[bytes]:
    return open(path, "xb")


def _append(stream: IO[str], records: list[dict[str, Any]]) -> None:
    stream.write("".join(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n" for record in records))
    stream.flush()


def plain(value: Any) -> Any:
    """JSON for a metric: the number in a tensor or array of one element, null for what is not finite."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


# --- a step as one line ---------------------------------------------------------------------------------------------


def short_line(metrics: Mapping[str, Any], total_steps: int | None = None, left: str | None = None) -> str:
    """`step=12/500 reward=0.61 … left="14 min"`: what matters most to the algorithm, in the form of `step_line`."""
    chosen = {"step": metrics["step"]}
    for name in _SHORT:
        value = plain(metrics.get(name))
        needless = (name == "loss" and metrics.get("reward") is not None) or (name in _IF_ANY and not value)
        if value is not None and not needless:
            chosen[name] = value
    first = step_line({"step": metrics["step"]}, total_steps)
    rest = [f"{name}={_line_value(value)}" for name, value in chosen.items() if name != "step"]
    return " ".join([first, *rest, *([f"left={_line_value(left)}"] if left else [])])


_SHORT = (
    *("reward", "reward_std", "preference_accuracy", "reward_margin", "loss"),
    *("validation_reward", "validation_accuracy", "validation_loss", "kl", "completion_length", "truncated_fraction"),
    *("reward_errors", "learning_rate", "step_seconds"),
)
_IF_ANY = ("truncated_fraction", "reward_errors")
"""What is left out where it is 0."""


def step_line(metrics: dict[str, Any], total_steps: int | None = None) -> str:
    """`step=12/500 reward=0.61 …`: a step for people and for `parse_step_line`; numbers of four significant digits."""
    first = f"step={metrics['step']}" + (f"/{total_steps}" if total_steps is not None else "")
    known = [name for name in LINE_ORDER if name in metrics]
    others = sorted(
        name for name in metrics if name not in LINE_ORDER and name != "step" and not name.endswith("_seconds")
    )
    return " ".join([first, *(f"{_line_name(name)}={_line_value(plain(metrics[name]))}" for name in known + others)])


_STEP = re.compile(r"step=(\d+)(?:/(\d+))?(?= |$)")
_FIELD = re.compile(r' ([^\s="]+)=("(?:[^"\\]|\\.)*"|[^\s"]+)')


def parse_step_line(line: str) -> dict[str, Any] | None:
    """The metrics of a step line, `total_steps` among them where it is given; None for any other line."""
    line = line.rstrip("\r\n")
    first = _STEP.match(line)
    if first is None:
        return None
    metrics: dict[str, Any] = {"step": int(first[1])}
    if first[2] is not None:
        metrics["total_steps"] = int(first[2])
    fields = _fields(line, first.end())
    return None if fields is None else metrics | fields


def _fields(line: str, position: int) -> dict[str, Any] | None:
    """What ` name=value` pairs from that position on say; None where there is something else."""
    found: dict[str, Any] = {}
    while position < len(line):
        field = _FIELD.match(line, position)
        if field is None:
            return None
        try:
            found[unquote(field[1])] = json.loads(field[2])
        except ValueError:
            return None
        position = field.end()
    return found


def main_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The metrics that matter most to the algorithm, as (name, text); what is absent is left out.

    Of GRPO the loss is left out: it is near zero whatever the model learns.
    """
    for name, key, spread in _SHOWN:
        value = metrics.get(key)
        if value is None or (key == "loss" and metrics.get("reward") is not None):
            continue
        if key == "truncated_fraction":
            if value > 0:
                yield name, f"{100 * value:.0f} %"
            continue
        deviation = f" ± {metrics[spread]:.3g}" if spread and metrics.get(spread) is not None else ""
        yield name, (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") + deviation


_SHOWN = (
    ("reward", "reward", "reward_std"),
    ("accuracy", "preference_accuracy", None),
    ("margin", "reward_margin", None),
    ("loss", "loss", None),
    ("validation reward", "validation_reward", None),
    ("validation accuracy", "validation_accuracy", None),
    ("validation loss", "validation_loss", None),
    ("kl", "kl", None),
    ("length", "completion_length", None),
    ("cut off", "truncated_fraction", None),
    ("learning rate", "learning_rate", None),
    ("tokens/s", "tokens_per_second", None),
)
"""What displays show of a step: name, metric, and the metric of its spread."""


# --- a sample completion as one line --------------------------------------------------------------------------------

SHOWN_SAMPLES = 2
SAMPLE_CHARACTERS = 240
"""Of each text of a sample line; the whole is in completions.jsonl."""
_SAMPLE = re.compile(r"sample(?= )")


def sample_line(step: int, sample: dict[str, Any]) -> str:
    """`sample step=12 reward=0.61 prompt="…" completion="…"`: a completion for people and for `parse_sample_line`."""
    fields = {"step": step, "reward": sample.get("reward")}
    fields |= {name: _excerpt(str(sample[name])) for name in ("prompt", "completion")}
    return " ".join(["sample", *(f"{name}={_line_value(plain(value))}" for name, value in fields.items())])


def parse_sample_line(line: str) -> dict[str, Any] | None:
    """Step, reward (None where the reward failed), prompt and completion of a sample line; None for any other line."""
    line = line.rstrip("\r\n")
    first = _SAMPLE.match(line)
    found = _fields(line, first.end()) if first else None
    kinds = {"step": int, "prompt": str, "completion": str, "reward": int | float | None}
    if found is None or not all(name in found and isinstance(found[name], kind) for name, kind in kinds.items()):
        return None
    return found


def _excerpt(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[: SAMPLE_CHARACTERS - 1]}…"


def _line_name(name: str) -> str:
    return quote(name, safe="/-_.:@+()[]")


def _line_value(value: Any) -> str:
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")
        if not math.isfinite(rounded):  # the largest numbers there are
            return repr(value)
        return f"{rounded:.0f}" if rounded.is_integer() and abs(rounded) < 1e9 else f"{rounded:.4g}"
    if value is None or isinstance(value, (bool, int)):
        return json.dumps(value)
    return json.dumps(value if isinstance(value, str) else json.dumps(value), ensure_ascii=True)
