"""Which rollouts may be sampled by which weights, and trained when: pure functions of numbers of steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Steps are trained one after the other, from 1 to `total_steps`; version v of the weights is that after v of them.

    Step s takes weights of version s - 1 to version s. Its rollouts are at most `max_staleness` steps older than what they
    are trained with: sampled by versions s - 1 - max_staleness to s - 1. With 0 no step is sampled before the one before
    it is trained.
    """

    max_staleness: int
    total_steps: int

    def to_sample(self, version: int, begun: int) -> range:
        """Returns the steps whose rollouts are to be begun with weights of `version`, where those up to step `begun` have been.

        The first of them is needed next; as many follow as the bound allows, so that sampling never waits without need.
        """
        return range(max(begun, version) + 1, min(version + 1 + self.max_staleness, self.total_steps) + 1)

    def staleness(self, step: int, version: int) -> int:
        """Returns how many steps older than the weights that step `step` trains are those of `version`, which sampled for it.

        Raises ValueError beyond the bound, and for weights that did not exist when the step began: such rollouts are
        never trained.
        """
        found = step - 1 - version
        if not 0 <= found <= self.max_staleness:
            raise ValueError(
                f"rollouts for step {step} were sampled by version {version} of the weights; expected one of "
                f"{max(0, step - 1 - self.max_staleness)} to {step - 1}, as max_staleness={self.max_staleness} allows"
            )
        return found
