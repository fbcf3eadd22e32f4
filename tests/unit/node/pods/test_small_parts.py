"""The small parts of the pod machinery: back-off, annotations, log tails, spec reads."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common import pod_fields
from wasilet_common.cri_log import layout, reader
from wasilet_common.time_format import go_duration
from wasilet_node.pods.http_policy import ALLOWED_DOMAINS, MAX_CONCURRENT_REQUESTS, http_policy
from wasilet_node.pods.plan import KillReason
from wasilet_node.pods.termination import kill_grace
from wasilet_node.pods.under_way import UnderWay
from wasilet_node.runtime.protocol import HttpPolicy
from wasilet_node.settings import NodePaths
from wasilet_node.volumes.base import ContainerConfigError

from tests.unit.node.pods.fakes import make_pod

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("seconds", "text"), [(10, "10s"), (80, "1m20s"), (300, "5m0s"), (0, "0s"), (3661, "1h1m1s")])
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


# ---- the annotations of wasi-experimental-http


def annotated(**annotations: str) -> dict[str, object]:
    pod = make_pod()
    names = {"domains": ALLOWED_DOMAINS, "limit": MAX_CONCURRENT_REQUESTS}
    pod["metadata"]["annotations"] = {names[key]: value for key, value in annotations.items()}
    return pod


def test_without_annotations_there_is_no_outbound_http() -> None:
    assert http_policy(make_pod()) is None
    assert http_policy(annotated(limit="3")) is None


def test_origins_and_the_limit_are_read() -> None:
    domains = json.dumps(["https://api.example", "http://192.0.2.1:8080/", "https://[2001:db8::1]:8443"])
    assert http_policy(annotated(domains=domains, limit="20")) == HttpPolicy(
        allowed_origins=("https://api.example", "http://192.0.2.1:8080", "https://[2001:db8::1]:8443"),
        max_concurrent_requests=20,
    )


@pytest.mark.parametrize(
    "domains",
    [
        "",
        "[",
        '"https://a"',
        "[1]",
        '["api.example"]',
        '["ftp://a"]',
        '["https://u@a"]',
        '["https://a/path"]',
        '["https://a:99999"]',
        '["https://"]',
        "[" * 200_000,
    ],
)
def test_what_is_no_list_of_origins_fails_the_container(domains: str) -> None:
    with pytest.raises(ContainerConfigError, match="allowed-domains"):
        http_policy(annotated(domains=domains))


@pytest.mark.parametrize("limit", ["", "-1", "1.5", "many", "99999999999", "9" * 5000, "٣"])
def test_what_is_no_number_fails_the_container(limit: str) -> None:
    with pytest.raises(ContainerConfigError, match="max-concurrent-requests"):
        http_policy(annotated(domains="[]", limit=limit))


@given(st.text(max_size=50))
def test_no_annotation_breaks_the_parser(text: str) -> None:
    try:
        http_policy(annotated(domains=text, limit=text))
    except ContainerConfigError:
        pass


# ---- log tails


def write_log(path: Path, lines: list[str], *, partial: bool = False) -> None:
    records = [f"2026-01-01T00:00:00.000000001Z stdout {'P' if partial else 'F'} {line}\n" for line in lines]
    path.write_text("".join(records))


def test_the_tail_is_at_most_80_lines(tmp_path: Path) -> None:
    write_log(tmp_path / "0.log", [str(i) for i in range(200)])
    assert reader.last_text(tmp_path / "0.log").split() == [str(i) for i in range(120, 200)]


def test_the_tail_is_at_most_2048_bytes_of_the_end(tmp_path: Path) -> None:
    write_log(tmp_path / "0.log", ["x" * 5000, "end"])
    text = reader.last_text(tmp_path / "0.log")
    assert len(text.encode()) == 2048
    assert text.endswith("x\nend\n")


def test_pieces_of_a_line_are_joined(tmp_path: Path) -> None:
    write_log(tmp_path / "0.log", ["a", "b"], partial=True)
    assert reader.last_text(tmp_path / "0.log") == "ab"


def test_a_log_that_is_larger_than_what_is_read(tmp_path: Path) -> None:
    write_log(tmp_path / "0.log", ["y" * 900 for _ in range(200)] + ["end"])
    assert reader.last_text(tmp_path / "0.log").endswith("y\nend\n")


@given(st.binary(max_size=300))
def test_no_content_breaks_the_tail(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "0.log"
    path.write_bytes(data)
    assert len(reader.last_text(path).encode()) <= reader.MAX_LAST_TEXT_BYTES


def test_a_missing_log_has_no_tail(tmp_path: Path) -> None:
    assert reader.last_text(tmp_path / "none") == ""


def test_only_the_logs_of_one_attempt_are_removed(tmp_path: Path) -> None:
    paths, pod = NodePaths(data=tmp_path), make_pod()
    folder = layout.folder_of_pod(paths.logs, pod) / "c"
    folder.mkdir(parents=True)
    for name in ("1.log", "1.log.20260101-000000", "11.log", "2.log"):
        (folder / name).touch()
    layout.remove_attempt(folder, 1)
    assert sorted(file.name for file in folder.iterdir()) == ["11.log", "2.log"]


def test_removing_a_log_folder_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    layout.remove_folder(folder)
    layout.remove_folder(folder)
    assert not folder.exists()
    assert (outside / "keep").exists()


# ---- reading specs


@pytest.mark.parametrize(
    ("value", "port"), [(80, 80), ("80", 80), ("web", 8080), ("nope", None), (0, None), ("65536", None), ("-1", None)]
)
def test_ports_are_numbers_or_names(value: object, port: int | None) -> None:
    container = {"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}
    if port is None:
        with pytest.raises(ValueError, match=r"port"):
            pod_fields.resolve_port(value, container)
    else:
        assert pod_fields.resolve_port(value, container) == port


def test_a_deletions_grace_comes_before_the_specs() -> None:
    pod = make_pod(terminationGracePeriodSeconds=12)
    assert pod_fields.grace_seconds(pod) == 12
    pod["metadata"]["deletionGracePeriodSeconds"] = 0
    assert pod_fields.grace_seconds(pod) == 0


def test_a_probes_own_grace_counts_for_its_kill_alone() -> None:
    pod = make_pod(terminationGracePeriodSeconds=12)
    own = {"livenessProbe": {"terminationGracePeriodSeconds": 3}, "startupProbe": {"terminationGracePeriodSeconds": 0}}
    assert kill_grace(pod, own, KillReason.LIVENESS_PROBE) == 3
    assert kill_grace(pod, own, KillReason.STARTUP_PROBE) == 0
    assert kill_grace(pod, own, KillReason.DEFINITION_CHANGED) == 12
    assert kill_grace(pod, {"livenessProbe": {}}, KillReason.LIVENESS_PROBE) == 12


def test_field_paths_name_the_list_that_a_container_is_in() -> None:
    pod = make_pod(initContainers=[{"name": "i"}], ephemeralContainers=[{"name": "e"}])
    assert pod_fields.field_path(pod, "c") == "spec.containers{c}"
    assert pod_fields.field_path(pod, "i") == "spec.initContainers{i}"
    assert pod_fields.field_path(pod, "e") == "spec.ephemeralContainers{e}"
    assert pod_fields.field_path(pod, "x") == ""


async def test_a_start_is_under_way_until_its_status_is_sent() -> None:
    under_way = UnderWay()
    assert await under_way.calm(0)
    with under_way.one():
        assert under_way.busy
        assert not await under_way.calm(0.001)
    assert under_way.busy, "the status goes out in the next turns of the loop"
    async with asyncio.timeout(5):
        assert await under_way.calm(5)
    assert not under_way.busy
