"""How much longer a start may take beside many others: when to write and to ask is a matter of load, not of decisions."""

from __future__ import annotations

PER_JOB, LONGEST = 0.1, 60.0
"""Seconds that each job which starts beside it adds, and their limit: a thousand at once take a minute."""


def patience(beside: int) -> float:
    """How much longer than alone, in seconds, a start may take beside so many others."""
    return min(beside * PER_JOB, LONGEST)
