"""A job from a backup, which did not keep its status: whether it had finished is not known, so a person says what to do."""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl_operator import reasons
from nemo_rl_operator.plan import Plan


def hold(plan: Plan) -> bool:
    """Hold the first attempt back. One that has begun here, or a status that was restored too, needs no such question."""
    if not plan.snapshot.resource.restored or plan.number:
        return False
    message = reasons.RESTORED_MESSAGE.format(name=plan.snapshot.resource.name, label=names.LABEL_RESTORED)
    plan.phase("Suspended" if plan.spec.suspend else "Pending", reasons.RESTORED, message)
    return True
