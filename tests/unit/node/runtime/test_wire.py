"""The wire between agent and supervisor."""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node.runtime import wire
from wasilet_node.runtime.protocol import ContainerConfig, ContainerState, ContainerStatus, GuestKind, HttpPolicy, Mount

pytestmark = pytest.mark.unit

CONFIG = ContainerConfig(
    id="a" * 64,
    pod_uid="uid",
    pod_namespace="ns",
    pod_name="pod",
    container_name="main",
    attempt=2,
    artifact="/x.cwasm",
    kind=GuestKind.COMPONENT,
    argv=("a", "é\ud800"[:1]),
    env=(("A", "1"), ("B", "")),
    mounts=(Mount(host="/h", guest="/g", read_only=True),),
    log_path="/log",
    memory_limit_bytes=5,
    http=HttpPolicy(
        allowed_origins=("https://a.example",),
        max_concurrent_requests=3,
        local_origins=("http://127.0.0.1:8090",),
        own_addresses=("10.1.2.3",),
        api_servers=(("api.example", 6443),),
        kubelet_ports=(38123,),
    ),
    annotations={"k": "v"},
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_a_config_survives_the_wire() -> None:
    assert wire.load_config(json.loads(json.dumps(wire.dump_config(CONFIG)))) == CONFIG


def test_fields_of_a_newer_version_are_ignored_and_missing_ones_have_defaults() -> None:
    data = wire.dump_config(CONFIG) | {"invented_later": 1}
    del data["http"]
    assert wire.load_config(data).http is None


def test_a_status_survives_the_wire() -> None:
    status = ContainerStatus(
        id="a",
        pod_uid="u",
        pod_namespace="n",
        pod_name="p",
        container_name="c",
        attempt=0,
        image="i",
        image_id="d",
        log_path="/l",
        state=ContainerState.EXITED,
        exit_code=3,
    )
    assert wire.load_status(json.loads(json.dumps(wire.dump_status(status)))) == status


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_garbage_is_refused_with_one_kind_of_error(data: dict[str, object]) -> None:
    for load in (wire.load_config, wire.load_status, wire.load_usage):
        with pytest.raises(wire.WireError):
            load(data)


@given(st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), max_size=5), st.integers(1, 50))
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(
    messages: list[dict[str, object]], size: int
) -> None:
    data = b"".join(wire.encode(message) for message in messages)
    decoder = wire.Decoder()
    found = [message for start in range(0, len(data), size) for message in decoder.feed(data[start : start + size])]
    assert found == messages


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1{", b"\0\0\0\1\xff"])
def test_what_is_no_message_ends_the_conversation(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        list(wire.Decoder().feed(data))


def test_the_peer_is_known_by_its_uid() -> None:
    import os

    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert wire.peer(ours) == wire.Peer(os.getpid(), os.getuid())
