"""Ending a cluster where something is in the way: what can be ended is ended all the same."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from wasilet.cluster.down import down
from wasilet.cluster.opening import open_cluster
from wasilet.console import PlainReporter
from wasilet.errors import StateError
from wasilet.process import is_alive, spawn, stop
from wasilet.providers.node_process import end_node
from wasilet.settings import Settings, load
from wasilet.state import ComponentRecord, State
from wasilet.steps import SilentReporter

pytestmark = pytest.mark.unit

USERS_FILE = "apiVersion: v1\nkind: Config\ncontexts: [{name: wasilet, context: {}}]\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = load(environ={"WASILET_STATE_HOME": str(tmp_path / "state"), "PATH": "/usr/bin:/bin"})
    (tmp_path / "config").write_text(USERS_FILE)
    recorded = {"path": str(tmp_path / "config"), "context": "wasilet", "server": "", "previous": "", "created": False}
    State.of(made).update(name=made.name, provider="host", nodes=1, run_id="r", kubeconfig=recorded)
    return made


@pytest.mark.parametrize("purge", [False, True])
def test_a_disk_that_is_full_keeps_no_process_alive(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    purge: bool,  # noqa: FBT001
) -> None:
    state = State.of(settings)
    process = spawn(["/bin/sleep", "60"], log=state.log("etcd"))

    def full(*_: object, **__: object) -> bool:
        raise StateError("cannot write the kubeconfig: the disk is full")

    monkeypatch.setattr("wasilet.kube.kubeconfig.remove", full)
    try:
        state.remember(ComponentRecord(name="etcd", process=process, log=state.log("etcd"), argv_digest=""))
        recap = down(settings, reporter=SilentReporter(), purge=purge)
        assert [failure.name for failure in recap.failures] == ["kubeconfig"]
        assert not is_alive(process)
        assert state.read()["kubeconfig"], "what has still to be taken out is not forgotten"
        monkeypatch.undo()
        assert down(settings, reporter=SilentReporter(), purge=True).succeeded
        assert not state.path.exists()
    finally:
        stop(process, grace_seconds=0)


def test_a_control_plane_that_is_deleted_is_not_asked_to_save_anything(settings: Settings) -> None:
    """A store that never answers SIGTERM, and a grace period that no one waits for."""
    state = State.of(settings)
    process = spawn(["/bin/sh", "-c", "trap '' TERM; exec sleep infinity"], log=state.log("etcd"))
    patient = replace(settings, timeouts=replace(settings.timeouts, stop_grace_seconds=3600.0))
    try:
        state.remember(ComponentRecord(name="etcd", process=process, log=state.log("etcd"), argv_digest=""))
        assert down(patient, reporter=SilentReporter(), purge=True).succeeded
        assert not is_alive(process)
    finally:
        stop(process, grace_seconds=0)


def test_who_waits_for_another_run_is_told_at_once_whom_for(settings: Settings) -> None:
    state, log = State.of(settings), io.StringIO()
    impatient = replace(settings, timeouts=replace(settings.timeouts, lock_seconds=0.3))
    with (
        state.locked(timeout_seconds=1, what="invoke up"),
        pytest.raises(StateError, match=rf"still locked by pid {os.getpid()} \(invoke up\)"),
    ):
        down(impatient, reporter=PlainReporter(log))
    assert log.getvalue() == f"waiting for pid {os.getpid()} (invoke up), which works on cluster 'wasilet'\n"


def test_a_node_is_ended_by_its_own_command(settings: Settings) -> None:
    """The module of that name must be there: what is not ended in an orderly way is ended without a word otherwise."""
    State.of(settings).node("wasilet-1").mkdir(parents=True)
    with open_cluster(settings) as cluster:
        assert end_node(cluster, "wasilet-1") == "ended"
