"""From a Run to what is applied: the specification with objects of this process replaced by bundles, and the bundles."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_rl.api.keywords import LIVE_DATASET, LIVE_MODEL, LIVE_REWARD, LIVE_VALIDATION
from nemo_rl.backends import Run
from nemo_rl.backends.kubernetes.ship.archive import Archive, unique_config_maps
from nemo_rl.backends.kubernetes.ship.capture import Capture, capture
from nemo_rl.backends.kubernetes.ship.data import DataBundle, ship_directory, ship_file, ship_rows
from nemo_rl.backends.kubernetes.ship.errors import ShipError
from nemo_rl.errors import DatasetError
from nemo_rl.job import names
from nemo_rl.job.spec import BundleSpec, CallbackSpec, DatasetSpec, RLTrainingJobSpec

REWARD_BUNDLE = "reward"
DATA_BUNDLE = "dataset"
VALIDATION_BUNDLE = "validation"
MODEL_BUNDLE = "model"
_RELATIVE = ("./", "../", "~")


@dataclass
class Contents:
    """What travels. `spec` is complete; `archives` are its bundles' bytes by name; `notes` are lines for the user.

    `reward` is the captured reward, None where the specification names one; `rows` the first rows of the data, where
    they are known here; `origins` names the cells of remote tracebacks as they are called here.
    """

    spec: RLTrainingJobSpec
    archives: dict[str, Archive] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reward: Capture | None = None
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)

    def for_job(self, name: str) -> Contents:
        """The same with ConfigMaps of this job's own: who submits may make ConfigMaps, and need not change others'."""
        archives = {bundle: replace(archive, prefix=f"{name}-b") for bundle, archive in self.archives.items()}
        spec = self.spec.model_copy(deep=True)
        for bundle in spec.bundles:
            if bundle.name in archives:
                bundle.config_maps = archives[bundle.name].config_map_names
        return replace(self, spec=spec, archives=archives)

    def stored(self) -> dict[str, Archive]:
        """The archives that are too large for ConfigMaps, by where they lie below output.uri."""
        return {names.stored_bundle(a.sha256): a for a in self.archives.values() if a.stored}

    def config_maps(self) -> list[dict[str, Any]]:
        return unique_config_maps(self.archives.values())


def gather(run: Run, image_python: str | None = None) -> Contents:
    """Captures code, data and model of a run. ShipError, DatasetError or ValueError for what cannot travel.

    `image_python` ("3.11") is the Python of the trainer image where it is known.
    """
    packing = _Packing(run, image_python)
    packing.model()
    packing.datasets()
    packing.reward()
    packing.callbacks()
    return packing.finish()


class _Packing:
    def __init__(self, run: Run, image_python: str | None) -> None:
        self.run, self.image_python = run, image_python
        self.found = Contents(run.spec)
        self.bundles: list[BundleSpec] = list(run.spec.bundles)
        self.changes: dict[str, Any] = {}
        self.limit = names.MAX_STORED_BUNDLE_BYTES if run.spec.output.uri else names.MAX_BUNDLE_BYTES

    def finish(self) -> Contents:
        if self.bundles != list(self.run.spec.bundles):
            self.changes["bundles"] = self.bundles
        # Built anew rather than copied: the references are checked against the bundles together.
        given = {name: getattr(self.run.spec, name) for name in self.run.spec.model_fields_set}
        self.found.spec = RLTrainingJobSpec.model_validate({**given, **self.changes})
        return self.found

    def _add(self, name: str, archive: Archive, python: str | None = None) -> None:
        self.found.archives[name] = archive
        self.bundles.append(archive.spec(name, python))

    def _add_data(self, name: str, bundle: DataBundle) -> str:
        self._add(name, bundle.archive)
        return bundle.uri(name)

    # --- model

    def model(self) -> None:
        reference = self.run.spec.model
        if self.run.model is not None or reference == LIVE_MODEL:
            self.changes["model"] = self._live_model(self.run.model)
        elif "://" not in reference:
            folder = Path(reference).expanduser()
            if folder.is_dir():
                self.changes["model"] = self._add_data(MODEL_BUNDLE, ship_directory(folder, limit=self.limit))
            elif reference.startswith(_RELATIVE):
                raise ValueError(
                    f"model {reference!r} is not a folder on this machine; expected a hub name, a folder with a model, "
                    f"pvc://claim/path, or an absolute path in the image or a volume"
                )
            elif reference.startswith("/") and not self._in_a_volume(reference):
                self.found.notes.append(f"model {reference} is not on this machine; the trainer image must have it")

    def _in_a_volume(self, path: str) -> bool:
        """Whether a path of the pod lies in one of the job's volumes."""
        return any(path == volume.path or path.startswith(f"{volume.path}/") for volume in self.run.spec.volumes)

    def _live_model(self, model: Any) -> str:
        if model is None or not hasattr(model, "save_pretrained"):
            raise ShipError(
                f"cannot ship the model: found {type(model).__name__}; expected a hub name, a folder or a transformers "
                f"model"
            )
        if self.run.tokenizer is None:
            raise ShipError("cannot ship a live model without its tokenizer; give tokenizer=…, or a folder or hub name")
        with tempfile.TemporaryDirectory(prefix="nemo-rl-model-") as folder:
            model.save_pretrained(folder)
            self.run.tokenizer.save_pretrained(folder)
            return self._add_data(MODEL_BUNDLE, ship_directory(folder, limit=self.limit))

    # --- data

    def datasets(self) -> None:
        from nemo_rl.data.module import train_and_validation

        spec = self.run.spec
        live, held_out = train_and_validation(self.run.dataset) if self.run.dataset is not None else (None, None)
        if self.run.validation_dataset is not None:
            held_out = self.run.validation_dataset
        self._dataset("dataset", spec.dataset, live, DATA_BUNDLE, "the dataset")
        if spec.validation_dataset is not None or held_out is not None:
            self._dataset(
                "validation_dataset", spec.validation_dataset, held_out, VALIDATION_BUNDLE, "the validation dataset"
            )

    def _dataset(self, key: str, spec: DatasetSpec | None, live: Any, bundle: str, what: str) -> None:
        needed = None
        if key == "dataset":
            needed = self.run.spec.training.max_steps * self.run.spec.training.batch_size
        if live is not None:
            from nemo_rl.data.loading import load_rows

            rows = load_rows(live, needed=needed)
            if key == "dataset":
                self.found.rows = list(rows[:_TRIAL_ROWS])
            self.changes[key] = DatasetSpec(path=self._add_data(bundle, ship_rows(rows, what, self.limit)))
            return
        if spec is None:
            return
        if spec.path in (LIVE_DATASET, LIVE_VALIDATION):
            raise DatasetError(f"{key}: its rows are not here; give the rows, a file or a hub name")
        if spec.inline is not None:
            self._inline(key, spec, spec.inline, bundle, what)
            return
        if spec.path is None or "://" in spec.path:
            return
        file = Path(spec.path).expanduser()
        if file.is_file():
            if key == "dataset":
                self.found.rows = list(_first_rows(file))
            path = self._add_data(bundle, ship_file(file, what, self.limit))
            self.changes[key] = DatasetSpec.model_validate(
                {name: getattr(spec, name) for name in spec.model_fields_set} | {"path": path}
            )
        elif file.is_dir():  # what save_to_disk wrote travels as rows
            self._dataset(key, spec, file, bundle, what)
        elif spec.path.startswith("/"):
            self.found.notes.append(f"{key} {spec.path} is not on this machine; the trainer image must have it")
        else:
            raise DatasetError(
                f"{key} {spec.path!r} is not a file here ({Path.cwd()}); paths are relative to the current directory"
            )

    def _inline(self, key: str, spec: DatasetSpec, rows: list[dict[str, Any]], bundle: str, what: str) -> None:
        """Few rows stay in the job; many become a file, since every write of a status stores them anew."""
        if key == "dataset":
            self.found.rows = list(rows[:_TRIAL_ROWS])
        size = _inline_bytes(rows)
        if size <= names.MAX_INLINE_ROWS:
            return
        given = {name: getattr(spec, name) for name in spec.model_fields_set - {"inline"}}
        path = self._add_data(bundle, ship_rows(rows, what, self.limit))
        self.changes[key] = DatasetSpec.model_validate(given | {"path": path})
        self.found.notes.append(f"{what} has {size / 1e3:.0f} kB of inline rows; they travel as a file")

    # --- code

    def reward(self) -> None:
        spec = self.run.spec.reward
        if spec is None or (self.run.reward_fn is None and spec.function != LIVE_REWARD):
            return
        if self.run.reward_fn is None:
            raise ShipError("the reward is not here: found None; give reward_fn")
        found = capture(self.run.reward_fn, "reward", image_python=self.image_python)
        self.found.reward = found
        self._tell(found)
        kept = {name: getattr(spec, name) for name in spec.model_fields_set - {"function", "bundle", "entrypoint"}}
        if found.how == "function":
            kept["function"] = found.function
        else:
            self._add(REWARD_BUNDLE, found.packed(self.limit), found.python)
            kept |= {"bundle": REWARD_BUNDLE, "entrypoint": found.entrypoint}
        self.changes["reward"] = kept

    def callbacks(self) -> None:
        shipped: list[CallbackSpec] = []
        for number, callback in enumerate(self.run.callbacks):
            found = capture(callback, f"callback_{number}", image_python=self.image_python)
            self._tell(found)
            if found.how == "function":
                shipped.append(CallbackSpec(function=found.function))
                continue
            bundle = f"callback-{number}"
            self._add(bundle, found.packed(self.limit), found.python)
            shipped.append(CallbackSpec(bundle=bundle, entrypoint=found.entrypoint))
        if shipped:
            self.changes["callbacks"] = [*self.run.spec.callbacks, *shipped]

    def _tell(self, found: Capture) -> None:
        self.found.notes += found.notes
        self.found.origins |= found.origins


_TRIAL_ROWS = 4


def _inline_bytes(rows: list[dict[str, Any]]) -> int:
    """Bytes that the rows count for in the chart's admission policy: never fewer, or it would refuse what is sent.

    It writes them as CEL does: nearly JSON, but with six digits of each fraction and escapes for what is not printable.
    """
    text = json.dumps(rows, separators=(", ", ":"), ensure_ascii=False)
    escapes = sum(len(c.encode("unicode_escape")) for c in text if not (c.isascii() or c.isprintable()))
    return len(text.encode("utf-8", "surrogatepass")) + escapes + _digits(rows)


def _digits(value: Any) -> int:
    """What the fractions within a value take, at most."""
    if isinstance(value, float):
        return len(f"{value:.6f}")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_digits, inner))


def _first_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    from itertools import islice

    from nemo_rl.data.loading import open_rows

    rows = islice(open_rows(file).rows, _TRIAL_ROWS)
    return (row for row in rows if isinstance(row, Mapping))
