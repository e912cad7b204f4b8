"""output.serveUntil: while it is in the future, a small pod serves the output for download."""

from __future__ import annotations

from nemo_rl_operator import build
from nemo_rl_operator.plan import Create, Delete, Kind, Plan
from nemo_rl_operator.runtime import timestamps


def serve(plan: Plan) -> None:
    pod, spec = plan.snapshot.files, plan.snapshot.spec
    left = timestamps.seconds_until(spec.output.serve_until, plan.now) if spec else None
    image = (spec.image if spec else None) or plan.snapshot.image
    wanted = left is not None and left > 0 and plan.number > 0 and bool(image)
    if wanted and left is not None and spec is not None:
        plan.wake_in(left)
        if pod is None:
            plan.actions.append(Create(Kind.POD, build.files_pod(plan.snapshot.resource, spec, plan.snapshot.image)))
    if pod is not None and not pod.deleting and (not wanted or pod.terminal):
        plan.actions.append(Delete(Kind.POD, pod.name, pod.uid))
