"""What is asserted of HTTP, and load, against a real server in this process."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from wasilet.errors import UsageError
from wasilet.testing.fixtures import AssertHttp, HttpLoad
from wasilet.testing.http import Answer, NoAnswerError, WantedAnswer, ask
from wasilet.testing.load import Load
from wasilet.testing.service import ready_addresses, service_objects

from tests.unit.harness.testing.log_rig import PODS, LogApi, running, scene_on

pytestmark = pytest.mark.unit

Reply = tuple[int, dict[str, str], bytes]


class Server:
    """Answers what ``reply`` says."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str, bytes]] = []
        self.reply: Callable[[int], Reply | None] = lambda _: (200, {"X-App": "one"}, b"hello world\n")
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append((self.command, self.path, str(self.headers.get("X-Sent")), body))
                reply = outer.reply(len(outer.requests))
                if reply is None:
                    self.close_connection = True
                    return
                status, headers, data = reply
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET  # noqa: N815  (the base class asks for that name)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
def api() -> LogApi:
    return LogApi()


# --- one answer ------------------------------------------------------------------------------------------------------

ANSWER = Answer(status=201, headers={"x-app": "one", "content-type": "text/plain"}, body=b"hello world")


@pytest.mark.parametrize(
    ("wanted", "lacks"),
    [
        ({"status": 201}, []),
        ({"status": (200, 201)}, []),
        ({"status": None}, []),
        ({"status": 200}, ["status 201, not 200"]),
        ({"status": (200, 204)}, ["status 201, not 200 or 204"]),
        ({"status": None, "headers": {"X-App": "one"}}, []),
        ({"status": None, "headers": {"X-App": re.compile("^o")}}, []),
        ({"status": None, "headers": {"X-App": "on"}}, ["header X-App is 'one', not 'on'"]),
        ({"status": None, "headers": {"X-None": re.compile("x")}}, ["header X-None is None, which does not match 'x'"]),
        ({"status": None, "headers": {"X-App": None}}, ["header X-App is there: 'one'"]),
        ({"status": None, "headers": {"X-None": None}}, []),
        ({"status": None, "contains": ["hello", re.compile("w.r")]}, []),
        ({"status": None, "contains": ["hullo"]}, ["the body lacks 'hullo'"]),
        ({"status": None, "absent": ["world"]}, ["the body holds 'world'"]),
    ],
)
def test_an_answer_is_compared_in_status_headers_and_body(wanted: dict[str, Any], lacks: list[str]) -> None:
    assert WantedAnswer(**wanted).lacks(ANSWER) == lacks


def test_what_is_sent_and_what_comes_back(server: Server) -> None:
    answer = ask(f"{server.url}/a?b=c", method="POST", send_headers={"X-Sent": "yes"}, body="text")
    assert server.requests == [("POST", "/a?b=c", "yes", b"text")]
    assert (answer.status, answer.headers["x-app"], answer.text) == (200, "one", "hello world\n")


@pytest.mark.parametrize("url", ["https://x/", "x", "http://", "http://x:99999/", "file:///etc/passwd"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        ask(url)


def test_a_body_without_end_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasilet.testing.http.MAX_BODY_BYTES", 5)
    with pytest.raises(NoAnswerError, match="body is longer"):
        ask(server.url)


# --- until it is so --------------------------------------------------------------------------------------------------


def test_an_app_that_is_not_ready_yet_is_asked_again(server: Server, api: LogApi) -> None:
    server.reply = lambda time: {1: None, 2: (503, {}, b"starting")}.get(time, (200, {}, b"ready"))
    with scene_on(api) as scene:
        assert AssertHttp(scene)(server.url, "/healthz", contains="ready").status == 200
    assert [request[1] for request in server.requests] == ["/healthz"] * 3


def test_a_failure_shows_the_last_answer_and_the_pod_with_its_log(server: Server, api: LogApi) -> None:
    server.reply = lambda _: (500, {"X-App": "one"}, b"it is broken\x1b[2J")
    api.write("a", "cannot open the database")
    with scene_on(api) as scene:
        shown = api.pod("p", "Running", running("a"))
        shown["status"] |= {"podIP": "127.0.0.1", "hostIP": "10.0.0.1"}
        shown["status"]["containerStatuses"][0]["state"] = {"running": {}}
        api.show(PODS, shown)
        pod = scene.pod("p")
        with pytest.raises(AssertionError) as error:
            AssertHttp(scene)(pod, "/x", port=server.server.server_port, within_seconds=0.2)
        assert pod.get(port=server.server.server_port).status == 500
    text = str(error.value)
    for wanted in ("status 500, not 200", "HTTP 500", "x-app: one", "| it is broken\\x1b[2J", "pod/p: Running on n",
                   "| cannot open the database"):  # fmt: skip
        assert wanted in text, text


def test_a_server_that_is_not_there_is_said(api: LogApi) -> None:
    with scene_on(api) as scene, pytest.raises(AssertionError, match=r"refused[\s\S]*last answer:\n  \(none\)"):
        AssertHttp(scene)("http://127.0.0.1:1", within_seconds=0.1)


def test_a_pod_that_has_its_nodes_address_is_not_asked_there(api: LogApi) -> None:
    """Whatever listens on the node is not the pod."""
    with scene_on(api) as scene:
        shown = api.pod("p", "Running", running("a"))
        shown["status"] |= {"podIP": "10.0.0.1", "hostIP": "10.0.0.1"}
        api.show(PODS, shown)
        with pytest.raises(UsageError, match=r"pod/p has no address of its own: 10\.0\.0\.1 is its node's"):
            scene.pod("p").url(8080)


# --- load ------------------------------------------------------------------------------------------------------------


def test_load_counts_what_failed_and_why(server: Server, api: LogApi) -> None:
    server.reply = lambda time: (503, {}, b"") if time % 4 == 0 else (200, {}, b"")
    with scene_on(api) as scene, HttpLoad(scene)(server.url, per_second=1000) as load:
        while load.result.sent < 40:
            time.sleep(0.001)
    result = load.result
    assert result.sent == len(server.requests)
    assert result.failures == {"status 503, not 200": len(server.requests) // 4}
    assert len(result.times) == result.sent - result.failed
    assert "requests failed in" in str(result)
    assert 0 < result.percentile(50) <= result.percentile(99)


def test_load_ends_by_itself() -> None:
    sent = []

    def send(_: float) -> Answer:
        sent.append(1)
        return Answer(status=200)

    load = Load(send, per_second=1000, max_seconds=0.05, workers=2)
    with load:
        for thread in load._threads:
            thread.join(10)
    assert not any(thread.is_alive() for thread in load._threads)
    assert 1 <= len(sent) <= 51
    assert load.result.sent == len(sent)


@pytest.mark.parametrize("given", [{"per_second": 0}, {"per_second": 1e9}, {"workers": 1000}, {"max_seconds": 1e6}])
def test_load_has_bounds(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="out of bounds"):
        Load(lambda _: ANSWER, **given)


# --- services --------------------------------------------------------------------------------------------------------


def test_a_service_of_addresses_has_a_slice_and_no_selector() -> None:
    service, endpoints = service_objects(
        "web", port=80, target_port=8080, selector=None, endpoints=["10.0.0.1", "10.0.0.2"], spec=None
    )
    assert "selector" not in service["spec"]
    assert endpoints["metadata"]["labels"] == {"kubernetes.io/service-name": "web"}
    assert endpoints["ports"][0]["port"] == 8080
    assert ready_addresses([endpoints]) == ["10.0.0.1", "10.0.0.2"]


def test_only_ready_endpoints_count() -> None:
    endpoints = [
        {"addresses": ["b"], "conditions": {"ready": False}},
        {"addresses": ["c"], "conditions": {}},
        {"addresses": ["a"], "conditions": {"ready": True}},
    ]
    assert ready_addresses([{"endpoints": endpoints}, {"endpoints": None}]) == ["a", "c"]


def test_a_selector_and_addresses_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="not by both"):
        service_objects("w", port=80, target_port=None, selector={"a": "b"}, endpoints=["x"], spec=None)
