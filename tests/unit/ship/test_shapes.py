from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unit.ship import notebook
from unit.ship.conftest import Answers, play
from unit.ship.shapes import NINE, SHAPES

HERE = "{}.{}".format(*sys.version_info)
OTHERS = [version for version in ("3.11", "3.12", "3.13", "3.14") if version != HERE]
Shipped = tuple[Path, Answers]
Pods = Callable[[str], Answers]


@pytest.mark.parametrize("name", SHAPES)
def test_a_reward_scores_in_a_fresh_process_as_it_does_here(name: str, shipped: Shipped, pods: Pods) -> None:
    here = shipped[1][name]
    assert "error" not in here, here
    there = pods(HERE)[name]
    assert there.get("scores") == here["scores"], there


@pytest.mark.parametrize("name", SHAPES)
def test_a_reward_travels_as_readable_source_unless_only_a_pickle_can_hold_it(name: str, shipped: Shipped) -> None:
    told = shipped[1][name]
    assert told["how"] == SHAPES[name].how, told
    assert bool(told["python"]) == (told["how"] == "pickle")
    assert bool(told["notes"]) == (told["how"] == "pickle")


@pytest.mark.parametrize("version", OTHERS)
def test_in_another_python_no_reward_is_wrong_or_kills_the_process(version: str, shipped: Shipped, pods: Pods) -> None:
    there = pods(version)
    assert set(there) == set(shipped[1]), "every shape is answered"
    wrong = {n: a for n, a in there.items() if "error" not in a and a["scores"] != shipped[1][n]["scores"]}
    assert wrong == {}
    refused = {name for name, answer in there.items() if "error" in answer}
    assert refused <= {name for name, shape in SHAPES.items() if not shape.portable}


@pytest.mark.parametrize("version", OTHERS)
def test_in_another_python_at_least_seven_of_the_nine_shapes_score_equal(
    version: str, shipped: Shipped, pods: Pods
) -> None:
    there = pods(version)
    equal = [s.name for s in NINE if there[s.name].get("scores") == shipped[1][s.name]["scores"]]
    assert len(equal) >= 7


@pytest.mark.parametrize("version", OTHERS)
def test_a_pickle_is_refused_by_another_python_before_it_is_read(version: str, shipped: Shipped, pods: Pods) -> None:
    there = pods(version)
    pickles = [name for name, told in shipped[1].items() if told["how"] == "pickle"]
    assert pickles
    for name in pickles:
        assert there[name]["error"].startswith("PythonMismatch"), there[name]
        assert f"found Python {version}" in there[name]["error"]


def test_a_loaded_reward_goes_on_to_worker_processes(shipped: Shipped, pods: Pods, tmp_path: Path) -> None:
    pickles = {name: answer["pickle"] for name, answer in pods(HERE).items() if answer["pickle"]}
    # What no pickle can hold (the result of lru_cache inside an object) is scored in the process that loaded it.
    assert set(SHAPES) - set(pickles) <= {"stacked decorators"}
    file = tmp_path / "pickles.json"
    file.write_text(json.dumps(pickles))
    status, answers = play(notebook.command(sys.executable, "worker", file))
    assert status == 0
    assert {n: a.get("scores", a.get("error")) for n, a in answers.items()} == {
        name: shipped[1][name]["scores"] for name in pickles
    }


def test_a_python_too_old_for_the_worker_is_named_and_runs_nothing(shipped: Shipped, pods: Pods) -> None:
    there = pods("3.10")
    assert set(there) == set(shipped[1])
    for answer in there.values():
        assert "found Python 3.10" in answer["error"]
        assert answer["error"].startswith("PythonMismatch")
