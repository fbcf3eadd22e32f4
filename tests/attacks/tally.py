"""Counts of attacks by their outcome."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tally:
    """How many attacks of a module had which outcome."""

    counts: Counter[str]
    notes: list[str] = field(default_factory=list)

    def count(self, outcome: str, number: int = 1) -> None:
        """``number`` attacks ended so."""
        self.counts[outcome] += number

    def note(self, figure: str) -> None:
        """A figure to be printed beside the counts."""
        self.notes.append(figure)
