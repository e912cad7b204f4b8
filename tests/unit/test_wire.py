"""What travels between ranks comes back as it was, and can run nothing."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl.environments.runner import RewardOutcome
from nemo_rl.errors import RewardError
from nemo_rl.rollout.protocol import Completion
from nemo_rl.run import wire


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1, 2.5, 0.1 + 0.2, "é", True],
        {"a": (1, [2]), "b": {"!": 3}, "c": {4: "d"}},
        {1, 2},
        b"\x00\xff",
        Path("/output/x"),
        datetime(2026, 11, 28, 12, 30, 1, 5, tzinfo=UTC),
        [Completion([1, 2], [-0.25, -1e-30], True), RewardOutcome(None, {"a": 1.0}, "late")],
    ],
)
def test_values_come_back_as_they_were(value: Any) -> None:
    found = wire.loads(wire.dumps(value))
    assert found == value
    assert type(found) is type(value)


def test_numbers_without_a_value_travel() -> None:
    found = wire.loads(wire.dumps([math.nan, math.inf, -math.inf]))
    assert math.isnan(found[0]) and found[1:] == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_travel_exactly(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4).to(dtype)
    found = wire.loads(wire.dumps({"weights": tensor}))["weights"]
    assert found.dtype == dtype and torch.equal(found, tensor)


def test_numbers_of_other_libraries_become_pythons() -> None:
    import numpy as np

    assert wire.loads(wire.dumps([np.float32(0.5), np.int64(3), np.bool_(True)])) == [0.5, 3, True]


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyError("x"), FileNotFoundError(2, "gone", "f"), RewardError("no", "trace")]
)
def test_errors_come_back_with_their_type_and_notes(error: Exception) -> None:
    error.add_note("in callback X")
    found = wire.loads(wire.dumps(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert found.__notes__ == ["in callback X"]
    assert getattr(found, "traceback", None) == getattr(error, "traceback", None)


class OfAUser(Exception):
    def __init__(self) -> None:
        raise AssertionError("nobody else's code runs")


def test_an_error_of_somebody_elses_type_does_not_come_back() -> None:
    assert wire.loads(wire.dumps(OfAUser.__new__(OfAUser))) is None


def test_what_has_no_form_is_an_error_that_names_it() -> None:
    with pytest.raises(TypeError, match=r"a builtins\.object cannot travel between ranks"):
        wire.dumps([object()])


@pytest.mark.parametrize(
    "forged",
    [
        {"!": "dataclass", "class": "os:system", "of": {}},
        {"!": "dataclass", "class": "nemo_rl.run.wire:read_token", "of": {}},
        {"!": "dataclass", "class": "subprocess:Popen", "of": {"args": "id"}},
        {"!": "reduce", "of": ["os.system", "id"]},
    ],
)
def test_a_forged_message_makes_no_object(forged: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        wire.loads(json.dumps(forged).encode())


def test_signed_bytes_are_read_by_those_who_have_the_key_and_in_their_place() -> None:
    signed = wire.sign(b"key", "exchange 3 by rank 1", b"content")
    assert wire.verify(b"key", "exchange 3 by rank 1", signed) == b"content"
    for key, place, found in [
        (b"other", "exchange 3 by rank 1", signed),
        (b"key", "exchange 4 by rank 1", signed),
        (b"key", "exchange 3 by rank 0", signed),
        (b"key", "exchange 3 by rank 1", signed[:-1] + b"T"),
        (b"key", "exchange 3 by rank 1", b""),
    ]:
        with pytest.raises(wire.ForgedMessage, match="was not written by a rank of this job"):
            wire.verify(key, place, found)


def test_without_a_secret_the_ranks_of_one_user_know_each_other(tmp_path: Path) -> None:
    assert wire.read_token(tmp_path / "absent") == b""
    (tmp_path / "token").write_text("word\n")
    assert wire.read_token(tmp_path / "token") == b"word"


def test_a_member_of_an_enumeration_may_be_written_by_its_attribute() -> None:
    """As Python 3.11.0 to 3.11.3 do; of anything else no attribute is read."""
    import io

    from torch.distributed.checkpoint.planner import WriteItemType

    from nemo_rl.run import unpickle

    def pickled(kind: bytes, name: bytes) -> io.BytesIO:
        return io.BytesIO(b"cbuiltins\ngetattr\n(" + kind + b"V" + name + b"\ntR.")

    of_torch = b"ctorch.distributed.checkpoint.planner\nWriteItemType\n"
    assert unpickle.load(pickled(of_torch, b"TENSOR"), "x") is WriteItemType.TENSOR
    for kind, name in ((of_torch, b"__class__"), (b"ctorch.distributed.checkpoint.planner\nSavePlan\n", b"__init__")):
        with pytest.raises(unpickle.ForbiddenPickle):
            unpickle.load(pickled(kind, name), "x")
