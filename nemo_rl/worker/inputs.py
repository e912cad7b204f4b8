"""Turns what a job refers to into what is in this pod: bundles checked and unpacked, models, data, reward and callbacks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_rl.backends.local import load_callback
from nemo_rl.errors import DatasetError
from nemo_rl.job import names, uris
from nemo_rl.job.spec import BundleSpec, CallbackSpec, DatasetSpec, RLTrainingJobSpec
from nemo_rl.storage.cache import cached
from nemo_rl.storage.errors import Damaged
from nemo_rl.storage.store import Store
from nemo_rl.trainers.callbacks import HOOKS
from nemo_rl.worker.bundles import TIMES_UNPACKED, BundleError, check_python, load_entry, open_archive, open_bundle
from nemo_rl.worker.job import Pod

PVC = "pvc://"
BUNDLE = "bundle://"


def open_bundles(specs: Iterable[BundleSpec], pod: Pod, uri: str | None = None) -> dict[str, Path]:
    """Checks and unpacks the job's bundles; returns the folder of each by its name. Raises as `bundles.open_bundle`.

    Those without ConfigMaps are read from the store below `uri`, once per node; StorageError where it is not reached.

    The folders are named by content: a resumed run must find its model under the same path, and of several processes in
    one pod the first to be ready wins.
    """
    root = Path(tempfile.gettempdir()) / "nemo-rl-bundles"
    root.mkdir(parents=True, exist_ok=True)
    found = {}
    for spec in specs:
        aside = Path(tempfile.mkdtemp(dir=root))
        try:
            if spec.config_maps:
                open_bundle(spec.name, spec.sha256, aside, root=pod.path(names.BUNDLE_DIR), python=spec.python)
            else:
                _open_stored(spec, uri, aside)
            folder = root / spec.sha256[:16]
            try:
                os.rename(aside, folder)
            except OSError:
                if not (folder / spec.name).is_dir():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        found[spec.name] = folder / spec.name
    return found


def _open_stored(spec: BundleSpec, uri: str | None, target: Path) -> None:
    """What comes from the store is believed for its digest alone, which is in the frozen job."""
    check_python(spec.python, spec.name)
    if uri is None:
        raise BundleError(f"bundle {spec.name!r} has neither ConfigMaps nor a store in which its archive could be")
    path = names.stored_bundle(spec.sha256)
    again = f"delete {uris.joined(uri, path)} if it is there, and submit the job again"
    found = Store(uri).stat(path)
    if found is None:
        raise BundleError(
            f"bundle {spec.name!r} is not in the store: found no object {uris.joined(uri, path)}; {again}"
        )
    if found.size > names.MAX_STORED_BUNDLE_BYTES:
        raise BundleError(
            f"bundle {spec.name!r} in the store has {found.size} bytes, more than the {names.MAX_STORED_BUNDLE_BYTES} that one "
            f"may have; {again}"
        )
    try:
        folder = cached(uri, [found], digests={path: spec.sha256}, keep_others=True)
    except Damaged as error:
        raise BundleError(f"bundle {spec.name!r} was not unpacked: {error}; {again}") from None
    data = (folder / path).read_bytes()
    open_archive(spec.name, spec.sha256, data, target, TIMES_UNPACKED * names.MAX_STORED_BUNDLE_BYTES)


def resolve(spec: RLTrainingJobSpec, bundles: Mapping[str, Path], pod: Pod) -> RLTrainingJobSpec:
    """The specification with pvc:// and bundle:// replaced by paths in this pod.

    ValueError where the model is not there, DatasetError where a file of rows is not.
    """
    changes: dict[str, Any] = {"dataset": _dataset("dataset", spec.dataset, bundles, pod)}
    if spec.validation_dataset is not None:
        changes["validation_dataset"] = _dataset("validationDataset", spec.validation_dataset, bundles, pod)
    model = _path(spec.model, bundles, pod)
    if model is not None:
        if not model.is_dir():
            raise ValueError(f"model {spec.model!r}: found no folder {model}; {_nearby(model)}")
        changes["model"] = str(model)
    return spec.model_copy(update=changes)


def _dataset(field: str, dataset: DatasetSpec, bundles: Mapping[str, Path], pod: Pod) -> DatasetSpec:
    path = _path(dataset.path, bundles, pod) if dataset.path else None
    if path is None:
        return dataset
    if not path.is_file():
        raise DatasetError(f"{field} {dataset.path!r}: found no file {path}; {_nearby(path)}")
    return dataset.model_copy(update={"path": str(path)})


def _path(reference: str, bundles: Mapping[str, Path], pod: Pod) -> Path | None:
    """Where a pvc:// or bundle:// reference is in this pod; None for any other."""
    if reference.startswith(PVC):
        return pod.path(names.CLAIMS_DIR) / reference.removeprefix(PVC)
    if reference.startswith(BUNDLE):
        name, _, rest = reference.removeprefix(BUNDLE).partition("/")
        return bundles[name] / rest
    return None


def _nearby(path: Path) -> str:
    """What is there instead, for an error's reader."""
    parent = path.parent
    if not parent.is_dir():
        return f"{parent} is not there either; check the reference"
    found = sorted(entry.name for entry in parent.iterdir())
    return f"{parent} holds {', '.join(found[:8]) or 'nothing'}; check the reference"


def load_reward(spec: RLTrainingJobSpec, bundles: Mapping[str, Path]) -> Any:
    """The reward of the job, or None for an algorithm without one. Raises as `environments.load.load_reward`."""
    if spec.reward is None:
        return None
    from nemo_rl.environments.load import load_reward

    return load_reward(spec.reward, bundles)


def load_callbacks(specs: Iterable[CallbackSpec], bundles: Mapping[str, Path]) -> list[Any]:
    """The job's callbacks, in order. ValueError for a name that is not there; else what the user's code raises."""
    return [_callback(spec, bundles) for spec in specs]


def _callback(spec: CallbackSpec, bundles: Mapping[str, Path]) -> Any:
    if spec.bundle is None:
        return load_callback(spec)
    found = load_entry(bundles[spec.bundle], spec.entrypoint)
    is_one = not isinstance(found, type) and any(hasattr(found, hook) for hook in HOOKS)
    return found if is_one or not callable(found) else found()
