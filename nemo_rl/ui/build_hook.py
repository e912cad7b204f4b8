"""What hatch does when it builds a wheel: puts the libraries of the page beside it, so that nobody needs npm to use it.

NEMO_RL_UI_LIBRARIES=required makes their lack an error (releases), =skip builds without them. Without it a wheel that cannot
have them is built all the same: everything but `nemo-rl ui` works, and that says what to do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "nemo_rl/ui/vendor"


class LibrariesOfThePage(BuildHookInterface):  # type: ignore[type-arg]
    """Runs for wheels; an editable installation fetches them when the page is first opened."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get("NEMO_RL_UI_LIBRARIES", "")
        if version == "editable" or wanted == "skip":
            return
        path = Path(self.root, "nemo_rl/ui/libraries.py")
        spec = importlib.util.spec_from_file_location("nemo_rl_ui_libraries", path)
        assert spec is not None
        assert spec.loader is not None
        libraries = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = libraries  # dataclasses look their module up
        spec.loader.exec_module(libraries)
        folder = Path(self.root, FOLDER)
        if not libraries.complete(folder):
            try:
                libraries.fetch(folder)
            except libraries.LibrariesMissing as error:
                if wanted == "required":
                    raise
                self.app.display_warning(f"built without the libraries of nemo-rl ui: {error}")
                return
        build_data["artifacts"].append(f"/{FOLDER}/**")
