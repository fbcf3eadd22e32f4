"""The page of a report, from what was seen: no cluster, no browser."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from wasilet.testing.report_page import Chapter, PodStory, duration, page

pytestmark = pytest.mark.unit

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e"


def story(name: str = "hello", marks: dict[str, float] | None = None) -> PodStory:
    return PodStory(
        name=name,
        namespace=EVIL,
        node=EVIL,
        phase="Succeeded",
        image=EVIL,
        marks=marks or {"created": 10.0, "scheduled": 10.1, "started": 10.3, "first line": 10.4, "finished": 11.0},
        containers=[{"name": EVIL, "state": EVIL, "restarts": 2}],
        logs=[{"container": "c", "dropped": 3, "error": "", "lines": [[10.4, EVIL]]}],
    )


def chapter(*pods: PodStory, **fields: Any) -> Chapter:
    event = {"at": 10.0, "type": "Warning", "reason": EVIL, "about": EVIL, "message": EVIL, "count": 2}
    given: dict[str, Any] = {"title": EVIL, "outcome": "passed", "began": 10.0, "ended": 11.0, "events": [event]}
    return Chapter(pods=list(pods), **{**given, **fields})


def test_nothing_that_a_stranger_wrote_becomes_markup() -> None:
    html = page(EVIL, [chapter(story(EVIL))], cluster=EVIL)
    assert "<script" not in html
    assert "<img" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "&lt;script&gt;" in html


def test_nothing_is_loaded_from_anywhere() -> None:
    html = page("x", [chapter(story())])
    assert "default-src 'none'" in html
    assert not re.search(r"\b(src|href)\s*=|@import|url\(", html.replace("src=x onerror", ""))


def test_the_time_from_create_to_first_line_is_told() -> None:
    html = page("x", [chapter(story()), chapter(story(marks={"created": 1.0, "first line": 3.0}))])
    assert "400 ms" in html
    assert "2 s" in html


@pytest.mark.parametrize(
    "marks",
    [
        {"created": 5.0},
        {"created": 5.0, "scheduled": 5.0, "started": 5.0, "first line": 5.0, "finished": 5.0},
        {"created": 5.0, "scheduled": 6.0, "started": 8.0, "finished": 9.0},
        {"created": 5.0, "first line": 4.0},
        {"created": 5.0, "scheduled": 5.1, "deleted": 90000.0},
    ],
)
def test_bars_stay_within_their_track_whatever_is_known(marks: dict[str, float]) -> None:
    html = page("x", [chapter(story(marks=marks))])
    for left, width in re.findall(r"left:(-?[\d.]+)%;width:(-?[\d.]+)%", html):
        assert float(left) >= 0
        assert float(width) > 0
        assert float(left) + float(width) <= 100.3


def test_a_run_without_pods_is_a_page_too() -> None:
    assert "Nothing ran" in page("x", [])
    assert "No pods" in page("x", [chapter()])


def test_a_chapter_survives_the_way_through_a_file() -> None:
    made = chapter(story())
    assert Chapter.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0384, "38 ms"), (1.236, "1.24 s"), (2.0, "2 s"), (185.0, "3 min 5 s")]
)
def test_durations_read_well(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_what_a_pod_has_served_is_on_the_page() -> None:
    served = replace(story(), served="5,900 requests, 2.1 ms on average, 0 failed")
    assert "served 5,900 requests, 2.1 ms on average, 0 failed" in page("t", [chapter(served)])
    assert "served" not in page("t", [chapter(story())])
