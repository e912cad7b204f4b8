"""An environment of its own with the experiment trackers, made once.

`python tests/trackers/environment.py ARGUMENTS` runs its interpreter with these arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import beside  # noqa: E402

TRACKERS = ("wandb", "mlflow", "trackio")

if __name__ == "__main__":
    beside.become("trackers", [requirement for name in TRACKERS for requirement in beside.extra(name)])
