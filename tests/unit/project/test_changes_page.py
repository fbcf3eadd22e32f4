"""What docs/kubernetes-changes.md calls shown is shown: the tests and cases that it names exist."""

from __future__ import annotations

import re

import pytest

from tests.docs_pages import DOCS, defined_tests
from tests.e2e.casefiles import load

pytestmark = pytest.mark.unit

PAGE = (DOCS / "kubernetes-changes.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists() -> None:
    names = set(re.findall(r"`(test_[a-z0-9_]+)`", PAGE))
    assert len(names) > 10
    assert names - defined_tests() == set()


def test_every_case_that_the_page_names_exists() -> None:
    names = set(re.findall(r"\*([^*|]+)\*", PAGE))
    assert len(names) > 5
    assert names - {case.name for case in load()} == set()
