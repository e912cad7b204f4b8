"""One line of the report of `nemo-rl doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One line of the report. `state` is bad where training cannot work, absent where an option is not there."""

    state: Literal["good", "bad", "absent"]
    subject: str
    found: str
    cure: str = ""
