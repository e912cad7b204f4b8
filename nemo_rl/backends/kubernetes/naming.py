"""The name of a job that its caller did not name, and the digest by which the same call finds its job again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection

from nemo_rl.job import names
from nemo_rl.job.spec import RLTrainingJobSpec

LABEL_DIGEST = f"{names.GROUP}/digest"
"""On the resource: `spec_digest` of what was submitted. The client that submits the same again finds it by this."""
ANNOTATION_COLLECTED = f"{names.GROUP}/collected"
"""On the resource: when a client fetched the result. A finished job without it is what a dead client left behind."""
_DIGEST_CHARACTERS = 16
_NAME_DIGITS = 6
# May change while the job runs, so they do not tell one job from another.
_CHANGEABLE = {"suspend", "backoff_limit", "active_deadline_seconds", "budget", "ttl_seconds_after_finished"}


def spec_digest(spec: RLTrainingJobSpec) -> str:
    """16 hexadecimal digits that stand for what the job computes; code and data count through their bundles' digests."""
    content = spec.model_dump(mode="json", by_alias=True, exclude=_CHANGEABLE)
    content.get("output", {}).pop("serveUntil", None)
    for bundle in content.get("bundles", ()):
        bundle.pop("configMaps", None)  # where they lie; what they hold is in their digest
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARACTERS]


def job_name(spec: RLTrainingJobSpec, model: str, taken: Collection[str] = ()) -> str:
    """<algorithm>-<model>-<digest>, a DNS-1035 label of at most 50 characters; -2, -3, … where that is taken.

    `model` is the model as the caller named it: that of `spec` may be a bundle.
    """
    digest = spec_digest(spec)[:_NAME_DIGITS]
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()
    word = re.sub(r"[^a-z0-9]+", "-", last).strip("-") or "model"
    number = 1
    while True:
        suffix = f"-{digest}" if number == 1 else f"-{digest}-{number}"
        room = names.MAX_NAME_LENGTH - len(spec.algorithm) - 1 - len(suffix)
        name = f"{spec.algorithm}-{word[:room].rstrip('-')}{suffix}"
        if name not in taken:
            return name
        number += 1
