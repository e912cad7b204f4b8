"""The job as a pod gets it: the frozen job file, the folders that the operator mounts, and which rank this process is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nemo_rl.job import names
from nemo_rl.job.reading import read_frozen
from nemo_rl.job.spec import RLTrainingJobSpec
from nemo_rl.worker.digest import check_digest

ROOT_VARIABLE = "NEMO_RL_POD_ROOT"
"""A folder that stands for the pod's root directory: all its paths are taken below it. For runs outside of a pod."""
PORT_VARIABLE = "NEMO_RL_POD_PORT"
"""The port to serve on instead of names.TRAINER_PORT; 0 takes a free one."""


@dataclass(frozen=True)
class Job:
    """The job that this attempt runs. Later changes of the resource do not reach it."""

    name: str
    namespace: str
    uid: str
    """Tells this job from an earlier one of the same name; empty outside of a cluster."""
    spec: RLTrainingJobSpec


@dataclass(frozen=True)
class Pod:
    """Where things are in this pod, and which of the processes of the job this one is."""

    root: Path = Path("/")
    port: int = names.TRAINER_PORT
    rank: int = 0
    local_rank: int = 0
    """Among the processes of this pod."""
    world_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Pod:
        """This pod. RANK and WORLD_SIZE are torchrun's; without them the process is alone."""
        return cls(
            root=Path(environment.get(ROOT_VARIABLE, "/")),
            port=int(environment.get(PORT_VARIABLE, names.TRAINER_PORT)),
            rank=int(environment.get("RANK", "0")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            world_size=int(environment.get("WORLD_SIZE", "1")),
        )

    def path(self, absolute: str) -> Path:
        """Where a path of `names` is."""
        return self.root / absolute.lstrip("/")


def read_job(path: Path, sha256: str | None = None) -> Job:
    """The frozen job. Fields that this image's version of nemo-rl does not know are ignored, and said on stderr.

    ValueError where the content is not the one with this SHA-256, and where a field has a value that does not fit.
    """
    try:
        content = path.read_bytes()
        check_digest(content, sha256)
        document: Any = json.loads(content)
        meta = document["metadata"]
        reading = read_frozen(document["spec"])
        job = Job(meta["name"], meta.get("namespace") or "", meta.get("uid") or "", reading.spec)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise ValueError(
            f"the job does not fit this trainer image: {problems}; use an image of the operator's version"
        ) from None
    except (OSError, KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no frozen job ({error!r}); the operator mounts it there. Outside of a pod set {ROOT_VARIABLE}"
        ) from None
    if reading.unknown and os.environ.get("RANK", "0") == "0":
        print(
            f"nemo-rl: this trainer image does not know {', '.join(reading.unknown)}, and trains without; "
            "use an image of the operator's version where they matter",
            file=sys.stderr,
            flush=True,
        )
    return job
