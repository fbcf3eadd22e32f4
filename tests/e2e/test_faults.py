"""Whatever dies while pods come and go: no guest runs twice, no pod is lost, no status goes backwards.

Each test has short pods made all the time, kills something repeatedly, lets ``up`` repair it, and then judges every
change that the API server ever told of (``tests.e2e.history``) against what the guests themselves wrote down
(``tests.e2e.churn``). ``tests.bench.load`` does the same for longer.
"""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from wasilet import process
from wasilet.cluster.up import up
from wasilet.console import PlainReporter
from wasilet.kube.client import Kube, api_path
from wasilet.settings import TimeoutSettings

from tests.clusters import TestCluster, whole_cluster
from tests.e2e.churn import Churn, Creator, counting_pod, run_counts
from tests.e2e.footprint import footprint
from tests.e2e.guests import Guests, build_toolbox
from tests.e2e.history import History, Life
from tests.e2e.stage import SERVICE_ACCOUNT_SECONDS, namespace_object

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROUNDS = 3
PAUSE_SECONDS = 2.0
PER_SECOND = 4.0
SETTLE_SECONDS = 180.0
PATIENCE = TimeoutSettings(ready_seconds=240, node_ready_seconds=240)
"""The machine may be busy with more than this."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """A cluster that things may be killed in."""

    cluster: TestCluster
    guests: Guests
    image: str
    node: str

    def kill(self, component: str, signum: int = signal.SIGKILL) -> None:
        """End a component, as ``status`` names it, without a warning."""
        record = self.cluster.cluster.state.record(component)
        assert record is not None, f"{component} was never started"
        process.send_signal(record.process, signum)

    def kill_supervisor(self) -> None:
        """The one that forks the sandboxes; they die with it."""
        pid = self.cluster.status()["nodes"][0]["supervisor_pid"]
        found = process.find(int(pid)) if pid else None
        if found is not None:
            process.send_signal(found, signal.SIGKILL)

    def repair(self) -> None:
        """Have ``up`` start what is gone."""
        log = io.StringIO()
        recap = up(self.cluster.settings, reporter=PlainReporter(log))
        assert recap.succeeded, log.getvalue()


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with whole_cluster("faults", max_pods=400, timeouts=PATIENCE) as cluster:
        status = cluster.status()
        guests = Guests(status["registry"], cluster.settings.environ)
        image = guests.add_bytes("toolbox", build_toolbox())
        yield Victim(cluster=cluster, guests=guests, image=image, node=status["nodes"][0]["name"])


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One test's namespace, history and folder of runs."""

    victim: Victim
    namespace: str
    history: History
    creator: Creator
    runs: Path

    def churned(self, fault: Callable[[], None], *, rounds: int = ROUNDS) -> dict[str, Life]:
        """Make pods while ``fault`` is called every few seconds, then wait until each has ended or is gone.
        What became of them, by name."""
        churn = Churn(self.creator, self.victim.image, self.runs, per_second=PER_SECOND)
        try:
            for _ in range(rounds):
                time.sleep(PAUSE_SECONDS)
                fault()
                self.victim.repair()
        finally:
            churn.end()
        missing = churn.uids.keys()
        self.history.wait(
            lambda h: all(uid in h.lives and _is_over(h.lives[uid]) for uid in missing),
            within=SETTLE_SECONDS,
            what="every pod has ended or is gone",
        )
        assert len(churn.uids) >= rounds, "there was no churn"
        self.judge()
        return {life.name: life for life in self.history.lives.values() if life.name not in churn.deleted}

    def judge(self) -> None:
        """Raises AssertionError when anything happened that may not."""
        assert not self.history.violations, "\n".join(self.history.violations[:20])
        counts = run_counts(self.runs)
        twice = {self.history.lives[uid].name: count for uid, count in counts.items() if count > 1}
        assert not twice, f"guests ran more than once: {twice}"
        never = [
            life.name for uid, life in self.history.lives.items() if life.phase == "Succeeded" and uid not in counts
        ]
        assert not never, f"pods Succeeded whose guests never ran: {never}"


def _is_over(life: Life) -> bool:
    return life.deleted_at is not None or life.phase in {"Succeeded", "Failed"}


@pytest.fixture
def scene(victim: Victim, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    name = f"fault-{abs(hash(request.node.name)):x}"
    runs = tmp_path / "runs"
    runs.mkdir()
    credentials = victim.cluster.cluster.admin_credentials()
    with namespace(Kube(credentials), name):
        history, creator = History(credentials, name), Creator(credentials, name)
        try:
            yield Scene(victim=victim, namespace=name, history=history, creator=creator, runs=runs)
        finally:
            creator.close()
            history.close()


@contextmanager
def namespace(kube: Kube, name: str) -> Iterator[None]:
    # Each pod counts its runs in a folder of this machine.
    kube.create("/api/v1/namespaces", namespace_object(name, pod_security="privileged"))
    deadline = time.monotonic() + SERVICE_ACCOUNT_SECONDS
    while kube.find(api_path("serviceaccounts", "default", namespace=name)) is None:
        assert time.monotonic() < deadline, "the namespace got no ServiceAccount"
        time.sleep(0.1)
    try:
        yield
    finally:
        kube.delete(api_path("namespaces", name))
        kube.close()


def expected_ends(lives: dict[str, Life]) -> dict[str, str]:
    """Names of those that ended otherwise than their guests did, and how."""
    wrong = {}
    for name, life in lives.items():
        failing = int(name.rpartition("-")[2]) % 5 == 3
        if life.phase != ("Failed" if failing else "Succeeded"):
            wrong[name] = life.phase
        elif life.ended and set(life.ended.values()) != {3 if failing else 0}:
            wrong[name] = f"exit codes {life.ended}"
    return wrong


def test_an_agent_that_is_killed_again_and_again_loses_nothing(victim: Victim, scene: Scene) -> None:
    lives = scene.churned(lambda: victim.kill(f"node-{victim.node}"))
    assert not expected_ends(lives)


def test_an_api_server_that_is_killed_loses_nothing(victim: Victim, scene: Scene) -> None:
    lives = scene.churned(lambda: victim.kill("kube-apiserver"), rounds=2)
    assert not expected_ends(lives)


def test_an_etcd_that_is_restarted_loses_nothing(victim: Victim, scene: Scene) -> None:
    lives = scene.churned(lambda: victim.kill("etcd", signal.SIGTERM), rounds=1)
    assert not expected_ends(lives)


def test_a_supervisor_that_is_killed_takes_its_containers_along_and_nothing_else(victim: Victim, scene: Scene) -> None:
    """What ran ended with it, and is told so; what comes later runs."""
    lives = scene.churned(victim.kill_supervisor)
    for name, life in lives.items():
        codes = set(life.ended.values())
        assert life.phase in {"Succeeded", "Failed"}, f"{name} is {life.phase}"
        assert codes <= {0, 3, 137, 128}, f"{name} ended with {codes}"


def test_a_registry_that_comes_back_is_pulled_from(victim: Victim, scene: Scene) -> None:
    fresh = victim.guests.add_wat("fresh", '(module (memory (export "memory") 1) (func (export "_start")))')
    victim.kill("registry")
    uid = scene.creator.create([counting_pod("waits", fresh, scene.runs, "")])[0]
    time.sleep(PAUSE_SECONDS)
    victim.repair()
    scene.history.wait(
        lambda h: uid in h.lives and h.lives[uid].phase == "Succeeded", within=60, what="the pod has run after all"
    )
    assert not scene.history.violations


def test_nothing_of_all_this_is_left_on_the_node(victim: Victim) -> None:
    deadline = time.monotonic() + 60
    while any((remains := footprint(victim.cluster.status()["nodes"][0]).remains()).values()):
        assert time.monotonic() < deadline, f"left behind: {remains}"
        time.sleep(0.5)
