"""Steps that look before they change, and the report of them."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from wasilet.console import PlainReporter, RichReporter, is_interactive
from wasilet.errors import ComponentError, HarnessError, PortTakenError
from wasilet.process import check_cancelled, run
from wasilet.steps import Finding, Play, Progress, Recap, Status, Step

pytestmark = pytest.mark.unit


class Thing:
    """Something that is right or wrong, and can be made right."""

    def __init__(self, name: str, *, right: bool = False) -> None:
        self.name = name
        self.right = right
        self.changes = 0

    def step(self, after: tuple[str, ...] | None = None) -> Step:
        return Step(name=self.name, look=self.look, change=self.change, after=after)

    def look(self) -> Finding:
        return Finding.ok("fine") if self.right else Finding.differs("make it right", ["- wrong", "+ right"])

    def change(self, _: object) -> str:
        self.right = True
        self.changes += 1
        return "made right"


def fail(error: Exception) -> Step:
    def change(_: object) -> str:
        raise error

    return Step(name="failing", look=lambda: Finding.differs("x"), change=change)


def statuses(recap: Recap) -> dict[str, str]:
    return {outcome.name: outcome.status.value for outcome in recap.outcomes}


def test_only_what_differs_is_changed_and_twice_is_as_once() -> None:
    wrong, right = Thing("wrong"), Thing("right", right=True)
    play = [wrong.step(), right.step()]
    first = Play("p", play).run()
    assert statuses(first) == {"wrong": "changed", "right": "ok"}
    assert first.changed
    second = Play("p", play).run()
    assert statuses(second) == {"wrong": "ok", "right": "ok"}
    assert not second.changed
    assert (wrong.changes, right.changes) == (1, 0)


def test_check_changes_nothing_and_tells_what_it_would() -> None:
    wrong = Thing("wrong")
    recap = Play("p", [wrong.step()]).run(check=True)
    assert statuses(recap) == {"wrong": "changed"}
    assert wrong.changes == 0
    assert recap.outcomes[0].detail == "would: make it right"
    assert recap.outcomes[0].diff == ("- wrong", "+ right")


def test_a_skipped_step_says_why_and_stops_nobody() -> None:
    skipped = Step(name="s", look=lambda: Finding.skip("not here"), change=lambda _: "")
    after = Thing("after")
    recap = Play("p", [skipped, after.step()]).run()
    assert statuses(recap) == {"s": "skipped", "after": "changed"}
    assert recap.succeeded


def test_what_builds_on_a_failure_is_not_tried() -> None:
    later = Thing("later")
    recap = Play("p", [fail(HarnessError("broken", hint="repair it")), later.step()]).run()
    assert statuses(recap) == {"failing": "failed", "later": "skipped"}
    assert later.changes == 0
    assert recap.outcomes[1].detail == "because failing failed"
    assert not recap.succeeded
    with pytest.raises(ComponentError, match="failing: broken"):
        recap.raise_for_failure()


def test_a_bug_in_a_step_is_a_failure_not_a_hang() -> None:
    recap = Play("p", [fail(ZeroDivisionError("oops"))]).run()
    assert "internal error: ZeroDivisionError: oops" in recap.failures[0].detail


def test_steps_without_dependencies_run_beside_each_other() -> None:
    barrier = threading.Barrier(2, timeout=5)

    def meet(_: object) -> str:
        barrier.wait()
        return ""

    both = [Step(name=name, look=lambda: Finding.differs("x"), change=meet, after=()) for name in ("one", "two")]
    assert Play("p", both).run().succeeded


def test_a_failure_beside_ends_the_waiting_of_others() -> None:
    def wait(_: object) -> str:
        while True:
            check_cancelled()
            time.sleep(0.01)

    waiting = Step(name="waiting", look=lambda: Finding.differs("x"), change=wait, after=())
    recap = Play("p", [fail(HarnessError("broken")), waiting]).run()
    assert statuses(recap) == {"failing": "failed", "waiting": "skipped"}
    assert [o.name for o in recap.failures] == ["failing"]


def test_a_failed_component_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "c.log"
    log.write_text("first\nlast words\n")
    stream = io.StringIO()
    step = Step(
        name="c", look=lambda: Finding.differs("x"), change=lambda _: run(["false"], timeout_seconds=5).stdout, log=log
    )
    Play("p", [step]).run(reporter=PlainReporter(stream))
    assert "| last words" in stream.getvalue()
    assert f"the whole log: {log}" in stream.getvalue()


def test_ctrl_c_is_passed_on_after_the_running_steps_gave_up() -> None:
    gave_up = threading.Event()

    def wait(_: object) -> str:
        try:
            run(["sleep", "30"], timeout_seconds=30)
        finally:
            gave_up.set()
        return ""

    def talk(say: Progress) -> str:
        say("now")
        return ""

    class Impatient(PlainReporter):
        def step_progress(self, name: str, message: str) -> None:
            raise KeyboardInterrupt

    steps = [
        Step(name="waiting", look=lambda: Finding.differs("x"), change=wait, after=()),
        Step(name="talking", look=lambda: Finding.differs("x"), change=talk, after=()),
    ]
    with pytest.raises(KeyboardInterrupt):
        Play("p", steps).run(reporter=Impatient(io.StringIO()))
    assert gave_up.is_set()


@pytest.mark.parametrize("after", [("later",), ("nobody",)])
def test_a_step_may_only_come_after_earlier_ones(after: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="after unknown steps"):
        Play("p", [Thing("first").step(after), Thing("later").step()])


def test_the_recap_is_json() -> None:
    recap = Play("p", [Thing("wrong").step(), fail(PortTakenError("port 1 is taken", hint="free it"))]).run()
    data = json.loads(json.dumps(recap.to_json()))
    assert data["counts"] == {"ok": 0, "changed": 1, "skipped": 0, "failed": 1}
    assert data["succeeded"] is False
    assert data["steps"][1]["hint"] == "free it"
    assert set(data["steps"][0]) == {"name", "status", "detail", "seconds", "diff"}


def test_a_reader_that_went_away_stops_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    things = [Thing("a"), Thing("b")]
    with os.fdopen(write, "w") as stream:
        recap = Play("p", [thing.step() for thing in things]).run(reporter=PlainReporter(stream))
    assert recap.succeeded
    assert [thing.changes for thing in things] == [1, 1]


def test_plain_lines_show_the_difference_only_when_asked() -> None:
    for show, expected in ((True, True), (False, False)):
        stream = io.StringIO()
        Play("p", [Thing("wrong").step()]).run(reporter=PlainReporter(stream, show_diff=show))
        assert ("+ right" in stream.getvalue()) is expected
        assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("environ", [{"TERM": "xterm", "CI": "true"}, {"TERM": "dumb"}, {}])
def test_nothing_is_redrawn_in_ci_or_on_a_dumb_terminal(environ: dict[str, str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert not is_interactive(Terminal(), environ)
    assert is_interactive(Terminal(), {"TERM": "xterm"})
    assert not is_interactive(io.StringIO(), {"TERM": "xterm"})


def test_statuses_are_the_four_words() -> None:
    assert [s.value for s in Status] == ["ok", "changed", "skipped", "failed"]


@pytest.mark.parametrize("reporter", [PlainReporter, RichReporter])
def test_a_notice_is_said_at_once_and_as_it_is(reporter: type[PlainReporter | RichReporter]) -> None:
    stream = io.StringIO()
    reporter(stream).notice("waiting for [pid 1]")
    assert stream.getvalue() == "waiting for [pid 1]\n"


def test_a_step_is_known_by_its_key_whatever_its_title_says() -> None:
    order: list[str] = []

    def step(name: str, **options: Any) -> Step:
        def look() -> Finding:
            order.append(name)
            return Finding.ok()

        return Step(name=name, look=look, change=lambda _: "", **options)

    play = Play("x", [step("API server, second wording", key="api-server", after=()), step("b", after=("api-server",))])
    recap = play.run()
    assert order == ["API server, second wording", "b"]
    assert [(o.key, o.name) for o in recap.outcomes] == [("api-server", "API server, second wording"), ("b", "b")]
    with pytest.raises(ValueError, match="name used twice"):
        Play("x", [step("a", key="same"), step("b", key="same")])
    with pytest.raises(ValueError, match="after unknown steps"):
        Play("x", [step("a title", key="key"), step("b", after=("a title",))])
