"""An environment of its own with Starlette, uvicorn and Playwright, made once; the browser is that of the system.

`python tests/ui/environment.py ARGUMENTS` runs its interpreter with these arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import beside  # noqa: E402

if __name__ == "__main__":
    beside.become("ui-tests", [*beside.extra("ui"), "playwright>=1.60"])
