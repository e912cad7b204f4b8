"""Two attempts of one job at the same time, as after the loss of a node that only seemed to be dead: one of them writes."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_rl.job import names
from nemo_rl.run.checkpoint import find_checkpoints
from unit.worker.pods import Engine, Pod
from unit.worker.test_attempts import sft

GATE = [{"function": "pod_callbacks:Gate"}]


def test_an_attempt_that_comes_back_from_a_lost_node_publishes_nothing_and_ends_in_words(
    engine: Engine, tiny_model: Path, tmp_path: Path
):
    lost = Pod(tmp_path / "lost", engine, sft(tiny_model, callbacks=GATE))
    next_one = Pod(tmp_path / "next", engine, sft(tiny_model, callbacks=GATE))
    next_one.path(names.OUTPUT_DIR).rmdir()
    next_one.path(names.OUTPUT_DIR).symlink_to(lost.path(names.OUTPUT_DIR))
    lost.start(HOLD_AT="3", **{names.ATTEMPT_VARIABLE: "1"})
    lost.wait_at_gate()
    next_one.start(HOLD_AT="3", **{names.ATTEMPT_VARIABLE: "2"})
    next_one.wait_at_gate()  # it went on from step 2, although the other one holds the directory
    lost.open_gate()
    assert lost.end() == 1
    word = lost.word()
    assert word.cause == "LeaseLost"
    assert "attempt 1 lost the right to write to this output to attempt 2" in (word.message or "")
    assert [found.step for found in find_checkpoints(lost.output)] == [2], "nothing came from the lost one"
    next_one.open_gate()
    assert next_one.end() == 0, next_one.said()
    assert "going on after step 2" in next_one.said()
    assert [row["step"] for row in next_one.history()] == [1, 2, 3, 4]
    assert json.loads((next_one.output / "result.json").read_text())["word"]["totalSteps"] == 4
    assert [found.step for found in find_checkpoints(lost.output)] == [2, 4]

    late = lost.start(**{names.ATTEMPT_VARIABLE: "1"})
    assert late.end() == 0, "the job is done, and says so"


def test_an_attempt_that_starts_after_a_later_one_ends_in_words(engine: Engine, tiny_model: Path, tmp_path: Path):
    pod = Pod(tmp_path, engine, sft(tiny_model, callbacks=GATE))
    pod.start(HOLD_AT="2", **{names.ATTEMPT_VARIABLE: "2"})
    pod.wait_at_gate()
    pod.stop(9)
    pod.end()
    assert pod.run(**{names.ATTEMPT_VARIABLE: "1"}) == 1
    assert "attempt 1 came too late: attempt 2" in (pod.word().message or "")
    pod.open_gate()
    assert pod.run(**{names.ATTEMPT_VARIABLE: "3"}) == 0
