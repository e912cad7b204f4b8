"""A traceback of a pod as its reader knows the code."""

from __future__ import annotations

import linecache
from pathlib import Path

from nemo_rl.backends.kubernetes.traces import told_here


def here() -> None:
    raise ValueError("the line of the test")


LINE = here.__code__.co_firstlineno + 1
FRAME = f'  File "{__file__}", line {LINE}, in here'


def test_a_frame_without_its_text_gets_the_line_of_the_file_that_is_loaded_here() -> None:
    told = told_here(f"Traceback (most recent call last):\n{FRAME}\nValueError: x", {})
    assert told.splitlines()[1:] == [FRAME, '    raise ValueError("the line of the test")', "ValueError: x"]


def test_a_frame_with_its_text_stays_as_it_is() -> None:
    trace = f"{FRAME}\n    what the pod had\nValueError: x"
    assert told_here(trace, {}) == trace


def test_cells_get_their_names_and_lines() -> None:
    linecache.cache["Cell In[3]"] = (9, None, ["a = 1\n", "b = a / 0\n"], "Cell In[3]")
    told = told_here('  File "<cell 1>", line 2, in f\nZeroDivisionError', {"<cell 1>": "Cell In[3]"})
    assert told.splitlines() == ['  File "Cell In[3]", line 2, in f', "    b = a / 0", "ZeroDivisionError"]


def test_no_other_file_is_read_whatever_the_pod_names(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password\n")
    for name in (str(secret), "/etc/passwd", "x" * 10_000):
        trace = f'  File "{name}", line 1, in f\nValueError'
        assert told_here(trace, {}) == trace
