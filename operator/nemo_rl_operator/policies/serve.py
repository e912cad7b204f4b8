"""output.serveUntil: while it is in the future, a small pod serves the output for download."""

from __future__ import annotations

from nemo_rl_operator import build, reasons
from nemo_rl_operator.plan import Create, Delete, Kind, Need, Plan
from nemo_rl_operator.policies import accept
from nemo_rl_operator.runtime import timestamps


def serve(plan: Plan) -> None:
    pod, spec = plan.snapshot.files, plan.snapshot.spec
    left = timestamps.seconds_until(spec.output.serve_until, plan.now)
    image = spec.image or plan.snapshot.image
    asked = left is not None and left > 0 and plan.number > 0
    wanted = asked and bool(image)
    if wanted and left is not None:
        plan.wake_in(left)
        if plan.snapshot.unserved is not None:
            plan.condition("OutputServed", False, plan.snapshot.unserved.reason, plan.snapshot.unserved.message)
            plan.wake_in(accept.next_try(plan, "OutputServed"))
        elif pod is not None and plan.status.condition("OutputServed"):
            plan.condition("OutputServed", True, reasons.SERVED)
        elif pod is None and plan.snapshot.resource.abridged:
            plan.needs.add(Need.ROWS)
        elif pod is None:
            resource = plan.snapshot.resource
            if not any(isinstance(a, Create) and a.kind is Kind.CONFIG_MAP for a in plan.actions):
                plan.actions.append(Create(Kind.CONFIG_MAP, build.frozen_job(resource, spec)))  # which the pod reads
            plan.actions.append(Create(Kind.POD, build.files_pod(resource, spec, plan.snapshot.image)))
    if pod is not None and not pod.deleting and (not wanted or pod.terminal):
        plan.actions.append(Delete(Kind.POD, pod.name, pod.uid))
