"""The cases of ``cases/*.yaml``, all on one cluster, many at a time, each reported as a test of its own.

The first test starts all that were selected; each test then waits for its own. At the end the agent must be the one
that was there at the start, must have logged no error, and nothing of all those pods may be left on the node.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clusters import TestCluster
from tests.e2e import componentize
from tests.e2e.casefiles import Case, load
from tests.e2e.guests import push_guests
from tests.e2e.runner import case_values, run_case
from tests.e2e.stage import Stage

pytestmark = pytest.mark.e2e

PARALLEL = 16
CASE_SECONDS = 300.0
GONE_SECONDS = 90.0
CASES = load()


@dataclass(frozen=True, kw_only=True)
class Running:
    """All selected cases, under way."""

    futures: dict[str, Future[float]]
    agent_pid: int
    node: Path


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    names = {case.id for item in request.session.items if (case := _case_of(item)) is not None}
    without = componentize.why_not()
    selected = [case for case in CASES if case.id in names and not (without and case.component)]
    status = cluster.status()
    guests = push_guests(cluster.cluster, str(status["registry"]))
    node = cluster.kube.get("/api/v1/nodes")["items"][0]
    values = case_values(guests, node, tmp_path_factory.mktemp("scratch"))
    name = str(node["metadata"]["name"])
    stage = Stage(cluster.cluster.admin_credentials())
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="case")
    try:
        futures = {case.id: pool.submit(run_case, case, stage, values) for case in selected}
        yield Running(futures=futures, agent_pid=agent_pid(cluster), node=cluster.cluster.state.node(name))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        stage.close()


def _case_of(item: pytest.Item) -> Case | None:
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
    return case if isinstance(case, Case) else None


def agent_pid(cluster: TestCluster) -> int:
    """Of the only node's agent."""
    record = next(r for r in cluster.cluster.state.records() if r.name.startswith("node-"))
    return record.process.pid


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}/{case.id}")
def test_case(case: Case, running: Running) -> None:
    """See the case file."""
    if case.component and (reason := componentize.why_not()):
        pytest.skip(reason)
    running.futures[case.id].result(timeout=CASE_SECONDS)


def test_the_agent_went_on_and_logged_no_error(running: Running, cluster: TestCluster) -> None:
    """Whatever the cases did, none of it may end the agent or surprise it."""
    assert agent_pid(cluster) == running.agent_pid
    assert unexpected_lines(cluster) == []


def test_nothing_is_left_on_the_node(running: Running, cluster: TestCluster) -> None:
    """No folder, log or container once the namespaces are gone."""
    for future in running.futures.values():
        future.exception(timeout=CASE_SECONDS)
    deadline = time.monotonic() + GONE_SECONDS
    while left := leftovers(running.node):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def leftovers(node: Path) -> list[str]:
    """Of pods: folders, logs, records of containers."""
    found = [path for folder in ("pods", "logs/pods", "containers") for path in (node / folder).glob("*")]
    return sorted(str(path.relative_to(node)) for path in found if not path.name.startswith("."))


_ERROR = re.compile(r"\b(ERROR|CRITICAL)\b|Traceback|never retrieved|never awaited")
_ENTRY = re.compile(r"^(?=\d{4}-\d{2}-\d{2}T)", re.MULTILINE)


def unexpected_lines(cluster: TestCluster) -> list[str]:
    """Entries of the agents' logs, tracebacks and all, that tell of a mistake of ours."""
    state = cluster.cluster.state
    files = [state.log(record.name) for record in state.records() if record.name.startswith("node-")]
    entries = [entry for file in files for entry in _ENTRY.split(file.read_text(errors="replace"))]
    return [entry for entry in entries if _ERROR.search(entry)]
