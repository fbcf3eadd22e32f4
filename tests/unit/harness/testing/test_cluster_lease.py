"""Who uses a cluster, and what the last one leaves: with the real files, locks and processes, without a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wasilet.errors import HarnessError, UsageError
from wasilet.process import ProcessRecord, find
from wasilet.state import ComponentRecord, State
from wasilet.steps import Outcome, Recap, Status
from wasilet.testing import cluster as leases
from wasilet.testing.cluster import Users, Wish, join, leave, own_process

pytestmark = pytest.mark.unit


class Machine:
    """Stands in for ``up`` and ``down``: writes and removes what they would, and remembers that it was asked."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.asked: list[str] = []
        self.works = True

    @property
    def state(self) -> State:
        return State.of(self.wish.settings())

    def start(self) -> None:
        """A cluster that runs: this very process is its only component."""
        self.state.update(provider="host", run_id=self.state.run_id(), ports={"registry": 5000})
        me = find(os.getpid())
        assert me is not None
        self.state.remember(ComponentRecord("etcd", me, self.state.log("etcd"), ""))

    def up(self, _settings: Any, **_: Any) -> Recap:
        self.asked.append("up")
        if self.works:
            self.start()
            return Recap(title="up", outcomes=(), seconds=0)
        failed = Outcome(name="etcd", status=Status.FAILED, detail="no such file", error=HarnessError("no such file"))
        return Recap(title="up", outcomes=(failed,), seconds=0)

    def down(self, _settings: Any, *, purge: bool, **_: Any) -> Recap:
        self.asked.append("purge" if purge else "down")
        self.state.forget("etcd")
        if purge:
            self.state.remove()
        return Recap(title="down", outcomes=(), seconds=0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(Wish(environ={"WASILET_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}))
    monkeypatch.setattr("wasilet.cluster.up.up", made.up)
    monkeypatch.setattr("wasilet.cluster.down.down", made.down)
    monkeypatch.setattr(leases, "is_fit", lambda _: True)
    monkeypatch.setattr(leases, "opened", lambda _settings, _wish: Opened())
    return made


class Opened:
    """No cluster is behind it; namespaces of killed runs are asked for."""

    swept: list[str]

    class kube:  # noqa: N801  (an attribute of the real one)
        @staticmethod
        def get(*_: Any, **__: Any) -> dict[str, Any]:
            return {"items": []}


@pytest.fixture
def other() -> Iterator[ProcessRecord]:
    """Another living process of this machine, as another test run would be."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield own_process(process.pid)
    process.kill()
    process.communicate()


def me() -> ProcessRecord:
    return own_process(os.getpid())


def dead() -> ProcessRecord:
    return ProcessRecord(pid=2**22 - 1, start_time=1, boot_id=me().boot_id)


def test_a_cluster_that_was_not_there_is_stood_up_and_removed(machine: Machine) -> None:
    join(machine.wish, me())
    leave(machine.wish, me())
    assert machine.asked == ["up", "purge"]
    assert not Users.of(machine.wish.settings()).path.exists()


def test_a_running_cluster_is_used_and_left_alone(machine: Machine) -> None:
    machine.start()
    join(machine.wish, me())
    leave(machine.wish, me())
    assert machine.asked == []
    assert machine.state.exists()


def test_a_cluster_that_was_down_is_taken_down_again_but_keeps_what_it_kept(machine: Machine) -> None:
    machine.start()
    machine.state.forget("etcd")
    join(machine.wish, me())
    leave(machine.wish, me())
    assert machine.asked == ["up", "down"]
    assert machine.state.exists()


def test_the_last_of_two_runs_takes_it_down(machine: Machine, other: ProcessRecord) -> None:
    join(machine.wish, other)
    join(machine.wish, me())
    leave(machine.wish, other)
    assert machine.asked == ["up"]
    leave(machine.wish, me())
    assert machine.asked == ["up", "purge"]


def test_workers_of_one_run_count_once(machine: Machine) -> None:
    join(machine.wish, me())
    join(machine.wish, me())
    leave(machine.wish, me())
    assert machine.asked == ["up", "purge"]


def test_keep_leaves_it_and_says_how_to_end_it(machine: Machine) -> None:
    wish = Wish(environ=machine.wish.environ, keep=True)
    join(wish, me())
    assert "invoke down --purge" in leave(wish, me())
    assert machine.asked == ["up"]


def test_what_a_killed_run_stood_up_is_inherited_and_removed(machine: Machine) -> None:
    join(machine.wish, dead())
    join(machine.wish, me())
    leave(machine.wish, me())
    assert machine.asked == ["up", "purge"]


def test_a_killed_run_does_not_hold_the_cluster(machine: Machine) -> None:
    join(machine.wish, me())
    users = Users.of(machine.wish.settings())
    with users.locked() as data:
        users.write({**data, "users": [*data["users"], dead().to_json()]})
    leave(machine.wish, me())
    assert machine.asked == ["up", "purge"]


def test_a_cluster_made_again_since_a_run_was_killed_is_nobodys_to_remove(machine: Machine) -> None:
    join(machine.wish, dead())
    machine.state.remove()
    machine.start()
    join(machine.wish, me())
    leave(machine.wish, me())
    assert machine.asked == ["up"]


def test_leaving_without_having_joined_does_nothing(machine: Machine, other: ProcessRecord) -> None:
    join(machine.wish, other)
    assert leave(machine.wish, me()) == ""
    assert machine.asked == ["up"]


def test_a_failed_up_says_which_step_failed_and_what_to_type(machine: Machine) -> None:
    machine.works = False
    with pytest.raises(HarnessError, match="did not come up: etcd: no such file") as caught:
        join(machine.wish, me())
    assert "invoke doctor" in str(caught.value)
    leave(machine.wish, me())
    assert machine.asked == ["up", "purge"]


def test_a_damaged_file_makes_nothing_be_removed(machine: Machine) -> None:
    machine.start()
    users = Users.of(machine.wish.settings())
    users.path.write_text("{")
    join(machine.wish, me())
    leave(machine.wish, me())
    assert machine.asked == []


def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read kubeconfig"):
        join(Wish(kubeconfig=str(tmp_path / "none")), me())


def test_a_cluster_keeps_its_provider_unless_another_is_asked_for(machine: Machine) -> None:
    machine.state.update(provider="kind")
    assert machine.wish.settings().provider == "kind"
    assert Wish(provider="host", environ=machine.wish.environ).settings().provider == "host"


def test_a_running_cluster_of_another_provider_is_not_taken_for_the_one_asked_for(machine: Machine) -> None:
    machine.start()
    with pytest.raises(UsageError, match="is of provider 'host', not 'kind'"):
        join(replace(machine.wish, provider="kind"), me())
    assert machine.asked == []
    assert not Users.of(machine.wish.settings()).path.exists()
