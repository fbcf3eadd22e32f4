"""Names that are longer than a file system takes."""

from __future__ import annotations

import pytest
from wasilet_common.file_names import MAX_BYTES, shortened

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["a", "a" * 255, "\N{EURO SIGN}" * 85])
def test_a_name_that_fits_stays(name: str) -> None:
    assert shortened(name) == name


@pytest.mark.parametrize("name", ["a" * 256, "\N{EURO SIGN}" * 86, "a." * 200, "-" * 300])
@pytest.mark.parametrize("limit", [MAX_BYTES, 100, 17])
def test_a_name_that_does_not_fit_is_cut_and_stays_its_own(name: str, limit: int) -> None:
    made = shortened(name, limit)
    assert len(made.encode()) <= limit
    assert made != shortened(name + "x", limit)
    assert made == shortened(name, limit)
