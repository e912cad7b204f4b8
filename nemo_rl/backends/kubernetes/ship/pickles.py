"""The last rung: cloudpickle, with the user's own modules by value, for the same Python version only."""

from __future__ import annotations

import json
import sys
from typing import Any

from nemo_rl.backends.kubernetes.ship.errors import NotSource
from nemo_rl.backends.kubernetes.ship.modules import local_modules, version_of
from nemo_rl.worker.bundles import FORMAT, MANIFEST


def pickled(obj: Any, name: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """(files of the bundle, packages that the image needs). NotSource if it cannot be pickled."""
    try:
        import cloudpickle  # type: ignore[import-untyped]
    except ImportError:
        raise NotSource("the package cloudpickle is not installed here (pip install cloudpickle)") from None
    already = set(cloudpickle.list_registry_pickle_by_value())
    registered = [module for module in local_modules() if module.__name__ not in already]
    for module in registered:
        cloudpickle.register_pickle_by_value(module)
    try:
        data = cloudpickle.dumps(obj)
    except Exception as error:
        raise NotSource(f"{type(error).__name__}: {error}") from error
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)
    file = f"code/{name}.pkl"
    imports = {"cloudpickle": version_of("cloudpickle") or ""}
    manifest = {
        "format": FORMAT,
        "kind": "pickle",
        "entries": {name: file},
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "imports": imports,
    }
    return {MANIFEST: json.dumps(manifest, indent=1, sort_keys=True).encode(), file: data}, imports
