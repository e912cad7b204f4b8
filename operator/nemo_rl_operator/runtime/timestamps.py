"""RFC 3339 times as the API writes them, to and from datetime."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache


def now() -> datetime:
    return datetime.now(UTC)


def parse(text: str | None) -> datetime | None:
    """The time in `text`, in UTC; None where there is none or it is none. Beyond the calendar: its first or last moment."""
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text.upper())  # RFC 3339 allows small letters for T and Z
    except ValueError:
        return None
    if not found.tzinfo:
        return found.replace(tzinfo=UTC)
    try:
        return found.astimezone(UTC)
    except OverflowError:
        return (datetime.max if found.year > 1 else datetime.min).replace(tzinfo=UTC)


@lru_cache(maxsize=256)
def write(time: datetime) -> str:
    """Whole seconds with Z, as the API server writes them."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_until(text: str | None, now: datetime) -> float | None:
    """Seconds from `now` to the time in `text`, negative when it is past; None where there is none."""
    time = parse(text)
    return (time - now).total_seconds() if time else None
