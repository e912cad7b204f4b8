"""When the next attempt starts."""

from __future__ import annotations

import pytest

from nemo_rl_operator.policies.retry import delay_after
from unit.operator import make


@pytest.mark.parametrize(("failures", "delay"), [(1, 10), (2, 20), (3, 40), (6, 300), (900, 300)])
def test_counted_failures_wait_longer_and_longer(failures: int, delay: float) -> None:
    assert delay_after([make.record(1, "Error", True)], failures) == delay


@pytest.mark.parametrize(("disruptions", "delay"), [(1, 0), (2, 5), (3, 10), (9, 300)])
def test_disruptions_in_a_row_without_progress_wait_too(disruptions: int, delay: float) -> None:
    attempts = [make.record(n, "Disrupted", False) for n in range(1, disruptions + 1)]
    assert delay_after(attempts, 0) == delay


def test_an_attempt_that_made_progress_breaks_the_row() -> None:
    attempts = [make.record(1, "Disrupted", False), make.record(2, "Disrupted", False, to_step=30)]
    attempts.append(make.record(3, "Disrupted", False))
    assert delay_after(attempts, 0) == 0


def test_so_does_one_that_lived_long() -> None:
    attempts = [make.record(n, "Disrupted", False, start_time=make.at(-500)) for n in range(1, 5)]
    assert delay_after(attempts, 0) == 0


def test_a_resumed_job_starts_at_once() -> None:
    assert delay_after([make.record(1, "Error", True), make.record(2, "Suspended", False)], 1) == 0
