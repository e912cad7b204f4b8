"""What the operator's installation tells its users: its version, and the trainer image with its Python."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nemo_rl.backends.kubernetes.connect import Cluster, core_path
from nemo_rl.backends.kubernetes.errors import ApiError
from nemo_rl.job import names

_SECONDS = 5.0


@dataclass(frozen=True)
class Installation:
    """Each is empty where it is not told."""

    version: str = ""
    trainer_image: str = ""
    trainer_python: str = ""

    def python_of(self, image: str | None) -> str | None:
        """The Python ("3.11") of the image of a job, which names it or takes the default; None where it is not known."""
        return self.trainer_python or None if image in (None, self.trainer_image) else None


def installation(cluster: Cluster) -> Installation:
    """What is told by the ConfigMap that the chart makes in the operator's namespace; nothing where none may be read."""
    namespace = os.environ.get(names.SYSTEM_NAMESPACE_VARIABLE) or names.SYSTEM_NAMESPACE
    path = core_path(namespace, "configmaps", names.INFO_CONFIG_MAP)
    try:
        data = cluster.request("GET", path, timeout=_SECONDS).get("data") or {}
    except ApiError as error:
        if error.code in (403, 404):
            return Installation()
        raise
    told = (str(data.get(name, "")) for name in ("version", "trainerImage", "trainerPython"))
    return Installation(*told)
