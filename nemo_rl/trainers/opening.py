"""Which folder a run takes, or goes on in, on all ranks and nodes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_rl.run.directory import Run, RunBusyError, differences
from nemo_rl.run.ranks import Ranks
from nemo_rl.run.stored.runs import StoredRuns
from nemo_rl.run.stored.writer import RunHeldError


def check_same(ranks: Ranks, identity: dict[str, Any]) -> None:
    """Raises ValueError where ranks would train different things."""
    identities = ranks.gather(lambda: identity)
    for rank, other in enumerate(identities):
        if other != identity:
            found = "; ".join(differences(identities[0], other))
            raise ValueError(f"rank {rank} trains something else than rank 0: {found}; give all ranks the same")


def open_on_all(ranks: Ranks, take: Callable[[], Run], stored: StoredRuns | None, root: Path | None) -> Run:
    """Returns the run that the first rank takes, as it is on this rank.

    With `stored`, runs are kept in an object store, and each node works in a folder of its own, in `root` where it is given.
    """
    opened: list[Run] = []

    def take_first() -> Run:
        try:
            opened.append(take())
        except RunHeldError as error:
            raise RunBusyError(str(error)) from None
        return dataclasses.replace(opened[0], _lock=None, stored=None)

    try:
        run = ranks.first(take_first)
        if stored is not None:
            told = ranks.first(stored.told)
            node, nodes = int(os.environ.get("GROUP_RANK", "0")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))
            places = ranks.gather(lambda: stored.follow(told, node, nodes, root))
            run = dataclasses.replace(run, dir=stored.settle_in(places))
    except BaseException:
        if stored is not None:
            stored.close()
        if opened:
            opened[0].close()
        raise
    return opened[0] if opened else run
