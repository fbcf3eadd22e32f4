"""A cluster's folder: atomic files, one lock, ports that do not clash, and clear words when it cannot be used."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wasilet import state as states
from wasilet.cluster_record import ClusterRecord, KubeconfigRecord, LeftOverRecord
from wasilet.errors import PortTakenError, StateError
from wasilet.ports import EVERYWHERE, port_is_free
from wasilet.process import ProcessRecord, spawn, stop
from wasilet.state import RUN_ID_VARIABLE, ComponentRecord, State, clusters
from wasilet.storage import read_json, write_file, write_json

pytestmark = pytest.mark.unit


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state", "wasilet")


def test_nothing_is_there_before_it_is_made(state: State) -> None:
    assert not state.exists()
    assert state.read() == {}
    assert state.records() == []
    assert not state.path.exists()


def test_everything_is_private(state: State) -> None:
    state.update(a=1)
    assert state.path.stat().st_mode & 0o777 == 0o700
    assert (state.path / "cluster.json").stat().st_mode & 0o777 == 0o600
    assert clusters(state.root) == ["wasilet"]


def test_updates_are_merged_and_the_run_id_stays(state: State) -> None:
    state.update(a=1)
    state.update(b=2)
    run_id = state.run_id()
    assert len(run_id) == 32
    assert state.run_id() == run_id
    assert state.read() == {"a": 1, "b": 2, "run_id": run_id}


def test_the_record_is_typed_and_follows_every_write_of_anybody(state: State) -> None:
    assert state.cluster == ClusterRecord()
    state.update(provider="kind", nodes=2, ports={"registry": 5000}, created_objects=["ClusterRole/x"])
    state.update(kubeconfig=KubeconfigRecord(path=Path("/kc"), context="wasilet", previous="prod").to_json())
    assert state.cluster == ClusterRecord(
        provider="kind",
        nodes=2,
        ports={"registry": 5000},
        created_objects=("ClusterRole/x",),
        kubeconfig=KubeconfigRecord(path=Path("/kc"), context="wasilet", previous="prod"),
    )
    State(state.root, state.name).update(nodes=3)
    assert state.cluster.nodes == 3
    assert read_json(state.path / "cluster.json")["version"] == 1
    state.remove()
    assert state.cluster == ClusterRecord()


def test_the_file_is_parsed_once_as_long_as_nobody_writes_it(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.update(nodes=2)
    assert state.cluster.nodes == 2
    monkeypatch.setattr("wasilet.storage.read_json", lambda _: pytest.fail("read again"))
    assert (state.cluster.nodes, state.read()) == (2, {"nodes": 2})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"version": 2}', "written by a newer Wasilet"),
        ('{"version": "x"}', "written by a newer Wasilet"),
        ('{"nodes": "two"}', "damaged: nodes"),
        ('{"kubeconfig": {"path": 7}}', "damaged: kubeconfig"),
        ('{"kubeconfig": []}', None),
        ('{"client_configs": {"a": "b"}}', "damaged: client_configs"),
        ('{"ports": []}', "damaged: ports"),
        ('{"what a later version added": 1}', None),
    ],
)
def test_a_record_that_is_not_as_it_should_be_is_named(state: State, text: str, expected: str | None) -> None:
    state.create()
    (state.path / "cluster.json").write_text(text)
    if expected is None:
        assert state.cluster == ClusterRecord()
    else:
        with pytest.raises(StateError, match=expected):
            _ = state.cluster


def test_proxies_of_an_older_files_name_are_known_until_new_ones_are_written(state: State) -> None:
    state.create()
    write_json(state.path / "cluster.json", {"name": "t", "doors": {"apiserver-door": "192.0.2.1"}})
    assert state.cluster.proxies == {"apiserver-door": "192.0.2.1"}
    state.update(proxies={"registry-door": "192.0.2.2"})
    assert state.cluster.proxies == {"registry-door": "192.0.2.2"}


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.update(a=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StateError, match="the disk is full"):
        state.update(a=2)
    monkeypatch.undo()
    assert state.read() == {"a": 1}
    assert sorted(p.name for p in state.path.iterdir()) == ["cluster.json", "etc", "logs", "pki", "run"]


def test_a_full_disk_is_one_clear_line() -> None:
    with pytest.raises(StateError, match="the disk is full") as caught:
        write_file_to_full_disk()
    assert "free some space" in caught.value.hint


def test_the_lock_is_held_on_a_full_disk_too(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    state.create()
    monkeypatch.setattr(os, "pwrite", full)
    with (
        state.locked(timeout_seconds=1, what="invoke down"),
        pytest.raises(StateError, match="is still locked by another run"),
        state.locked(timeout_seconds=0),
    ):
        pytest.fail("two have it")


def write_file_to_full_disk() -> None:
    from wasilet.storage import storage_errors

    with storage_errors(Path("/dev/full")), open("/dev/full", "wb", buffering=0) as file:  # noqa: PTH123
        file.write(b"x")


def test_a_file_in_a_folder_that_is_not_there_is_named_as_it_was_typed(tmp_path: Path) -> None:
    with pytest.raises(StateError) as caught:
        write_file(tmp_path / "nowhere" / "bootstrap.conf", b"")
    assert str(caught.value) == f"cannot write {tmp_path}/nowhere/bootstrap.conf: No such file or directory"


def test_a_state_root_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot write") as caught:
        State(tmp_path / "file" / "state", "wasilet").create()
    assert "WASILET_STATE_HOME" in caught.value.hint


def test_damage_is_told_with_the_way_out(state: State) -> None:
    state.create()
    (state.path / "cluster.json").write_text("{half")
    with pytest.raises(StateError, match="is damaged"):
        state.read()
    (state.path / "cluster.json").write_text("[]")
    with pytest.raises(StateError, match="not a JSON object"):
        state.read()


def test_a_damaged_record_counts_as_none(state: State) -> None:
    state.create()
    (state.run / "etcd.json").write_text('{"process": {"pid": "x"}}')
    assert state.record("etcd") is None
    assert state.records() == []


def test_records_come_back_and_a_dead_process_is_not_alive(state: State, tmp_path: Path) -> None:
    record = ComponentRecord("etcd", ProcessRecord(2**22 + 1, 1, "boot"), tmp_path / "log", "digest")
    state.remember(record)
    assert state.record("etcd") == record
    assert state.alive("etcd") is None
    state.forget("etcd")
    assert state.record("etcd") is None


def test_what_was_started_but_not_written_down_is_found(state: State, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], RUN_ID_VARIABLE: state.run_id()}
    record = spawn(["sleep", "60"], log=tmp_path / "log", env=env)
    try:
        deadline = time.monotonic() + 5
        while not state.stray_processes() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state.stray_processes() == [record]
        assert State(state.root, "other").stray_processes() == []
    finally:
        stop(record, grace_seconds=0)


def test_the_lock_is_waited_for_and_its_holder_named(state: State) -> None:
    said: list[str] = []
    entered = threading.Event()
    with state.locked(timeout_seconds=1, what="first"):

        def second() -> None:
            with State(state.root, state.name).locked(timeout_seconds=10, say=said.append):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not entered.is_set()
    thread.join(5)
    assert entered.is_set()
    assert said == [f"waiting for pid {os.getpid()} (first), which works on cluster 'wasilet'"]


def test_a_lock_that_stays_is_an_error_that_names_its_holder(state: State) -> None:
    with (
        state.locked(timeout_seconds=1, what="invoke up"),
        pytest.raises(StateError, match=rf"locked by pid {os.getpid()} \(invoke up\)"),
        State(state.root, state.name).locked(timeout_seconds=0.2),
    ):
        pass


def test_a_killed_holder_holds_nothing(state: State) -> None:
    state.create()
    code = (
        "import sys,time; from pathlib import Path; from wasilet.state import State\n"
        "with State(Path(sys.argv[1]), 'wasilet').locked(timeout_seconds=1):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code, state.root], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.kill()
        holder.wait()
    with state.locked(timeout_seconds=2):
        pass


def test_a_removed_folder_does_not_strand_those_who_wait_for_its_lock(state: State) -> None:
    entered = threading.Event()
    with state.locked(timeout_seconds=1):

        def second() -> None:
            with State(state.root, state.name).locked(timeout_seconds=10):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.15)
        state.remove()
    thread.join(5)
    assert entered.is_set()


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_ports_are_remembered_and_never_shared(tmp_path: Path) -> None:
    one, two = State(tmp_path, "one"), State(tmp_path, "two")
    first = one.allocate_ports({"apiserver": 0, "etcd": 0})
    second = two.allocate_ports({"apiserver": 0, "etcd": 0})
    assert len({*first.values(), *second.values()}) == 4
    assert one.allocate_ports({"apiserver": 0, "etcd": 0}) == first


def test_a_wanted_port_is_taken_as_it_is(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert State(tmp_path, "one").allocate_ports({"apiserver": port}) == {"apiserver": port}
    with pytest.raises(PortTakenError, match="belongs to cluster 'one'"):
        State(tmp_path, "two").allocate_ports({"apiserver": port})


def test_a_busy_port_is_named_with_who_has_it(tmp_path: Path, busy_port: int) -> None:
    assert not port_is_free(busy_port)
    with pytest.raises(PortTakenError, match=rf"port {busy_port}.*pid {os.getpid()}"):
        State(tmp_path, "one").allocate_ports({"apiserver": busy_port})


@pytest.fixture
def port_busy_elsewhere() -> Iterator[int]:
    """Taken on one address that is not the one everybody looks at: as a kubelet's on the machine's own."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_that_is_chosen_has_no_listener_on_any_address(
    tmp_path: Path, port_busy_elsewhere: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert port_is_free(port_busy_elsewhere)
    monkeypatch.delenv("WASILET_STATE_HOME", raising=False)
    monkeypatch.setattr(states, "PREFERRED_PORTS", {"kubelet": port_busy_elsewhere})
    assert State(tmp_path, "wasilet").allocate_ports({"kubelet": 0})["kubelet"] != port_busy_elsewhere


def test_a_port_that_is_asked_for_must_be_free_where_it_is_used(tmp_path: Path, port_busy_elsewhere: int) -> None:
    state = State(tmp_path, "one")
    for addresses in (("127.0.0.2",), (EVERYWHERE,)):
        with pytest.raises(PortTakenError, match=rf"port {port_busy_elsewhere}, which kubelet needs, is taken by"):
            state.allocate_ports({"kubelet": port_busy_elsewhere}, addresses=addresses)
    assert state.allocate_ports({"etcd": port_busy_elsewhere}) == {"etcd": port_busy_elsewhere}


def test_one_port_cannot_be_asked_for_twice(tmp_path: Path, port_busy_elsewhere: int) -> None:
    with pytest.raises(PortTakenError, match="is asked for twice: etcd, registry"):
        State(tmp_path, "one").allocate_ports({"etcd": port_busy_elsewhere, "registry": port_busy_elsewhere})


def test_files_are_replaced_whole_with_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_file(path, b"one", mode=0o644)
    assert path.stat().st_mode & 0o777 == 0o644
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_what_a_provider_found_is_typed_and_an_older_file_lacks_nothing(state: State) -> None:
    assert not state.cluster.external.found
    state.update(external={"created": True, "creating": None, "ids": ["a"], "before": {"networks": ["k3d-t"]}})
    found = state.cluster.external
    assert (found.found, found.created, found.creating, found.ids) == (True, True, "", ("a",))
    assert found.before == LeftOverRecord(networks=("k3d-t",), volumes=())
    state.update(external={"before": "k3d-t"})
    with pytest.raises(StateError, match="is damaged: external"):
        _ = state.cluster
