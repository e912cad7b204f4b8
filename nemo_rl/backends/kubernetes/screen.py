"""What the caller sees of a job on the cluster: the local run's display, fed from status and log."""

from __future__ import annotations

import re
from typing import Any

from nemo_rl.display.phases import phase_of_line
from nemo_rl.display.terminal import Display, PlainDisplay, make_display
from nemo_rl.job.status import JobStatus
from nemo_rl.job.text import dotted
from nemo_rl.run.metrics import SHOWN_SAMPLES, parse_sample_line, parse_step_line

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_LONGEST_PARSED = 20_000
"""A line of a pod that is longer is no step: pods print what they like."""


class Screen:
    """Shows a job and keeps the metrics of its steps: `history` has each step once, the newest attempt's where two had it."""

    def __init__(self, log_level: str = "info", display: Display | None = None, *, log_every: int = 1) -> None:
        self._display = display if display is not None else make_display(log_level, log_every=log_every)
        self._steps: dict[int, dict[str, Any]] = {}
        self._samples: list[dict[str, Any]] = []
        self._said = ""
        self._states: dict[str, str] = {}
        self._bottleneck = ""
        self._open = False
        self._closed = False

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self._steps[step] for step in sorted(self._steps)]

    def status(self, status: JobStatus) -> None:
        """Says the phase and why, when it changes. Running jobs speak by their log."""
        said = f"{status.phase or 'Pending'}: {printable(status.message)}" if status.message else status.phase or ""
        if status.phase != "Running" and said and said != self._said:
            self.note(said)
        self._said = said
        self._replicas(status)

    def _replicas(self, status: JobStatus) -> None:
        """Says what became of each rollout replica, when that changes; that weights are on their way is no news."""
        members = status.rollout.members if status.rollout else []
        for member in members:
            state = "Ready" if member.state == "Updating" else member.state
            if state != self._states.get(member.name):
                why = f": {member.message}" if member.message and state not in ("Ready", "Loading") else ""
                self.note(f"rollout replica {member.name}: {state}{why}")
        self._states = {m.name: "Ready" if m.state == "Updating" else m.state for m in members}
        if members and status.bottleneck is not None and status.bottleneck.phase != self._bottleneck:
            self._bottleneck = status.bottleneck.phase
            self.note(status.bottleneck.advice or f"waits for {status.bottleneck.phase}")

    def note(self, text: str) -> None:
        self._display.note(f"nemo-rl: {printable(text)}")

    def line(self, text: str) -> None:
        """One line of the pod's log."""
        text = printable(text)
        sample = parse_sample_line(text) if len(text) < _LONGEST_PARSED else None
        if sample is not None and not isinstance(self._display, PlainDisplay):
            self._sample(sample)
            return
        if not isinstance(self._display, PlainDisplay) and (phase := phase_of_line(text)) is not None:
            self._display.phase(phase)
            return
        metrics = _metrics(text)
        if metrics is None:
            self._display.note(text)
            return
        total = metrics.pop("total_steps", None)
        self._steps[metrics["step"]] = metrics
        if isinstance(self._display, PlainDisplay):
            self._display.expect(total)
            self._display.step(metrics, [])
            return
        if total and not self._open:
            self._open = True
            self._display.start(total, "nemo-rl: training")
        if self._open:
            self._display.step(metrics, [])

    def _sample(self, sample: dict[str, Any]) -> None:
        """Samples follow the line of their step, one by one."""
        same_step = [other for other in self._samples if other["step"] == sample["step"]]
        self._samples = [*same_step[: SHOWN_SAMPLES - 1], sample]
        metrics = self._steps.get(sample["step"])
        if metrics is not None and self._open:
            self._display.step(metrics, self._samples)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._display.close()


def printable(text: str) -> str:
    """Text of a pod without what could drive a terminal; of a progress bar that overwrites itself its last state."""
    text = text.rstrip("\r\n").rsplit("\r", 1)[-1]
    text = _ESCAPES.sub("", text)
    return dotted(text, keep="\t")


def _metrics(text: str) -> dict[str, Any] | None:
    """The numbers of a step line. A pod may print what only looks like one."""
    found = parse_step_line(text) if len(text) < _LONGEST_PARSED else None
    if found is None:
        return None
    return {k: v for k, v in found.items() if v is None or (isinstance(v, int | float) and not isinstance(v, bool))}
