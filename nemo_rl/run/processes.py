"""Whether this process is one of several that train together. Loads torch only where it is loaded already or needed."""

from __future__ import annotations


def is_distributed() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def is_rank_zero() -> bool:
    """True in a process that never loaded torch, too: it is alone."""
    import sys

    return "torch" not in sys.modules or not is_distributed() or sys.modules["torch"].distributed.get_rank() == 0
