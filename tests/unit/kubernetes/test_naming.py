"""Names and digests of jobs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.api.keywords import build_spec
from nemo_rl.backends.kubernetes.naming import job_name, spec_digest
from nemo_rl.job.manifest import name_problem
from nemo_rl.job.spec import RLTrainingJobSpec


def spec(**more: object) -> RLTrainingJobSpec:
    return build_spec("org/model", "org/data", "exact_match", **more)  # type: ignore[arg-type]


@given(st.text(max_size=120), st.integers(0, 12))
def test_every_name_is_a_valid_one_that_is_not_taken(model: str, earlier: int) -> None:
    taken: set[str] = set()
    for _ in range(earlier + 1):
        name = job_name(spec(), model, taken)
        assert name_problem(name) is None
        assert name not in taken
        taken.add(name)


def test_a_name_says_algorithm_and_model() -> None:
    name = job_name(spec(), "Qwen/Qwen2.5-1.5B")
    assert name == f"grpo-qwen2-5-1-5b-{spec_digest(spec())[:6]}"
    assert job_name(spec(), "Qwen/Qwen2.5-1.5B", {name}) == f"{name}-2"


def test_what_a_run_computes_makes_its_digest() -> None:
    digests = [spec_digest(s) for s in (spec(), spec(max_steps=5), spec(seed=1), spec(beta=0.1), spec(image="i"))]
    assert len(set(digests)) == len(digests)


def test_saying_a_default_changes_no_digest() -> None:
    assert spec_digest(spec()) == spec_digest(spec(seed=42, max_epochs=1))


def test_what_may_change_on_a_live_job_is_not_in_the_digest() -> None:
    changed = spec(suspend=True, backoff_limit=7, active_deadline_seconds=9, ttl_seconds_after_finished=3)
    assert spec_digest(changed) == spec_digest(spec())
    served = spec(serve_until="2030-01-01T00:00:00Z")
    assert spec_digest(served) == spec_digest(spec())
