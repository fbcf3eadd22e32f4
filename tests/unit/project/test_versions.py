from __future__ import annotations

import pytest
from wasilet.controlplane.binaries import binaries
from wasilet.controlplane.versions import versions
from wasilet_dev.versions import Proposal, newest_by_minor

from tests.docs_pages import DOCS

pytestmark = pytest.mark.unit


def test_the_newest_patch_of_each_minor_counts_by_number() -> None:
    assert newest_by_minor(["1.36.9", "1.36.10", "1.37.0", "1.36.2"]) == {"1.36": "1.36.10", "1.37": "1.37.0"}


@pytest.mark.parametrize(
    ("pinned", "newest", "line"),
    [
        ("1.37.2", "1.37.2", "x: 1.37.2, the newest"),
        ("1.37.2", "1.37.3", "x: 1.37.2 -> 1.37.3"),
        ("", "1.38.0", "x: not brought -> 1.38.0"),
        ("1.34.4", "", "x: 1.34.4 -> to be dropped"),
    ],
)
def test_a_proposal_says_what_to_change(pinned: str, newest: str, line: str) -> None:
    assert Proposal(name="x", pinned=pinned, newest=newest).line() == line


def test_the_list_names_what_is_brought_and_nothing_else() -> None:
    assert set(versions().others) == {binary.pin for binary in binaries().values() if "/" not in binary.pin}


def test_the_page_of_versions_names_them_all() -> None:
    page = (DOCS / "versions.md").read_text()
    assert [v for v in (*versions().kubernetes.values(), *versions().others.values()) if v not in page] == []
