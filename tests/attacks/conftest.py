"""Counts of the attack suite, printed at the end of a run."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.attacks.tally import Tally

TALLIES = pytest.StashKey[dict[str, Tally]]()


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Tally:
    """The counts of a module."""
    name = request.module.__name__.rpartition("test_")[2].replace("_", " ")
    return request.config.stash.setdefault(TALLIES, {}).setdefault(name, Tally(Counter()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line per module."""
    for name, tally in sorted(config.stash.get(TALLIES, {}).items()):
        outcomes = [f"{number} {outcome}" for outcome, number in sorted(tally.counts.items())]
        terminalreporter.write_line(f"attacks, {name}: {', '.join([*outcomes, *tally.notes]) or 'none was made'}")
