"""Counts of the attack suite, printed at the end of a run."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.attacks.tally import Tally

COUNTS = pytest.StashKey[dict[str, Counter[str]]]()


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Tally:
    """The counts of a module."""
    name = request.module.__name__.rpartition("test_")[2].replace("_", " ")
    return Tally(request.config.stash.setdefault(COUNTS, {}).setdefault(name, Counter()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line per module."""
    for name, counts in sorted(config.stash.get(COUNTS, {}).items()):
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        terminalreporter.write_line(f"attacks, {name}: {outcomes or 'none was made'}")
