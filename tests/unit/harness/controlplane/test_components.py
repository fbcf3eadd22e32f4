"""Long-lived processes: what is started again, what is ended, what a failure says."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from wasilet.controlplane.components import (
    Component,
    component_step,
    ensure_running,
    environment,
    reason_line,
    wait_ready,
)
from wasilet.errors import ComponentError
from wasilet.process import ProcessRecord, is_alive, spawn, stop
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Play

pytestmark = pytest.mark.unit

SLEEP = "import time, sys; print('up', flush=True); time.sleep(60)"


@pytest.fixture
def state(tmp_path: Path) -> State:
    made = State(tmp_path / "state", "wasilet")
    made.create()
    return made


@pytest.fixture
def processes() -> Iterator[list[ProcessRecord]]:
    started: list[ProcessRecord] = []
    yield started
    assert stop(started, grace_seconds=1) == []


def sleeper(name: str, *words: str, ports: dict[str, int] | None = None) -> Component:
    return Component(name=name, argv=(sys.executable, "-P", "-c", SLEEP, *words), ready=lambda: True, ports=ports or {})


def start_unrecorded(component: Component, state: State) -> ProcessRecord:
    env = environment(component, state=state, settings=Settings())
    return spawn(component.argv, log=state.log(component.name), env=env)


def test_what_a_killed_run_left_unrecorded_is_ended_and_nothing_else_is(
    state: State, processes: list[ProcessRecord]
) -> None:
    approver, node = sleeper("approver", "approver"), sleeper("node-a", "node")
    left = start_unrecorded(approver, state)
    # The same interpreter, of the same cluster: a neighbouring step's, which is about to write it down.
    beside = start_unrecorded(node, state)
    processes += [left, beside]
    record = ensure_running(approver, state=state, settings=Settings())
    processes.append(record.process)
    assert not is_alive(left)
    assert is_alive(beside)
    assert is_alive(record.process)


def test_a_taken_port_ends_nobody_of_the_cluster_and_shows_no_old_log(
    state: State, processes: list[ProcessRecord]
) -> None:
    supervisor = start_unrecorded(sleeper("supervisor", "supervisor"), state)
    processes.append(supervisor)
    state.log("node-a").write_text("what an earlier run said\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        step = component_step(
            lambda: sleeper("node-a", "node", ports={"kubelet API": port}),
            "node-a",
            title="node a",
            state=state,
            settings=Settings(),
        )
        (outcome,) = Play("p", [step]).run().outcomes
    assert f"port {port}, which node-a (kubelet API) needs, is taken" in outcome.detail
    assert outcome.log_tail == ()
    assert outcome.log is None
    assert is_alive(supervisor)


def test_a_component_that_ends_is_told_with_its_own_words_not_its_predecessors(
    state: State, processes: list[ProcessRecord]
) -> None:
    state.log("etcd").write_text("fatal: said by an earlier process\n")
    made = Component(
        name="etcd",
        argv=(sys.executable, "-P", "-c", "import sys; sys.exit('panic: no luck\\n\\nmain.main()\\n\\tmain.go:31')"),
        ready=lambda: False,
    )
    record = ensure_running(made, state=state, settings=Settings())
    processes.append(record.process)
    with pytest.raises(ComponentError, match=r"etcd ended while it was starting: panic: no luck$") as caught:
        wait_ready(made, record, timeout_seconds=20, settings=Settings())
    assert "fatal: said by an earlier process" not in caught.value.tail
    assert state.record("etcd") == record


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ((), ""),
        (("one", "two"), "two"),
        (("panic: out of luck", "", "main.main()"), "panic: out of luck"),
        (('{"error":"write: no space left on device"}', "panic: x", "main.go:1"), "no space left on device"),
        (("I0101 all is well", "Error: unknown flag", "usage"), "Error: unknown flag"),
    ],
)
def test_the_line_that_says_why(tail: tuple[str, ...], expected: str) -> None:
    assert reason_line(tail) == expected
