"""output.serveUntil: while it is in the future, a small pod serves the output for download."""

from __future__ import annotations

from nemo_rl_operator import build, timestamps
from nemo_rl_operator.turn import Create, Delete, Kind, Turn


def serve(turn: Turn) -> None:
    pod, spec = turn.seen.files, turn.seen.spec
    left = timestamps.seconds_until(spec.output.serve_until, turn.now) if spec else None
    image = (spec.image if spec else None) or turn.seen.image
    wanted = left is not None and left > 0 and turn.number > 0 and bool(image)
    if wanted and left is not None and spec is not None:
        turn.wake_in(left)
        if pod is None:
            turn.actions.append(Create(Kind.POD, build.files_pod(turn.seen.resource, spec, turn.seen.image)))
    if pod is not None and not pod.deleting and (not wanted or pod.terminal):
        turn.actions.append(Delete(Kind.POD, pod.name, pod.uid))
