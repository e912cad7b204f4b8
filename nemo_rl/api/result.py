"""What `train()` returns: the trained model's place, its metrics, every step's history, and a plot of it."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl.errors import DatasetError
from nemo_rl.extras import explained, missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nemo_rl.rollout.text import TextGenerator
    from nemo_rl.trainers.base import Trainer

_NOT_PLOTTED = ("step", "epoch")
_PLOTTED: Mapping[str, Sequence[Sequence[str]]] = {
    "reward": (("reward", "validation_reward"), ("reward_std",), ("completion_length",), ("entropy",), ("kl",)),
    "preference_accuracy": (
        ("preference_accuracy", "validation_accuracy"),
        ("reward_margin",),
        ("loss", "validation_loss"),
    ),
    "loss": (("loss", "validation_loss"),),
}
"""The panels of a plot, by the metric that tells the algorithm. The loss of GRPO says nothing: it is near zero whatever is learnt."""
_SMOOTHED_FROM = 50
_SMOOTHING = 0.8


@dataclass(eq=False, repr=False)
class TrainResult:
    """The outcome of a run. Its values never change after it was returned, whatever becomes of the run's folder.

    Attributes:
        trainer: the trainer with model and tokenizer; of a run elsewhere, loaded from the checkpoint at first use.
        metrics: the last step's metrics by name.
        checkpoint_path: folder of the best checkpoint, for `AutoModelForCausalLM.from_pretrained`; None if none. It is
            kept, also when the run is lengthened.
        checkpoint_uri: where that checkpoint is in an object store; None where the run has none.
        total_steps: optimizer steps that the run took in all, those before a resume included.
        output_dir: folder with metrics.jsonl and the checkpoints; None if not known.
        hub_url: the repository on the hub to which this call has uploaded the checkpoint (`hub=`); empty where that failed, None
            where none was asked for.
        history: one dict of metrics per step; where it is not given, read from metrics.jsonl at first use.
    """

    trainer: Trainer = field(default_factory=lambda: None)
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint_path: str | None = None
    total_steps: int = 0
    _: KW_ONLY
    checkpoint_uri: str | None = None
    output_dir: Path | None = None
    hub_url: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    load_trainer: InitVar[Callable[[], Any] | None] = None

    def __post_init__(self, load_trainer: Callable[[], Any] | None) -> None:
        self.metrics = dict(self.metrics or {})
        if self.checkpoint_path is not None:
            self.checkpoint_path = os.fspath(self.checkpoint_path)
        if self.output_dir is None:
            self.output_dir = getattr(self.trainer, "output_dir", None)
        if self.output_dir is not None:
            self.output_dir = Path(self.output_dir)
        self._load_trainer = load_trainer
        self._generator: TextGenerator | None = None
        if self.trainer is None and load_trainer is not None:
            del self.trainer  # `__getattr__` brings both, at first use
        if not self.history:
            del self.history

    def _later(self, name: str) -> Any:
        if name == "trainer":
            self.trainer = self._load_trainer() if self._load_trainer is not None else None
            return self.trainer
        if name == "history":
            self.history = self._read_history()
            return self.history
        raise AttributeError(
            f"a TrainResult has no attribute {name!r}; it has {', '.join(f.name for f in fields(self))}"
        )

    if not TYPE_CHECKING:  # for a type checker every attribute would be one otherwise
        __getattr__ = _later

    def _read_history(self) -> list[dict[str, Any]]:
        """Every step's metrics in order. FileNotFoundError where the run left no metrics.jsonl."""
        from nemo_rl.run.directory import METRICS_FILE
        from nemo_rl.run.metrics import read_history

        if self.output_dir is None:
            raise FileNotFoundError(f"no output folder is known for this result, so no {METRICS_FILE} can be read")
        if not (self.output_dir / METRICS_FILE).is_file():
            raise FileNotFoundError(f"{self.output_dir / METRICS_FILE} does not exist; was the folder moved?")
        rows = read_history(self.output_dir / METRICS_FILE)
        return [row for row in rows if row["step"] <= self.total_steps] if self.total_steps else rows

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Mapping[str, Any]]] | Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Answers of the model of `checkpoint_path`, one text for each prompt, with prompts written as training wrote them.

        The checkpoint is loaded at the first call and stays in memory, beside the trainer's model.

        Args:
            prompts: texts and conversations (lists of messages with role and content), or one of either.
            max_new_tokens: the longest answer, in tokens; default that of training with GRPO, else 512.
            temperature: 0 takes the likeliest token each time, as validation does; 1 draws as rollouts did.
            top_k: draw among the k likeliest tokens only.
            top_p: draw among the likeliest tokens that together have this probability.
            seed: of what is drawn; equal seeds give equal answers.

        Raises ValueError without a checkpoint and for numbers out of range, DatasetError for what is no prompt, MissingPackage
        without torch.
        """
        if isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable):
            raise DatasetError(
                f"found {type(prompts).__name__} ({prompts!r:.80}) as the prompts; expected a text, a conversation (a list of "
                "messages) or a list of these"
            )
        asked: Sequence[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if asked and isinstance(asked[0], Mapping):
            asked = [asked]
        if self._generator is None:
            if self.checkpoint_path is None:
                raise ValueError(
                    "this result has no checkpoint_path, so there is no model to ask; train a step, or use nemo-rl chat"
                )
            with explained("result.generate()"):
                from nemo_rl.rollout.text import TextGenerator
            self._generator = TextGenerator(self.checkpoint_path, trust_remote_code=self._trusts_code())
        sampling = self._generator.sampling(
            temperature=temperature, max_new_tokens=max_new_tokens, top_k=top_k, top_p=top_p
        )
        return self._generator.texts(asked, sampling, seed=seed)

    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the model of `checkpoint_path` with its tokenizer and model card to the Hugging Face hub; returns the address.

        Args:
            repo: owner/name of the repository; it is made where it is not there yet.
            private: whether a new repository is private; default what the account says.
            token: with the right to write; default HF_TOKEN, or what `hf auth login` has kept.

        The state of the trainer (the optimizer's moments) stays here. Raises ValueError without a checkpoint, and what
        huggingface_hub raises, such as HfHubHTTPError where the token may not write.
        """
        from nemo_rl.api.hub import push_folder

        if self.checkpoint_path is None:
            raise ValueError("this result has no checkpoint_path, so there is nothing to upload; train a step first")
        return push_folder(Path(self.checkpoint_path), repo, private=private, token=token)

    def _trusts_code(self) -> bool:
        """Whether the caller has allowed code that comes with the model, in the run that this is the result of."""
        trainer = self.__dict__.get("trainer")
        return bool(trainer is not None and trainer.training.trust_remote_code)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        metrics: Sequence[str] | None = None,
        *,
        smoothing: float | None = None,
        title: str | None = None,
    ) -> Figure:
        """A matplotlib figure with a panel for each metric over the steps; saved to `path` (.png, .svg, .pdf) if given.

        Args:
            path: the picture's file; folders on the way are made.
            metrics: the panels. Default: what matters to the algorithm, with a validation metric in the panel of its training metric.
            smoothing: 0 draws what was measured alone; up to below 1 adds the exponential moving average with this weight of the
                past, without the pull to zero at the start (as TensorBoard does). Default: 0.8 from 50 steps on, else 0.
            title: default the run's name and its length.

        ValueError for an unknown metric or a smoothing out of range, ImportError without matplotlib.
        """
        if smoothing is not None and not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} is out of range; expected 0 (none) or more, and less than 1")
        try:
            from matplotlib import rc_context
            from matplotlib.figure import Figure
        except ImportError:
            raise missing("plot()", "matplotlib") from None
        history = self.history
        panels = [(name,) for name in metrics] if metrics is not None else self._panels()
        known = sorted({name for row in history for name in row if name not in _NOT_PLOTTED})
        if unknown := [name for panel in panels for name in panel if name not in known]:
            raise ValueError(
                f"metric {unknown[0]!r} is not in the history; expected some of {', '.join(known) or 'none'}"
            )
        columns = 1 if len(panels) < 3 else 2
        rows = -(-len(panels) // columns) or 1
        figure = Figure(figsize=(7 if columns == 1 else 11, 0.5 + 2.7 * rows), layout="constrained")
        name = self.output_dir.resolve().name if self.output_dir is not None else "run"
        steps = self.total_steps or max((row["step"] for row in history), default=0)
        figure.suptitle(title if title is not None else f"{name}, {steps} steps")
        for index, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, index)
            for color, metric in zip(("C0", "C1"), panel, strict=False):
                _draw(axes, history, metric, color, smoothing)
            axes.set_title(_words(panel[0]), fontsize="medium")
            axes.set_ylabel(panel[0])
            axes.grid(alpha=0.3)
            if len(panel) > 1:
                axes.legend(fontsize="small")
            if index > len(panels) - columns:
                axes.set_xlabel("step")
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            # the same run gives the same file, and texts stay texts
            with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo-rl"}):
                date = {"Date": None} if os.fspath(path).lower().endswith(".svg") else None
                figure.savefig(os.fspath(path), dpi=120, metadata=date)
        return figure

    def _panels(self) -> list[tuple[str, ...]]:
        """What matters to the algorithm: metrics that share a panel."""
        found = {name for row in self.history for name, value in row.items() if isinstance(value, int | float)}
        algorithm = next((a for a in _PLOTTED if a in found), "loss")
        panels = [tuple(name for name in panel if name in found) for panel in _PLOTTED[algorithm]]
        drawn = {name for panel in panels for name in panel}
        measured = (n for n in found - drawn if n.startswith("validation_"))
        others = sorted(n for n in measured if not _is_timing(n) and not n.endswith("_errors"))
        return [panel for panel in panels if panel] + [(name,) for name in others]

    @property
    def shown_checkpoint(self) -> str | None:
        """The checkpoint as people find it: its address in the store, else its path as seen from here."""
        return self.checkpoint_uri or self._shown_path

    @property
    def _shown_path(self) -> str | None:
        from nemo_rl.run.directory import nearby

        return None if self.checkpoint_path is None else nearby(self.checkpoint_path)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_number(value)}" for name, value in self.metrics.items() if _is_shown(name, value))
        return f"TrainResult(total_steps={self.total_steps}, checkpoint_path={self._shown_path!r}, metrics={{{shown}}})"

    def _repr_html_(self) -> str:
        """A small table for notebooks, with the reward or loss curve."""
        rows = [("steps", str(self.total_steps)), ("checkpoint", str(self.shown_checkpoint))]
        rows += [(name, _number(value)) for name, value in self.metrics.items() if _is_shown(name, value)]
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in rows
        )
        return f"<div><b>TrainResult</b>{self._curve()}<table>{cells}</table></div>"

    def _curve(self, width: int = 360, height: int = 80) -> str:
        try:
            history = self.history
        except (OSError, ValueError):
            return ""
        from nemo_rl.display.notebook import curve, drawn_metric

        name = drawn_metric({name for row in history for name in row})
        return curve(
            [float(row[name]) for row in history if isinstance(row.get(name), int | float)], name, width, height
        )


def _draw(axes: Any, history: Sequence[Mapping[str, Any]], name: str, color: str, smoothing: float | None) -> None:
    points = [(row["step"], float(row[name])) for row in history if isinstance(row.get(name), int | float)]
    steps, values = [step for step, _ in points], [value for _, value in points]
    weight = smoothing if smoothing is not None else (_SMOOTHING if len(points) >= _SMOOTHED_FROM else 0.0)
    marker = "." if len(points) < _SMOOTHED_FROM else ""
    if not weight:
        axes.plot(steps, values, color=color, marker=marker, label=_words(name))
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(steps, _smoothed(values, weight), color=color, label=f"{_words(name)}, smoothed")


def _smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction, as Adam's moments (Kingma and Ba 2015, section 3)."""
    average, found = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        found.append(average / (1 - weight**count))
    return found


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_timing(name: str) -> bool:
    return name.endswith(("_seconds", "_per_second"))


def _is_shown(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not _is_timing(name) and name != "step"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
