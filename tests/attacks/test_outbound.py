"""Outbound HTTP leads nowhere that only the node can reach: every row of ``outbound.yaml``."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common.addresses import guard
from wasilet_node.pods.http_policy import ALLOWED_DOMAINS, Outbound, OutboundRules, http_policy
from wasilet_node.runtime.hostcalls.http_client import HttpCallError, HttpClient, HttpErrno, parse_url
from wasilet_node.runtime.protocol import HttpPolicy
from wasilet_node.volumes.base import ContainerConfigError

from tests.unit.node.pods.fakes import make_pod

pytestmark = pytest.mark.unit

TABLE: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "outbound.yaml").read_text())
RULES = OutboundRules(
    own_addresses=("10.1.2.3", "2001:db8::7"),
    api_servers=(("api.cluster.example", 6443), ("203.0.113.9", 6443)),
    kubelet_ports=(38123,),
)
REFUSED = [pytest.param(row["origin"], row["why"], id=row["origin"]) for row in TABLE["refused"]]


def policy(*origins: str, local: tuple[str, ...] = ()) -> HttpPolicy:
    return HttpPolicy(
        allowed_origins=origins,
        local_origins=local,
        own_addresses=RULES.own_addresses,
        api_servers=RULES.api_servers,
        kubelet_ports=RULES.kubelet_ports,
    )


def annotated(*origins: str) -> dict[str, Any]:
    pod = make_pod()
    pod["metadata"]["annotations"] = {ALLOWED_DOMAINS: json.dumps(origins)}
    return pod


@pytest.fixture
def no_connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where a connection was tried."""
    tried: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr("wasilet_node.runtime.hostcalls.http_client.socket.socket.connect", connect)
    return tried


@pytest.mark.parametrize(("origin", "why"), REFUSED)
def test_an_annotation_that_leads_there_fails_the_container_and_says_what_the_operator_may_do(
    origin: str, why: str
) -> None:
    with pytest.raises(ContainerConfigError, match=why) as refused:
        http_policy(annotated("https://api.example", origin), RULES)
    assert "--allow-local-origins http" in str(refused.value)


@pytest.mark.parametrize(("origin", "why"), REFUSED)
def test_a_guest_does_not_reach_it_either(origin: str, why: str, no_connections: list[Any]) -> None:
    client = HttpClient(policy(origin))
    with pytest.raises(HttpCallError, match=why) as refused:
        client.send(parse_url(origin + "/x"), "GET", [], b"")
    assert refused.value.errno is HttpErrno.DESTINATION_NOT_ALLOWED
    assert no_connections == []


@pytest.fixture(scope="module")
def redirecting() -> Iterator[str]:
    """An origin that sends its callers to the path's query."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", self.path.partition("?")[2])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("origin", "why"), [row for row in REFUSED if str(row.values[0]).isascii()]
)  # a header carries ASCII only
def test_a_redirect_does_not_lead_there(redirecting: str, origin: str, why: str) -> None:
    client = HttpClient(policy(redirecting, origin, local=(redirecting,)))
    with pytest.raises(HttpCallError, match=why) as refused:
        client.send(parse_url(f"{redirecting}/?{origin}/"), "GET", [], b"")
    assert refused.value.errno is HttpErrno.DESTINATION_NOT_ALLOWED


@pytest.mark.parametrize("origin", TABLE["allowed"])
def test_other_origins_pass(origin: str) -> None:
    assert http_policy(annotated(origin), RULES) == replace(policy(origin), max_concurrent_requests=None)
    HttpClient(policy(origin)).check(parse_url(origin).origin)


@pytest.mark.parametrize("row", TABLE["rebound"], ids=lambda row: "+".join(row["answers"]))
def test_a_name_that_resolves_there_is_refused_before_a_byte_is_sent(
    row: dict[str, Any], no_connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = row.get("port", 80)

    def answers(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "innocent.example"
        families = [socket.AF_INET6 if ":" in text else socket.AF_INET for text in row["answers"]]
        ends = [(text, port, 0, 0) if ":" in text else (text, port) for text in row["answers"]]
        return [(f, socket.SOCK_STREAM, 6, "", end) for f, end in zip(families, ends, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", answers)
    origin = f"http://innocent.example:{port}"
    with pytest.raises(HttpCallError, match=row["why"]) as refused:
        HttpClient(policy(origin)).send(parse_url(origin), "GET", [], b"")
    assert refused.value.errno is HttpErrno.DESTINATION_NOT_ALLOWED
    assert no_connections == []


def test_the_address_that_was_judged_is_the_one_that_is_connected_to(
    no_connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def rebinding(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        address = "192.0.2.1" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with pytest.raises(HttpCallError) as failed:
        HttpClient(policy("http://innocent.example")).send(parse_url("http://innocent.example"), "GET", [], b"")
    assert failed.value.errno is HttpErrno.REQUEST_ERROR
    assert (asked, no_connections) == (["innocent.example"], [("192.0.2.1", 80)])


def test_an_address_that_the_node_got_since_is_known_by_the_connection_itself(
    redirecting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends of a connection of the machine to itself have one address, whatever the list of addresses says."""
    monkeypatch.setattr("wasilet_common.addresses.Guard.refusal", lambda *_: "")
    with pytest.raises(HttpCallError, match="the node itself") as refused:
        HttpClient(policy(redirecting)).send(parse_url(redirecting), "GET", [], b"")
    assert refused.value.errno is HttpErrno.DESTINATION_NOT_ALLOWED


def test_what_the_operator_allows_passes_for_that_origin_alone(redirecting: str) -> None:
    port = redirecting.rpartition(":")[2]
    rules = replace(RULES, local_origins=(redirecting,))
    allowed = http_policy(annotated(redirecting), rules)
    HttpClient(allowed).send(parse_url(f"{redirecting}/?/end"), "HEAD", [], b"").close()
    for other in ("http://127.0.0.1:1", f"https://127.0.0.1:{port}", f"http://localhost:{port}"):
        with pytest.raises(ContainerConfigError, match="loopback"):
            http_policy(annotated(other), rules)
    with pytest.raises(HttpCallError) as unlisted:
        HttpClient(policy(local=(redirecting,))).check(parse_url(redirecting).origin)
    assert unlisted.value.errno is HttpErrno.DESTINATION_NOT_ALLOWED


async def test_the_nodes_own_addresses_and_its_api_server_are_found_when_a_pod_starts() -> None:
    outbound = Outbound(
        own_addresses=lambda: ("10.1.2.3",), api_server="https://localhost:6443", kubelet_port=lambda: 38123
    )
    found = await outbound.policy(annotated("https://a.example"))
    assert found is not None
    assert found.own_addresses == ("10.1.2.3",)
    assert ("localhost", 6443) in found.api_servers
    assert ("127.0.0.1", 6443) in found.api_servers
    assert found.kubelet_ports == (38123,)


@given(st.integers(min_value=0, max_value=2**32 - 1))
def test_one_address_is_judged_alike_in_every_spelling(number: int) -> None:
    rules = guard(own=RULES.own_addresses, endpoints=RULES.api_servers, ports=())
    a, b, c, d = number.to_bytes(4)
    plain = rules.refusal(f"{a}.{b}.{c}.{d}", 80)
    for spelling in (
        str(number),
        hex(number),
        f"0{number:o}",
        f"{a}.{b}.{number & 0xFFFF}",
        f"0x{a:x}.0{b:o}.{c}.{d}.",
        f"[::ffff:{a}.{b}.{c}.{d}]",
        f"[64:ff9b::{number >> 16:x}:{number & 0xFFFF:x}]",
        f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]",
    ):
        assert rules.refusal(spelling, 80) == plain, spelling


@given(st.text(max_size=40), st.integers(min_value=0, max_value=65535))
def test_whatever_a_host_is_it_is_judged(host: str, port: int) -> None:
    guard(own=(host,), endpoints=((host, port),), ports=()).refusal(host, port)
