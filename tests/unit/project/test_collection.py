"""Every test file is found by a plain `pytest`: its own list of folders to pass over has `build`, which hid a room."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]


def test_no_folder_with_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    patterns = pytestconfig.getini("norecursedirs")
    assert patterns
    hidden = [
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("test_*.py")
        if any(fnmatch(folder, pattern) for folder in path.relative_to(TESTS).parts[:-1] for pattern in patterns)
    ]
    assert hidden == []


def test_every_test_file_has_a_name_that_is_collected(pytestconfig: pytest.Config) -> None:
    """A file that defines tests and is not called test_*.py would never run. Rigs and benchmarks run by name."""
    patterns = pytestconfig.getini("python_files")
    lost = [
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("*.py")
        if path.relative_to(TESTS).parts[0] not in {"rigs", "bench"}
        and not any(fnmatch(path.name, pattern) for pattern in patterns)
        and any(line.startswith(("def test_", "async def test_")) for line in path.read_text().splitlines())
    ]
    assert lost == []
