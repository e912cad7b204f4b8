"""How far a transfer is, said without filling logs."""

from __future__ import annotations

import io

import pytest

from nemo_rl.backends.kubernetes import progress
from nemo_rl.backends.kubernetes.progress import TransferBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_is_overwritten_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", 0.0)
    terminal = Terminal()
    with TransferBar("upload", terminal) as bar:
        for done in (0, 500_000, 1_000_000):
            bar(done, 1_000_000)
    shown = terminal.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n")
    assert "█" * 30 in shown and "1.0/1.0 MB" in shown


def test_what_is_done_at_once_shows_nothing() -> None:
    terminal = Terminal()
    with TransferBar("upload", terminal) as bar:
        bar(10, 10)
    assert terminal.getvalue() == ""


def test_a_log_file_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", 0.0)
    file = io.StringIO()
    with TransferBar("upload", file) as bar:
        bar(10, 10)
    assert file.getvalue() == ""


def test_nothing_to_transfer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", 0.0)
    with TransferBar("download", Terminal()) as bar:
        bar(0, 0)
