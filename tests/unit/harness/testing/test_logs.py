"""The plugin judges whole logs: long ones, those of containers that were started again, those that broke off; and a
demo.yaml says the same of them."""

from __future__ import annotations

import threading
import tracemalloc
from functools import partial
from typing import Any

import pytest
from wasilet.apps.samples import Expectation, Line
from wasilet.demo.expect import ExpectationError, wait_for
from wasilet.errors import ApiError
from wasilet.testing import expectation
from wasilet.testing.observe import Observer

from tests.unit.harness.testing.log_rig import NAMESPACE, START_NS, Log, LogApi, running, scene_on, terminated

pytestmark = pytest.mark.unit

LINES = 120_000
SEVERAL_KILOBYTES = [f"line {number}" for number in range(200)]


@pytest.fixture
def api() -> LogApi:
    return LogApi()


def long_log(api: LogApi, instance: str = "a") -> None:
    api.write(instance, "EARLY", *(f"line {number}" for number in range(LINES)), "LATE")


# --- length ----------------------------------------------------------------------------------------------------------

WHOLE_LOG: list[tuple[dict[str, Any], str]] = [
    ({"contains": "LATE"}, ""),
    ({"contains": "EARLY"}, ""),
    ({"contains": ["LATE", "EARLY", "line 60000"]}, ""),
    ({"matches": "^EARLY$"}, ""),
    ({"matches": ["^LATE$", r"^line 1$"]}, ""),
    ({"in_order": ["EARLY", "line 7", "LATE"]}, ""),
    ({"absent": "NEVER"}, ""),
    ({"contains": "LATE", "absent": "NEVER"}, ""),
    ({"in_order": ["LATE", "EARLY"]}, r"without in order 'EARLY'[\s\S]*line 1 has it, but .* after line 120002"),
    ({"absent": "EARLY"}, r"holds 'EARLY', which it must not[\s\S]*PRESENT  absent 'EARLY'  \(line 1\)"),
    ({"absent": "LATE"}, r"holds 'LATE', which it must not"),
    ({"contains": "EARLY", "absent": "LATE"}, r"holds 'LATE', which it must not"),
    ({"contains": "NEVER"}, r"pod/p is over \(Succeeded\) without contains 'NEVER'"),
]  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_every_kind_of_assertion_judges_a_log_of_120_000_lines_however_often_it_is_asked(
    api: LogApi, order: int
) -> None:
    long_log(api)
    api.end("a")
    with scene_on(api) as scene:
        api.pod("p", "Succeeded", terminated("a"))
        for wanted, failure in [*WHOLE_LOG, *WHOLE_LOG][::order]:
            if failure:
                with pytest.raises(AssertionError, match=failure):
                    scene.assert_logs("p", **wanted)
            else:
                lines = scene.assert_logs("p", **wanted)
                assert lines[0] == "EARLY"
        assert len(lines) == LINES + 2
        assert lines[-2:] == [f"line {LINES - 1}", "LATE"]


def test_the_memory_for_a_log_does_not_grow_with_it(api: LogApi) -> None:
    long_log(api)
    api.end("a")
    assert len(api.written["a"].data) > 4_000_000
    with scene_on(api) as scene:
        tracemalloc.start()
        try:
            api.pod("p", "Succeeded", terminated("a"))
            lines = scene.assert_logs("p", in_order=["EARLY", "LATE"])
            with pytest.raises(AssertionError):
                scene.assert_logs("p", contains="NEVER")
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(lines) == LINES + 2
    assert most < 3_000_000


def test_the_lines_stay_readable_when_all_is_over(api: LogApi) -> None:
    long_log(api)
    api.end("a")
    with scene_on(api) as scene:
        api.pod("p", "Succeeded", terminated("a"))
        lines = scene.assert_logs("p", contains="LATE")
    assert sum(1 for _ in lines) == LINES + 2


@pytest.mark.parametrize("at_ns", [None, START_NS], ids=["one after the other", "all at once"])
def test_what_is_absent_is_judged_to_the_line_that_was_the_last_when_it_was_asked(
    api: LogApi, at_ns: int | None
) -> None:
    """The container runs on, and its log is longer than what has come over the wire. The lines of one write have one
    time."""
    api.write("a", "EARLY", *SEVERAL_KILOBYTES, "LATE", at_ns=at_ns)
    log = api.written["a"]
    log.held.clear()
    with scene_on(api) as scene:
        api.pod("p", "Running", running("a"))

        def release() -> None:
            assert api.tail_asked.wait(10)
            log.held.set()

        helper = threading.Thread(target=release)
        helper.start()
        with pytest.raises(AssertionError, match="holds 'LATE', which it must not"):
            scene.assert_logs("p", contains="EARLY", absent="LATE")
        helper.join()
        assert scene.assert_logs("p", contains="EARLY", absent="NEVER")


def test_what_is_absent_is_not_judged_by_a_log_that_could_not_be_read_in_time(
    api: LogApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expectation, "CATCH_UP_SECONDS", 0.3)
    api.write("a", "EARLY", *SEVERAL_KILOBYTES)
    api.written["a"].held.clear()
    with scene_on(api) as scene:
        api.pod("p", "Running", running("a"))
        with pytest.raises(AssertionError, match="cannot be judged: the log of main is still being read"):
            scene.assert_logs("p", absent="NEVER", within_seconds=0.3)


def test_a_line_that_comes_while_it_is_waited_for_is_enough(api: LogApi) -> None:
    with scene_on(api) as scene:
        api.pod("p", "Running", running("a"))
        timer = threading.Timer(0.1, api.write, ["a", "ready"])
        timer.start()
        assert scene.assert_logs("p", contains="ready") == ["ready"]
        timer.join()


def read_logs(observer: Observer, count: int) -> bool | None:
    view = observer.find("p")
    logs = list(view.logs.values()) if view else []
    return True if len(logs) == count and all(log.count for log in logs) else None


# --- restarts, containers --------------------------------------------------------------------------------------------


def test_no_instance_of_a_container_is_forgotten_that_was_started_again_before_it_was_asked_for(api: LogApi) -> None:
    """The node keeps the logs of two instances; the first is gone by then."""
    with scene_on(api) as scene:
        observer = scene.observer
        api.write("a", "first")
        api.pod("p", "Running", running("a"))
        for number, (last, now) in enumerate([("a", "b"), ("b", "c"), ("c", "d")], 1):
            api.end(last)
            api.write(now, f"start {number}")
            api.pod("p", "Running", running(now, restarts=number, last=last))
            assert observer.wait(partial(read_logs, observer, number + 1), within_seconds=10)
            if number > 1:
                del api.written[{2: "a", 3: "b"}[number]]
        wanted = ["first", "start 1", "start 2", "start 3"]
        assert scene.assert_logs("p", in_order=wanted) == wanted
        assert scene.assert_logs("p", contains="first", absent="NEVER") == wanted
        with pytest.raises(AssertionError, match="holds 'first'"):
            scene.assert_logs("p", contains="start 3", absent="first")


def test_the_lines_of_several_containers_are_in_the_order_of_their_times_however_they_arrive(api: LogApi) -> None:
    with scene_on(api) as scene:
        began = api.clock
        api.write("b", "second", at_ns=began + 2_000)
        api.pod("p", "Running", running("a", name="one"), running("b", name="two"))
        scene.assert_logs("p", contains="second")
        api.write("a", "first", at_ns=began + 1_000)
        api.write("b", "third", at_ns=began + 3_000)
        wanted = ["first", "second", "third"]
        assert scene.assert_logs("p", in_order=wanted) == wanted
        assert scene.assert_logs("p", contains="second", container="two") == ["second", "third"]
        with pytest.raises(AssertionError, match="in order 'first' did not come"):
            scene.assert_logs("p", in_order=["second", "first"], within_seconds=0.3)


def test_two_containers_with_long_logs_are_judged_as_a_whole(api: LogApi) -> None:
    for number in range(2000):
        api.write("a", f"a {number}")
        api.write("b", f"b {number}")
    api.end("a")
    api.end("b")
    with scene_on(api) as scene:
        api.pod("p", "Succeeded", terminated("a", name="one"), terminated("b", name="two"))
        for _ in range(2):
            lines = scene.assert_logs("p", in_order=["a 0", "b 0", "a 1000", "b 1999"], absent="c 0")
        assert lines[:4] == ["a 0", "b 0", "a 1", "b 1"]
        assert lines[-1] == "b 1999"
        assert lines[3001] == "b 1500"


# --- broken connections ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [False, True], ids=["broken off", "ended by an agent that restarts"])
def test_a_log_whose_connection_ends_early_is_read_on_without_a_line_lost_or_doubled(
    api: LogApi, clean: bool  # noqa: FBT001
) -> None:  # fmt: skip
    api.write("a", *SEVERAL_KILOBYTES)
    api.written["a"].gate = {0: 1500, 1: 4000}.get
    api.written["a"].clean_break = clean
    with scene_on(api) as scene:
        api.pod("p", "Running", running("a"))
        assert scene.assert_logs("p", contains="line 199") == SEVERAL_KILOBYTES
        assert api.written["a"].reads == 3


@pytest.mark.parametrize(
    ("wanted", "failure"),
    [
        ({"absent": "NEVER"}, "what is absent cannot be judged: the log of main: it is gone"),
        ({"contains": "NEVER"}, "contains 'NEVER' cannot be judged: the log of main: it is gone"),
    ],
)
def test_a_log_that_cannot_be_read_says_nothing_of_what_is_not_in_it(
    api: LogApi, wanted: dict[str, Any], failure: str
) -> None:
    api.refuse = ApiError("it is gone", code=404)
    with scene_on(api) as scene:
        api.pod("p", "Succeeded", terminated("a"))
        with pytest.raises(AssertionError, match=failure):
            scene.assert_logs("p", **wanted)


def test_a_log_of_which_the_node_lost_the_beginning_is_not_taken_for_whole(api: LogApi) -> None:
    api.write("a", *SEVERAL_KILOBYTES)
    api.written["a"].gate = {0: 1500}.get
    with scene_on(api) as scene:
        original = api.chunks

        def rotated(*given: Any, **query: Any) -> Any:
            if api.written["a"].reads == 1 and "tailLines" not in query:
                api.written["a"] = Log()
                api.write("a", "line 150")
            return original(*given, **query)

        api.chunks = rotated  # type: ignore[method-assign]
        api.pod("p", "Running", running("a"))
        assert scene.assert_logs("p", contains="line 1")
        scene.observer.wait(
            lambda: all(log.ended for view in scene.observer.pods.values() for log in view.logs.values()) or None,
            within_seconds=10,
        )
        with pytest.raises(AssertionError, match="the node no longer has its beginning"):
            scene.assert_logs("p", contains="line 1", absent="NEVER")


def test_the_log_of_a_pod_can_be_asserted_after_it_was_deleted(api: LogApi) -> None:
    with scene_on(api) as scene:
        api.write("a", "hello")
        api.pod("p", "Running", running("a"))
        pod = scene.pod("p")
        pod.delete()
        api.end("a")
        assert scene.assert_logs(pod, contains="hello", absent="panic") == ["hello"]


# --- one judge -------------------------------------------------------------------------------------------------------

AGREED: list[tuple[str, list[Line], dict[str, Any], bool]] = [
    ("found", [Line(contains="EARLY")], {"in_order": ["EARLY"]}, True),
    ("order", [Line(contains="EARLY"), Line(contains="LATE")], {"in_order": ["EARLY", "LATE"]}, True),
    ("disorder", [Line(contains="LATE"), Line(contains="EARLY")], {"in_order": ["LATE", "EARLY"]}, False),
    ("twice", [Line(contains="EARLY"), Line(contains="EARLY")], {"in_order": ["EARLY", "EARLY"]}, False),
    ("absent", [Line(absent="NEVER")], {"absent": "NEVER"}, True),
    ("present", [Line(absent="LATE")], {"absent": "LATE"}, False),
    ("both", [Line(contains="EARLY"), Line(absent="LATE")], {"in_order": ["EARLY"], "absent": "LATE"}, False),
    ("matches", [Line(matches="^EAR.Y$")], {"matches": "^EAR.Y$"}, True),
    ("no match", [Line(matches="^ARLY")], {"matches": "^ARLY"}, False),
]
PODS = {
    "succeeded": ("Succeeded", terminated("a")),
    "running": ("Running", running("a")),
    "refused image": ("Pending", {"name": "main", "state": {"waiting": {"reason": "ImagePullBackOff"}}}),
}


@pytest.mark.parametrize("state", PODS)
@pytest.mark.parametrize(("log", "wanted", "holds"), [row[1:] for row in AGREED], ids=[row[0] for row in AGREED])
def test_a_demo_and_an_assertion_say_the_same_of_the_same_pod(
    api: LogApi, state: str, log: list[Line], wanted: dict[str, Any], holds: bool  # noqa: FBT001
) -> None:  # fmt: skip
    api.write("a", "EARLY", "between", "LATE")
    phase, container = PODS[state]
    if phase == "Succeeded":
        api.end("a")
    api.pod("p", phase, container)
    within = 0.4 if phase == "Running" else 20.0  # where the end is certain, it is not waited for
    with scene_on(api) as scene:
        try:
            scene.assert_logs("p", within_seconds=within, **wanted)
            plugin = True
        except AssertionError:
            plugin = False
    try:
        wait_for(api, Expectation(pod="p", log=tuple(log), within_seconds=within), namespace=NAMESPACE)
        demo = True
    except ExpectationError:
        demo = False
    assert plugin == demo
    assert plugin is holds or phase == "Pending"


def test_a_job_whose_first_pod_failed_is_waited_for_until_the_job_itself_is_over(api: LogApi) -> None:
    """Its next attempt comes after a back-off, when all pods that there are have ended."""
    api.write("a", "attempt 1")
    api.end("a")
    api.job("j")
    with scene_on(api) as scene:
        api.pod("j-1", "Failed", terminated("a", code=1), job="j")

        def second() -> None:
            api.write("b", "attempt 2")
            api.end("b")
            api.pod("j-2", "Succeeded", terminated("b"), job="j")

        timer = threading.Timer(0.3, second)
        timer.start()
        assert scene.assert_logs("job/j", in_order=["attempt 1", "attempt 2"]) == ["attempt 1", "attempt 2"]
        timer.join()
        api.job("j", Complete="")
        with pytest.raises(AssertionError, match=r"job/j is over \(Complete\) without contains 'attempt 3'"):
            scene.assert_logs("job/j", contains="attempt 3")
    expected = Expectation(job="j", phase="Complete", log=(Line(contains="attempt 2"),), within_seconds=20.0)
    # The log as far as it was read: what is asked for may come before that of the first pod.
    lines = list(wait_for(api, expected, namespace=NAMESPACE).lines)
    assert lines in (["attempt 1", "attempt 2"], ["attempt 2"])
