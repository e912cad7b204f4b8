"""Whether the frozen job in this pod is the one that the operator made. Standard library alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from nemo_rl.job import names


def digest_argument(arguments: Sequence[str]) -> str | None:
    """The SHA-256 that the operator gave in the arguments of this program; None outside of a cluster."""
    option = f"{names.JOB_DIGEST_OPTION}="
    return next((word.removeprefix(option) for word in arguments if word.startswith(option)), None)


def check_digest(content: bytes, sha256: str | None) -> None:
    """ValueError where the content of the frozen job is not the one that the operator made."""
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"the frozen job is not the one that the operator made: found SHA-256 {found[:16]}…, expected "
            f"{sha256[:16]}…. Somebody replaced the ConfigMap that holds it: delete the job and that ConfigMap, and submit it again"
        )
