"""Which log is asked for: queries and container states, with the texts that kubectl users know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from wasilet_node.server.logs import LogRequestError, find_log, parse_options

from tests.unit.node.server.rig import log_folder, make_pod

pytestmark = pytest.mark.unit

NOW = 1_000_000_000_000
RUNNING: dict[str, Any] = {"running": {"startedAt": "2025-01-01T00:00:00Z"}}
ENDED: dict[str, Any] = {"terminated": {"exitCode": 1, "containerID": "wasmtime://old"}}


def test_an_empty_query_asks_for_everything() -> None:
    options = parse_options({}, now_ns=NOW)
    assert not options.follow
    assert options.tail_lines is None
    assert options.render.since_ns is None
    assert (options.render.stdout, options.render.stderr) == (True, True)


def test_a_full_query_is_understood() -> None:
    query = {"follow": "true", "timestamps": "1", "tailLines": "3", "limitBytes": "10", "sinceSeconds": "5"}
    options = parse_options(query, now_ns=NOW)
    assert (options.follow, options.tail_lines) == (True, 3)
    assert (options.render.timestamps, options.render.limit_bytes) == (True, 10)
    assert options.render.since_ns == NOW - 5_000_000_000


@pytest.mark.parametrize(
    ("text", "expected"), [("false", False), ("False", False), ("0", False), ("", True), ("x", True)]
)
def test_booleans_are_read_as_the_api_machinery_reads_them(text: str, expected: bool) -> None:  # noqa: FBT001
    assert parse_options({"previous": text}, now_ns=NOW).previous is expected


def test_the_old_name_of_tail_lines_still_works() -> None:
    assert parse_options({"tail": "7"}, now_ns=NOW).tail_lines == 7
    assert parse_options({"tail": "all", "tailLines": "3"}, now_ns=NOW).tail_lines is None


@pytest.mark.parametrize(
    "query",
    [
        {"tailLines": "many"},
        {"tailLines": "1_000"},
        {"tailLines": ""},
        {"limitBytes": "9" * 30},
        {"limitBytes": "1.5"},
        {"sinceSeconds": " 1"},
        {"sinceTime": "yesterday"},
    ],
)
def test_what_cannot_be_read_is_400(query: dict[str, str]) -> None:
    with pytest.raises(LogRequestError, match="Unable to decode query") as error:
        parse_options(query, now_ns=NOW)
    assert error.value.code == 400


@pytest.mark.parametrize(
    "query",
    [
        {"tailLines": "-1"},
        {"limitBytes": "0"},
        {"sinceSeconds": "0"},
        {"sinceSeconds": "5", "sinceTime": "2025-01-01T00:00:00Z"},
        {"stream": "stdout"},
        {"stream": "Stdout", "tailLines": "1"},
    ],
)
def test_what_makes_no_sense_is_422(query: dict[str, str]) -> None:
    with pytest.raises(LogRequestError, match="Invalid request") as error:
        parse_options(query, now_ns=NOW)
    assert error.value.code == 422


@pytest.mark.parametrize(
    ("state", "last", "message"),
    [
        ({"waiting": {"reason": "ContainerCreating"}}, {}, "is waiting to start: ContainerCreating"),
        ({"waiting": {"reason": "ErrImagePull"}}, {}, "is waiting to start: image can't be pulled"),
        ({"waiting": {"reason": "ImagePullBackOff"}}, {}, "is waiting to start: trying and failing to pull image"),
        ({}, {}, "is waiting to start - no logs yet"),
        ({"terminated": {"exitCode": 1}}, {}, "is terminated"),
        ({"waiting": {"reason": "CrashLoopBackOff"}}, {"terminated": {"exitCode": 1}}, "is terminated"),
    ],
)
def test_a_container_without_a_log_says_why(
    state: dict[str, Any], last: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LogRequestError) as error:
        find_log(make_pod(state=state, lastState=last), "main", previous=False, log_root=tmp_path)
    assert error.value.code == 400
    assert error.value.message == f'container "main" in pod "web" {message}'


def test_previous_needs_an_instance_before(tmp_path: Path) -> None:
    with pytest.raises(LogRequestError) as error:
        find_log(make_pod(), "main", previous=True, log_root=tmp_path)
    assert error.value.message == 'previous terminated container "main" in pod "web" not found'


def test_a_container_without_a_status_is_not_available(tmp_path: Path) -> None:
    pod = make_pod()
    pod["status"] = {}
    with pytest.raises(LogRequestError, match='container "main" in pod "web" is not available'):
        find_log(pod, "main", previous=False, log_root=tmp_path)


@pytest.mark.parametrize(
    ("state", "last", "restarts", "previous", "file", "container_id"),
    [
        (RUNNING, {}, 0, False, "0.log", "wasmtime://a0"),
        (RUNNING, ENDED, 3, False, "3.log", "wasmtime://a0"),
        (RUNNING, ENDED, 3, True, "2.log", "wasmtime://old"),
        (ENDED, {}, 2, False, "2.log", "wasmtime://old"),
        (ENDED, {"terminated": {"containerID": "wasmtime://older"}}, 2, True, "1.log", "wasmtime://older"),
        ({"waiting": {"reason": "CrashLoopBackOff"}}, ENDED, 2, False, "2.log", "wasmtime://old"),
        ({"waiting": {"reason": "CrashLoopBackOff"}}, ENDED, 2, True, "2.log", "wasmtime://old"),
        ({"terminated": {"exitCode": 128}}, ENDED, 2, False, "2.log", "wasmtime://old"),
    ],
)
def test_the_file_is_that_of_the_right_instance(
    *,
    state: dict[str, Any],
    last: dict[str, Any],
    restarts: int,
    previous: bool,
    file: str,
    container_id: str,
    tmp_path: Path,
) -> None:
    pod = make_pod(state=state, lastState=last, restartCount=restarts)
    target = find_log(pod, "main", previous=previous, log_root=tmp_path)
    assert target.path == tmp_path / "pods" / "default_web_uid-web" / "main" / file
    assert target.container_id == container_id
    assert target.running is (not previous and "running" in state)


def test_a_next_start_that_is_counted_already_does_not_hide_the_last_log(tmp_path: Path) -> None:
    pod = make_pod(state={"waiting": {"reason": "CrashLoopBackOff"}}, lastState=ENDED, restartCount=2)
    (log_folder(tmp_path, pod) / "1.log").touch()
    assert find_log(pod, "main", previous=False, log_root=tmp_path).path.name == "1.log"


def test_init_containers_have_logs_too(tmp_path: Path) -> None:
    pod = make_pod()
    pod["status"]["initContainerStatuses"] = [
        {"name": "setup", "restartCount": 0, "state": {"terminated": {"containerID": "wasmtime://i"}}}
    ]
    assert find_log(pod, "setup", previous=False, log_root=tmp_path).path.parent.name == "setup"
