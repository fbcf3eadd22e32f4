"""Every promise of docs/security.md names a test, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs_pages import defined_tests

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(test_[a-z0-9_]+)`", PAGE)))
FILES = sorted(set(re.findall(r"`((?:tests|manifests)/[\w./-]+)`", PAGE)))


def test_every_test_that_the_security_page_names_exists() -> None:
    assert len(NAMES) > 10
    assert set(NAMES) - defined_tests() == set()


@pytest.mark.parametrize("file", FILES)
def test_every_file_that_the_security_page_names_exists(file: str) -> None:
    assert (ROOT / file).is_file()


def test_the_page_says_how_many_attacks_there_are() -> None:
    import yaml

    for name, words in (("approver", r"approver\.yaml`, (\d+) requests"), ("streams", r"\((\d+) attacks at once\)")):
        rows = yaml.safe_load((ROOT / "tests" / "attacks" / f"{name}.yaml").read_text())
        found = re.search(words, PAGE)
        assert found is not None
        assert int(found[1]) == len(rows)
