"""wasi-experimental-http: the host functions through a real guest memory, against a real server on loopback."""

from __future__ import annotations

import contextlib
import http.server
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import wasmtime
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node.runtime.hostcalls import http as hostcalls
from wasilet_node.runtime.hostcalls import http_client
from wasilet_node.runtime.hostcalls.http import HttpHost
from wasilet_node.runtime.hostcalls.http_client import (
    HttpCallError,
    HttpErrno,
    Origin,
    allowed_origins,
    parse_headers,
    parse_url,
)
from wasilet_node.runtime.protocol import HttpPolicy

pytestmark = pytest.mark.unit

SIGNATURES = {"req": 10, "close": 1, "header_get": 6, "headers_get_all": 4, "body_read": 4}


def wrapper(name: str, count: int) -> str:
    """An export that calls the import of the same name."""
    parameters = "(param" + " i32" * count + ")"
    gets = " ".join(f"(local.get {index})" for index in range(count))
    return f'(func (export "{name}") {parameters} (result i32) (call ${name} {gets}))'


GUEST = (
    "(module "
    + " ".join(
        f'(import "wasi_experimental_http" "{name}" (func ${name} (param{" i32" * count}) (result i32)))'
        for name, count in SIGNATURES.items()
    )
    + ' (memory (export "memory") 4) '
    + " ".join(wrapper(name, count) for name, count in SIGNATURES.items())
    + ")"
)


class Guest:
    """Speaks the crate's ABI as its guest side does."""

    hosts: ClassVar[list[HttpHost]] = []

    def __init__(self, policy: HttpPolicy | None, source: str = GUEST) -> None:
        engine = wasmtime.Engine()
        host = HttpHost()
        self.hosts.append(host)
        linker = wasmtime.Linker(engine)
        host.define(linker)
        host.configure(policy)
        self.store = wasmtime.Store(engine)
        instance = linker.instantiate(self.store, wasmtime.Module(engine, source))
        self.exports: Any = instance.exports(self.store)

    def put(self, at: int, data: bytes) -> tuple[int, int]:
        """Pointer and length."""
        if data:
            self.exports["memory"].write(self.store, data, at)
        return at, len(data)

    def get(self, at: int, size: int) -> bytes:
        """Bytes of memory."""
        return bytes(self.exports["memory"].read(self.store, at, at + size))

    def number(self, at: int) -> int:
        """A u32 of memory."""
        return int.from_bytes(self.get(at, 4), "little")

    def call(self, name: str, *numbers: int) -> HttpErrno:
        """The error number."""
        return HttpErrno(self.exports[name](self.store, *numbers))

    def request(
        self, url: str, method: str = "GET", headers: bytes = b"", body: bytes = b""
    ) -> tuple[HttpErrno, int, int]:
        """Error, status, handle."""
        numbers = [
            *self.put(1000, url.encode()),
            *self.put(5000, method.encode()),
            *self.put(6000, headers),
            *self.put(20000, body),
        ]
        errno = self.call("req", *numbers, 100, 104)
        return errno, int.from_bytes(self.get(100, 2), "little"), self.number(104)

    def body(self, handle: int, size: int = 4096) -> bytes:
        """All that is left of a body."""
        data = b""
        while True:
            assert self.call("body_read", handle, 70000, size, 108) is HttpErrno.SUCCESS
            count = self.number(108)
            if not count:
                return data
            data += self.get(70000, count)

    def header(self, handle: int, name: str, size: int = 4096) -> tuple[HttpErrno, bytes]:
        """Error, value."""
        errno = self.call("header_get", handle, *self.put(60000, name.encode()), 70000, size, 108)
        return errno, self.get(70000, self.number(108)) if errno is HttpErrno.SUCCESS else b""


def local(*origins: str, limit: int | None = None) -> HttpPolicy:
    """A policy whose origins the node's operator allows, since they are on this machine."""
    return HttpPolicy(allowed_origins=origins, local_origins=origins, max_concurrent_requests=limit)


class Handler(http.server.BaseHTTPRequestHandler):
    """Echoes, redirects, and worse."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""

    def handle_any(self) -> None:
        """By path."""
        length = int(self.headers.get("Content-Length") or 0)
        received = self.rfile.read(length)
        path, _, query = self.path.partition("?")
        if path == "/redirect":
            self.answer(302, b"", Location=query)
        elif path == "/temporary":
            self.answer(307, b"", Location=query)
        elif path == "/loop":
            self.answer(302, b"", Location="/loop")
        elif path == "/large":
            self.answer(200, b"x" * int(query))
        elif path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (b"one ", b"two"):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        elif path == "/silent":
            # until the guest hangs up
            self.rfile.read(1)
        elif path == "/drip":
            self.close_connection = True
            with contextlib.suppress(ConnectionError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.02)
        elif path == "/broken":
            self.wfile.write(b"not http at all\r\n\r\n")
            self.close_connection = True
        else:
            seen = "".join(f"{name.lower()}={value}\n" for name, value in self.headers.items())
            self.answer(200, f"{self.command} {self.path}\n{seen}".encode() + b"\n" + received, **{"X-Echo": "Yes"})

    do_GET = do_POST = do_PUT = do_HEAD = do_PATCH = do_DELETE = handle_any  # noqa: N815

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        """A whole response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(autouse=True)
def _close_what_guests_left_open() -> Iterator[None]:
    yield
    while Guest.hosts:
        for response in Guest.hosts.pop()._responses.values():
            response.close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def guest(server: str) -> Guest:
    return Guest(local(server))


def test_a_request_is_sent_and_its_answer_read(guest: Guest, server: str) -> None:
    errno, status, handle = guest.request(f"{server}/a%20b?q=1", "POST", b"x-one:1\nx-two: 2 \n", b"the body")
    assert (errno, status) == (HttpErrno.SUCCESS, 200)
    first, _, rest = guest.body(handle).partition(b"\n")
    assert first == b"POST /a%20b?q=1"
    assert b"x-one=1\nx-two=2\n" in rest
    assert rest.endswith(b"\n\nthe body")
    assert guest.call("close", handle) is HttpErrno.SUCCESS
    assert guest.call("body_read", handle, 0, 10, 108) is HttpErrno.INVALID_HANDLE


def test_headers_are_found_whatever_their_case(guest: Guest, server: str) -> None:
    _, _, handle = guest.request(server)
    assert guest.header(handle, "X-ECHO") == (HttpErrno.SUCCESS, b"Yes")
    assert guest.header(handle, "x-none")[0] is HttpErrno.HEADER_NOT_FOUND
    assert guest.header(handle, "x-echo", size=2)[0] is HttpErrno.BUFFER_TOO_SMALL
    assert guest.call("headers_get_all", handle, 70000, 65536, 108) is HttpErrno.SUCCESS
    lines = guest.get(70000, guest.number(108)).decode().splitlines()
    assert "x-echo:Yes" in lines
    assert all(":" in line for line in lines)
    assert guest.call("headers_get_all", handle, 70000, 3, 108) is HttpErrno.BUFFER_TOO_SMALL


def test_a_chunked_body_is_streamed(guest: Guest, server: str) -> None:
    _, _, handle = guest.request(f"{server}/chunked")
    assert guest.body(handle, size=3) == b"one two"


def test_head_has_no_body(guest: Guest, server: str) -> None:
    errno, _, handle = guest.request(f"{server}/large?5", "HEAD")
    assert errno is HttpErrno.SUCCESS
    assert guest.body(handle) == b""


@pytest.mark.parametrize("policy", [None, HttpPolicy(allowed_origins=())])
def test_without_a_list_nothing_is_reachable(server: str, policy: HttpPolicy | None) -> None:
    assert Guest(policy).request(server)[0] is HttpErrno.DESTINATION_NOT_ALLOWED


def test_an_origin_is_scheme_and_host_and_port(guest: Guest, server: str) -> None:
    host, _, port = server.removeprefix("http://").partition(":")
    for url in (f"https://{host}:{port}/", f"http://{host}/", f"http://localhost:{port}/", f"http://{host}:1/"):
        assert guest.request(url)[0] is HttpErrno.DESTINATION_NOT_ALLOWED, url
    assert guest.request(f"{server}@example.com/")[0] in (
        HttpErrno.DESTINATION_NOT_ALLOWED,
        HttpErrno.INVALID_URL,
    )
    assert guest.request(f"HTTP://{host}:{port}/")[0] is HttpErrno.SUCCESS


@pytest.mark.parametrize("target", ["http://localhost:{port}/", "//localhost:{port}/", "http://127.0.0.2:{port}/"])
@pytest.mark.parametrize("kind", ["redirect", "temporary"])
def test_a_redirect_never_leaves_the_list(guest: Guest, server: str, kind: str, target: str) -> None:
    port = server.rsplit(":", 1)[1]
    url = f"{server}/{kind}?{target.format(port=port)}"
    assert guest.request(url)[0] is HttpErrno.DESTINATION_NOT_ALLOWED


def test_a_redirect_within_the_list_is_followed(guest: Guest, server: str) -> None:
    _, status, handle = guest.request(f"{server}/redirect?/end", "POST", b"content-type:a/b\n", b"data")
    assert status == 200
    text = guest.body(handle)
    assert text.startswith(b"GET /end\n")
    assert b"content-type" not in text
    _, _, handle = guest.request(f"{server}/temporary?/end", "POST", b"", b"data")
    text = guest.body(handle)
    assert text.startswith(b"POST /end\n")
    assert text.endswith(b"data")


def test_secrets_do_not_follow_to_another_origin(server: str) -> None:
    port = server.rsplit(":", 1)[1]
    other = f"http://localhost:{port}"
    guest = Guest(local(server, other))
    _, _, handle = guest.request(f"{server}/redirect?{other}/", headers=b"authorization:s3cret\ncookie:s3cret\nx-a:1\n")
    text = guest.body(handle)
    assert b"s3cret" not in text
    assert b"x-a=1" in text


def test_a_redirect_loop_ends(guest: Guest, server: str) -> None:
    assert guest.request(f"{server}/loop")[0] is HttpErrno.REQUEST_ERROR


def test_host_and_framing_headers_are_ours(guest: Guest, server: str) -> None:
    forged = b"Host:evil.example\ncontent-length:99\nTransfer-Encoding:chunked\nconnection:upgrade\n"
    _, _, handle = guest.request(server, "POST", forged, b"abc")
    text = guest.body(handle)
    assert b"evil" not in text
    assert b"upgrade" not in text
    assert b"content-length=3\n" in text


def test_open_responses_are_limited(server: str) -> None:
    guest = Guest(local(server, limit=2))
    _, _, first = guest.request(server)
    _, _, second = guest.request(server)
    assert first != second
    assert guest.request(server)[0] is HttpErrno.TOO_MANY_SESSIONS
    guest.call("close", first)
    assert guest.request(server)[0] is HttpErrno.SUCCESS


def test_no_request_may_be_in_flight_when_the_limit_is_zero(server: str) -> None:
    guest = Guest(local(server, limit=0))
    assert guest.request(server)[0] is HttpErrno.TOO_MANY_SESSIONS


def test_closing_an_unknown_handle_is_fine_since_the_crate_panics_otherwise(guest: Guest) -> None:
    assert guest.call("close", 77) is HttpErrno.SUCCESS
    assert guest.call("close", -1) is HttpErrno.SUCCESS


@pytest.mark.parametrize(
    ("url", "method", "headers", "errno"),
    [
        ("not a url", "GET", b"", HttpErrno.INVALID_URL),
        ("/relative", "GET", b"", HttpErrno.INVALID_URL),
        ("http://", "GET", b"", HttpErrno.INVALID_URL),
        ("http://[::1", "GET", b"", HttpErrno.INVALID_URL),
        ("http://a:99999/", "GET", b"", HttpErrno.INVALID_URL),
        ("ftp://a/", "GET", b"", HttpErrno.DESTINATION_NOT_ALLOWED),
        ("{server}/\r\nX: y", "GET", b"", HttpErrno.INVALID_URL),
        ("{server}", "GE T", b"", HttpErrno.INVALID_METHOD),
        ("{server}", "", b"", HttpErrno.INVALID_METHOD),
        ("{server}", "CONNECT", b"", HttpErrno.INVALID_METHOD),
        ("{server}", "GET", b"no colon\n", HttpErrno.INVALID_ENCODING),
        ("{server}", "GET", b"a b:c\n", HttpErrno.INVALID_ENCODING),
        ("{server}", "GET", b"a:b\rc:d\n", HttpErrno.INVALID_ENCODING),
        ("{server}", "GET", b"a:\xff\n", HttpErrno.UTF_8_ERROR),
        ("{server}/broken", "GET", b"", HttpErrno.REQUEST_ERROR),
    ],
)
def test_errors_are_the_crates_numbers(  # noqa: PLR0917
    guest: Guest, server: str, url: str, method: str, headers: bytes, errno: HttpErrno
) -> None:
    assert guest.request(url.format(server=server), method, headers)[0] is errno


@pytest.mark.parametrize("path", ["/silent", "/drip"])
def test_a_server_that_never_begins_to_answer_is_given_up_on(
    guest: Guest, server: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "REQUEST_TIMEOUT_SECONDS", 0.3)
    began = time.monotonic()
    assert guest.request(server + path)[0] is HttpErrno.REQUEST_ERROR
    assert time.monotonic() - began < 3, "the drip alone would take four seconds"


def test_a_body_may_take_longer_than_its_head(guest: Guest, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "REQUEST_TIMEOUT_SECONDS", 0.3)
    errno, _, handle = guest.request(f"{server}/large?100000")
    assert errno is HttpErrno.SUCCESS
    time.sleep(0.5)
    assert len(guest.body(handle)) == 100_000


def test_bodies_have_limits(guest: Guest, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MAX_RESPONSE_BODY_BYTES", 50_000)
    monkeypatch.setattr(hostcalls, "MAX_REQUEST_BODY_BYTES", 1000)
    assert guest.request(f"{server}/", "POST", body=b"x" * 1001)[0] is HttpErrno.BUFFER_TOO_SMALL
    errno, _, handle = guest.request(f"{server}/large?60000")
    assert errno is HttpErrno.SUCCESS
    outcomes = {guest.call("body_read", handle, 70000, 4096, 108) for _ in range(20)}
    assert outcomes == {HttpErrno.SUCCESS, HttpErrno.REQUEST_ERROR}


def test_a_server_that_is_not_there_is_a_request_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{unused.getsockname()[1]}"
    assert Guest(local(origin)).request(origin)[0] is HttpErrno.REQUEST_ERROR


def test_pointers_outside_of_memory_are_errors_and_not_crashes(guest: Guest, server: str) -> None:
    url = guest.put(1000, server.encode())
    method = guest.put(5000, b"GET")
    end = 4 * 65536
    assert guest.call("req", end, 10, *method, 0, 0, 0, 0, 100, 104) is HttpErrno.BUFFER_TOO_SMALL
    assert guest.call("req", -4, 4, *method, 0, 0, 0, 0, 100, 104) is HttpErrno.BUFFER_TOO_SMALL
    assert guest.call("req", *url, *method, 0, 0, 0, -1, 100, 104) is HttpErrno.BUFFER_TOO_SMALL
    assert guest.call("req", *url, *method, 0, 0, 0, 0, end - 1, 104) is HttpErrno.MEMORY_ACCESS_ERROR
    _, _, handle = guest.request(server)
    assert guest.call("body_read", handle, end - 1, 10, 108) is HttpErrno.MEMORY_ACCESS_ERROR
    assert guest.call("body_read", handle, 0, 10, end) is HttpErrno.MEMORY_ACCESS_ERROR
    assert guest.call("header_get", handle, *guest.put(60000, b"x-echo"), end - 1, 10, 108) is (
        HttpErrno.MEMORY_ACCESS_ERROR
    )


def test_a_guest_without_memory_is_told_so() -> None:
    source = GUEST.replace('(export "memory")', "")
    assert Guest(None, source).call("req", *([0] * 10)) is HttpErrno.MEMORY_NOT_FOUND


def test_urls_are_taken_apart() -> None:
    assert parse_url("https://Exämple.org/ü?ä=1#f").path == "/%C3%BC?%C3%A4=1"
    assert parse_url("https://EXAMPLE.org").origin == Origin("https", "example.org", 443)
    assert parse_url("http://bücher.example:81/").origin == Origin("http", "xn--bcher-kva.example", 81)
    assert parse_url("http://u%40:p@h/").authorization == "Basic dUA6cA=="


def test_entries_that_are_no_origin_allow_nothing() -> None:
    assert allowed_origins(("example.com", "ftp://a", "*", "", "insecure:allow-all", "https://b/path")) == {
        Origin("https", "b", 443)
    }


@given(st.text(max_size=60))
def test_whatever_a_url_is_it_is_parsed_or_refused(text: str) -> None:
    try:
        target = parse_url(text)
    except HttpCallError as error:
        assert error.errno is HttpErrno.INVALID_URL  # noqa: PT017 - either outcome is right, no other
    else:
        assert target.origin.host
        assert target.path.startswith("/")
        assert target.path.isascii()
        assert not {" ", "\r", "\n"} & set(target.path)


@given(st.text(max_size=60))
def test_headers_cannot_smuggle_lines(text: str) -> None:
    try:
        headers = parse_headers(text)
    except HttpCallError as error:
        assert error.errno is HttpErrno.INVALID_ENCODING  # noqa: PT017 - either outcome is right, no other
    else:
        assert not any({"\r", "\n", "\0"} & set(name + value) for name, value in headers)


def test_a_request_imports_nothing(guest: Guest, server: str) -> None:
    before = set(sys.modules)
    guest.request(server)
    assert set(sys.modules) - before == set()
    assert hostcalls.MODULE == "wasi_experimental_http"
