"""Counts of attacks by their outcome."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Tally:
    """How many attacks of a module had which outcome."""

    counts: Counter[str]

    def count(self, outcome: str, number: int = 1) -> None:
        """``number`` attacks ended so."""
        self.counts[outcome] += number
