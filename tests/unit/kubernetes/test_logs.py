"""A log that is cut at random places and opened again gives every line once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.backends.kubernetes.errors import ApiError, ClusterError
from nemo_rl.backends.kubernetes.logs import MAX_LINE_BYTES, LineResumer, follow_log

TEXTS = st.text(st.characters(blacklist_characters="\n", blacklist_categories=("Cs",)), max_size=12)
LINES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), TEXTS), max_size=40)


class PlayedLog:
    """A kubelet's log: whole lines with stamps, opened from a whole second; each opening ends after so many bytes."""

    def __init__(self, lines: list[tuple[int, str]], cuts: list[int], *, rotated: int = 0, zone: str = "Z") -> None:
        self.lines, self.cuts, self.zone, self.rotated = lines, list(cuts), zone, rotated
        self.opened: list[str | None] = []

    def stamp(self, tick: int) -> str:
        return f"2026-01-01T00:{tick // 600:02d}:{tick // 10 % 60:02d}.{tick % 10}00000000{self.zone}"

    def open(self, pod: str, since: str | None) -> Iterator[bytes]:
        self.opened.append(since)
        lines = self.lines[self.rotated :] if since else self.lines
        stamped = [(self.stamp(tick), text) for tick, text in lines]
        shown = [f"{stamp} {text}\n" for stamp, text in stamped if since is None or stamp[:19] >= since[:19]]
        data = "".join(shown).encode()
        cut = self.cuts.pop(0) if self.cuts else None
        sent = data if cut is None else data[:cut]
        for i in range(0, len(sent), 7):
            yield sent[i : i + 7]
        if cut is not None:
            raise ClusterError("cut")

    def ended(self, pod: str) -> bool:
        return True


def increasing(lines: list[tuple[int, int, str]]) -> list[tuple[int, str]]:
    """Stamps that never fall; many are equal, and many lines with them."""
    found, tick = [], 0
    for seconds, tenths, text in lines:
        tick += 10 * (seconds == 3) + (tenths == 2)
        found.append((tick, text))
    return found


@given(LINES, st.lists(st.integers(0, 400), max_size=6), st.sampled_from(["Z", "+02:00"]))
def test_no_line_is_lost_or_doubled_over_cuts(lines: list[tuple[int, int, str]], cuts: list[int], zone: str) -> None:
    log = PlayedLog(increasing(lines), cuts, zone=zone)
    assert list(follow_log(log, "p", lambda seconds: False)) == [text for _, text in log.lines]


@given(LINES, st.integers(0, 400))
def test_what_was_rotated_away_before_the_cut_changes_nothing(lines: list[tuple[int, int, str]], cut: int) -> None:
    numbered = [(tick, f"{number} {text}") for number, (tick, text) in enumerate(increasing(lines))]
    whole = PlayedLog(numbered, [cut])
    sent = "".join(f"{whole.stamp(tick)} {text}\n" for tick, text in numbered).encode()[:cut]
    delivered = sent.count(b"\n")
    log = PlayedLog(numbered, [cut], rotated=delivered)
    assert list(follow_log(log, "p", lambda seconds: False)) == [text for _, text in numbered]


def test_it_is_opened_again_from_the_last_whole_second_in_the_logs_own_zone() -> None:
    log = PlayedLog([(5, "a"), (23, "b")], [10_000], zone="+02:00")
    assert list(follow_log(log, "p", lambda seconds: False)) == ["a", "b"]
    assert log.opened == [None, "2026-01-01T00:00:02+02:00"]


def test_a_clock_that_is_set_back_doubles_nothing() -> None:
    log = PlayedLog([(50, "a"), (20, "b"), (50, "c")], [10_000])
    assert list(follow_log(log, "p", lambda seconds: False)) == ["a", "b", "c"]


def test_an_endless_line_is_cut_and_the_next_is_whole() -> None:
    resumer = LineResumer()
    found: list[str] = []
    for _ in range(100):
        found += resumer.feed(b"x" * 10_000)
        assert len(resumer._buffer) <= MAX_LINE_BYTES
    found += resumer.feed(b"\nnext\n")
    assert [len(found[0]), found[1]] == [MAX_LINE_BYTES, "next"]


def test_more_lines_in_a_second_than_are_remembered_are_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_rl.backends.kubernetes.logs._RECENT_LINES", 5)
    lines = [(0, str(number)) for number in range(50)]
    log = PlayedLog(lines, [600, 900])
    assert list(follow_log(log, "p", lambda seconds: False)) == [text for _, text in lines]


def test_a_last_line_without_an_end_counts_when_the_pod_has_ended() -> None:
    class Torn(PlayedLog):
        def open(self, pod: str, since: str | None) -> Iterator[bytes]:
            yield b"2026-01-01T00:00:00Z whole\n2026-01-01T00:00:00Z torn"

    assert list(follow_log(Torn([], []), "p", lambda seconds: False)) == ["whole", "torn"]


def test_a_pod_that_is_gone_is_said() -> None:
    class Gone(PlayedLog):
        def open(self, pod: str, since: str | None) -> Iterator[bytes]:
            raise ApiError(404, "not found")

    with pytest.raises(ApiError, match="404"):
        list(follow_log(Gone([], []), "p", lambda seconds: False))
