"""Refuses to ship what looks like an access token: a bundle can be read by everybody who may read ConfigMaps."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nemo_rl.backends.kubernetes.ship.errors import ShipError
from nemo_rl.job.crd import TOKEN

_ANYWHERE = re.compile(r"(?<![A-Za-z0-9_-])" + TOKEN.removeprefix("^"))


def refuse_tokens(files: Mapping[str, bytes]) -> None:
    """Raises ShipError, naming the file and the line but never the token, if code holds an access token."""
    for name, content in files.items():
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            found = _ANYWHERE.search(line)
            if found and re.search(r"\d", found.group()):
                raise ShipError(
                    f"{name}, line {number}: found what looks like an access token ({found.group()[:4]}…) in the code "
                    f"or in a constant it uses; put it into a Secret, name it in secrets=[...], and read os.environ"
                )
