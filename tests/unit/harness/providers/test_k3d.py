"""k3d as it is: what it makes besides nodes, what it leaves when it is interrupted, and whose a cluster is."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.cluster.down import down
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.up import up
from wasilet.errors import CommandError, UsageError
from wasilet.providers.base import API_SERVER_STEP, Cluster
from wasilet.providers.docker import Docker
from wasilet.providers.existing_base import HalfMadeError, StoppedError
from wasilet.providers.existing_facts import facts, update_facts
from wasilet.providers.k3d import K3dProvider, first_error, user_k3d
from wasilet.providers.k3s_config import egress_disabled, registries_with
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Play, SilentReporter, Status

from tests.rigs.standins.interruption import interrupt
from tests.rigs.standins.settings import ADMIN, standin_settings
from tests.rigs.standins.world import World

pytestmark = pytest.mark.unit

LABEL = "k3d.cluster"


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "machine")
    made.folder.mkdir()
    (tmp_path / "admin").write_text(ADMIN)
    made.configure(gateway="127.0.0.1", kubeconfig=str(tmp_path / "admin"))
    # What has nothing to do with the cluster, and must be there at the end.
    made.write("networks", [{"id": "other", "name": "k3d-unit-two", "labels": {"app": "k3d"}}])
    made.write("volumes", [{"name": "k3d-unit-two-images", "labels": {LABEL: "unit-two"}}])
    return made


@pytest.fixture
def settings(world: World, tmp_path: Path) -> Settings:
    return standin_settings(world, tmp_path, "k3d", "docker", "k3d")


@pytest.fixture
def cluster(settings: Settings) -> Iterator[Cluster]:
    with opened(settings) as made:
        yield made


def opened(settings: Settings) -> Cluster:
    made = open_cluster(settings)
    made.state.update(provider="k3d", ports={"registry": 5000, "apiserver": 6443})
    # Another test, which runs beside this one, ends what carries its own run id.
    made.state.run_id()
    return made


def nothing(_: str) -> None:
    """No progress is shown."""


def names(world: World) -> list[str]:
    return [container["name"] for container in world.containers()]


def assert_nothing_is_left(world: World) -> None:
    assert names(world) == []
    assert [network["name"] for network in world.read("networks", [])] == ["k3d-unit-two"]
    assert [volume["name"] for volume in world.read("volumes", [])] == ["k3d-unit-two-images"]


# --- interrupted -----------------------------------------------------------------------------------------------------

PHASES = ("network", "volume", "tools", "server", "balancer", "helper gone", "started")
"""Of ``k3d cluster create``, one after another."""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
@pytest.mark.parametrize("phase", PHASES)
def test_whenever_up_is_interrupted_down_leaves_nothing(
    world: World, settings: Settings, phase: str, signum: signal.Signals
) -> None:
    interrupt(world, settings, phase, signum)
    recap = down(settings, reporter=SilentReporter(), purge=True)
    assert [outcome.detail for outcome in recap.failures] == []
    assert_nothing_is_left(world)
    assert not State.of(settings).path.exists()


def test_a_container_that_comes_late_is_deleted_too(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine goes on with what it was asked for, when the tool that asked has been ended."""
    update_facts(cluster, creating="2026-01-01T00:00:00Z", ids=[], before={"networks": [], "volumes": []})

    def comes_late() -> None:
        add_node(world, "k3d-unit-tools", "noRole", created="2026-02-01T00:00:00.000000001Z")

    # What is called between the first look, which finds nothing, and the pause before the second.
    monkeypatch.setattr("wasilet.providers.docker_base.check_cancelled", comes_late)
    K3dProvider().destroy(cluster)
    assert_nothing_is_left(world)


@pytest.mark.parametrize("phase", ["network", "tools", "balancer"])
def test_up_makes_another_one_after_an_interrupted_one(world: World, settings: Settings, phase: str) -> None:
    interrupt(world, settings, phase, signal.SIGKILL)
    with opened(settings) as cluster:
        (step,) = [step for step in cluster.provider.create_steps(cluster) if step.key == API_SERVER_STEP]
        recap = Play("up", [replace(step, after=())]).run()
        # The stand-in's cluster has no API server.
        assert [outcome.detail.endswith("for 0.5 s") for outcome in recap.failures] == [True]
        server = next(c for c in world.containers(LABEL, "unit") if c["labels"]["k3d.role"] == "server")
        # A network that was left would have been taken for somebody else's.
        assert server["labels"]["k3d.cluster.network.external"] == "false"
    assert down(settings, reporter=SilentReporter(), purge=True).succeeded
    assert_nothing_is_left(world)


def test_a_network_that_was_there_before_stays(world: World, cluster: Cluster) -> None:
    with world.changing("networks", []) as networks:
        networks.append({"id": "users", "name": "k3d-unit", "labels": {"app": "k3d"}})
    provider = K3dProvider()
    update_facts(cluster, creating="2026-01-01T00:00:00Z")
    provider.create(cluster, nothing)
    assert provider.destroy(cluster) == "k3d cluster unit deleted"
    assert {network["id"] for network in world.read("networks", [])} == {"users", "other"}
    assert names(world) == []


def test_a_failed_creation_says_why_and_not_that_it_was_rolled_back(world: World, cluster: Cluster) -> None:
    world.configure(k3d_fails="Node k3d-unit-server-0 failed to get ready")
    with pytest.raises(CommandError) as caught:
        K3dProvider().create(cluster, nothing)
    assert caught.value.message == (
        "k3d cluster create failed with exit code 1: Failed Cluster Start: Node k3d-unit-server-0 failed to get ready"
    )
    assert "\x1b" not in json.dumps(caught.value.tail)
    assert "\\u001b" not in json.dumps(caught.value.tail)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["INFO[0000] Prep", "ERRO[0001] why", "FATA[0001] rolled back"], "why"),
        (["FATA[0000] No nodes found for cluster 'x'"], "No nodes found for cluster 'x'"),
        (['time="2026-01-01T00:00:00Z" level=fatal msg="why"'], "why"),
        (["Error: unknown flag: --x"], None),
    ],
)
def test_the_headline_of_a_failure(lines: list[str], expected: str | None) -> None:
    assert first_error(lines) == expected


# --- whose it is -----------------------------------------------------------------------------------------------------


def created(world: World, cluster: Cluster) -> list[str]:
    update_facts(cluster, creating="2026-01-01T00:00:00Z")
    found = K3dProvider().create(cluster, nothing)
    update_facts(cluster, creating=None, created=True, ids=list(found.ids), registry_address="127.0.0.1")
    return list(found.ids)


def add_node(world: World, name: str, role: str = "agent", **more: Any) -> None:
    labels = {"app": "k3d", LABEL: "unit", "k3d.role": role, "k3d.cluster.network": "k3d-unit"}
    world.add_container(id=f"id-of-{name}", name=name, labels=labels, gateway="127.0.0.1", network="k3d-unit", **more)


def test_a_node_that_the_user_adds_does_not_make_it_anothers(world: World, cluster: Cluster) -> None:
    created(world, cluster)
    add_node(world, "k3d-more-0")
    found = K3dProvider().find(cluster)
    assert found is not None
    assert found.created
    assert "id-of-k3d-more-0" in found.ids
    assert K3dProvider().destroy(cluster) == "k3d cluster unit deleted"
    assert_nothing_is_left(world)


def test_it_is_known_by_its_label_when_no_id_was_written_down(world: World, cluster: Cluster) -> None:
    created(world, cluster)
    update_facts(cluster, created=False, creating="2099-01-01T00:00:00Z", ids=[])
    assert K3dProvider().destroy(cluster) == "k3d cluster unit deleted"


def test_one_that_the_user_made_after_an_interrupted_run_stays(world: World, cluster: Cluster) -> None:
    update_facts(cluster, creating="2026-01-01T00:00:00Z", ids=[], before={"networks": [], "volumes": []})
    add_node(world, "k3d-unit-server-0", "server", created="2026-02-01T00:00:00.000000001Z")
    assert K3dProvider().destroy(cluster) == "k3d cluster unit is another one by now, and stays"
    assert names(world) == ["k3d-unit-server-0"]


def test_the_helper_is_no_part_of_the_cluster(world: World, cluster: Cluster) -> None:
    ids = created(world, cluster)
    add_node(world, "k3d-unit-tools", "noRole", running=False)
    found = K3dProvider().find(cluster)
    assert found is not None
    assert sorted(found.ids) == sorted(ids)


def test_one_that_lost_its_server_is_made_again(world: World, cluster: Cluster) -> None:
    created(world, cluster)
    world.remove_containers("k3d.role", "server")
    with pytest.raises(HalfMadeError, match="has lost its control plane"):
        K3dProvider().find(cluster)


# --- stopped and started ---------------------------------------------------------------------------------------------


def test_check_of_a_stopped_cluster_is_a_difference(world: World, settings: Settings) -> None:
    with opened(settings) as cluster:
        created(world, cluster)
        update_facts(cluster, uid="1", server="https://127.0.0.1:1", node_address="127.0.0.1")
        cluster.state.admin_kubeconfig.write_text(ADMIN)
        world.set_running(LABEL, "unit", running=False)
        with pytest.raises(StoppedError):
            K3dProvider().find(cluster)
    recap = up(settings, reporter=SilentReporter(), check=True)
    assert [(outcome.name, outcome.detail) for outcome in recap.failures] == []
    assert world.calls("k3d", "cluster", "start") == []


def test_a_name_that_a_restart_dropped_is_given_back(world: World, cluster: Cluster) -> None:
    created(world, cluster)
    (step,) = K3dProvider().registry_steps(cluster)
    assert step.look().status is Status.OK
    world.set_running(LABEL, "unit", running=True)  # as `docker restart` does
    assert step.look().detail == "give 1 nodes the name host.k3d.internal back"
    step.change(nothing)
    assert step.look().status is Status.OK
    server = next(c for c in world.containers(LABEL, "unit") if c["labels"]["k3d.role"] == "server")
    assert world.hosts(server["id"]).read_text().splitlines() == ["127.0.0.1\tlocalhost", "127.0.0.1 host.k3d.internal"]


def test_a_name_that_leads_elsewhere_does_not_count(world: World, cluster: Cluster) -> None:
    created(world, cluster)
    server = next(c for c in world.containers(LABEL, "unit") if c["labels"]["k3d.role"] == "server")
    world.write_hosts(server["id"], "192.0.2.1 host.k3d.internal", "#127.0.0.1 host.k3d.internal")
    (step,) = K3dProvider().registry_steps(cluster)
    assert step.look().status is Status.CHANGED


# --- before anything is changed --------------------------------------------------------------------------------------


def test_a_name_that_k3d_refuses_is_refused_first(world: World, tmp_path: Path) -> None:
    settings = standin_settings(world, tmp_path, "k3d", "docker", "k3d", name="a" * 33)
    with pytest.raises(UsageError, match="is no name for a k3d cluster: 33 characters") as caught:
        up(settings, reporter=SilentReporter())
    assert "32 at most" in caught.value.hint
    assert world.calls("k3d") == world.calls("docker") == []
    assert not State.of(settings).path.exists()
    longest = standin_settings(world, tmp_path, "k3d", "docker", "k3d", name="a" * 32)
    assert K3dProvider().detect(longest).usable


@pytest.mark.parametrize(
    ("told", "version"),
    [("v5.8.3", "5.8.3"), ("v5-dev", "5-dev"), ("v5.9.0-rc.1", "5.9.0-rc.1"), ("v6", "6"), ("v5.0.0", "5.0.0")],
)
def test_versions_that_are_taken(world: World, settings: Settings, told: str, version: str) -> None:
    world.configure(k3d_version=told)
    assert user_k3d(settings)[1] == version


@pytest.mark.parametrize(
    ("told", "message"),
    [("v4.4.8", "is k3d 4.4.8, and 5.0 or newer is needed"), ("v4-dev", "is k3d 4-dev"), ("?", "does not tell")],
)
def test_versions_that_are_refused(world: World, settings: Settings, told: str, message: str) -> None:
    world.configure(k3d_version=told)
    with pytest.raises(UsageError, match=message):
        user_k3d(settings)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["embedded", "file", "none"])
def test_the_users_registries_are_kept(world: World, tmp_path: Path, way: str) -> None:
    theirs = {
        "mirrors": {"docker.io": {"endpoint": ["https://mirror.example"]}},
        "configs": {"r": {"auth": {"username": "${WHO}"}}},
    }
    (tmp_path / "registries.yaml").write_text(yaml.safe_dump(theirs))
    config: dict[str, Any] = {"apiVersion": "k3d.io/v1alpha5", "kind": "Simple"}
    if way != "none":
        text = yaml.safe_dump(theirs) if way == "embedded" else str(tmp_path / "registries.yaml")
        config["registries"] = {"config": text}
    (tmp_path / "k3d.yaml").write_text(yaml.safe_dump(config))
    environment = {"WHO": "me"}
    settings = standin_settings(
        world, tmp_path, "k3d", "docker", "k3d", config=str(tmp_path / "k3d.yaml"), environment=environment
    )
    with opened(settings) as cluster:
        created(world, cluster)
        found = world.read("registries", {})
        port = cluster.ports()["registry_for_nodes"]
        assert found["mirrors"].pop("localhost:5000") == {"endpoint": [f"http://host.k3d.internal:{port}"]}
        if way == "embedded":  # k3d expands variables in its own file alone
            theirs["configs"] = {"r": {"auth": {"username": "me"}}}
        assert found == ({"mirrors": {}} if way == "none" else theirs)
        assert (cluster.state.etc / "registries.yaml").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("registries", "message"),
    [
        ({"config": "nowhere.yaml"}, "cannot read .*nowhere.yaml"),
        ({"config": ["a"]}, "must be a text or a path, not list"),
        ({"config": "- a\n- b\n"}, "is no mapping"),
        ({"config": "mirrors: [\n"}, "registries.config is not YAML"),
        ({"config": "mirrors:\n- a\n"}, "no mapping under mirrors"),
    ],
)
def test_registries_that_cannot_be_kept_are_refused(tmp_path: Path, registries: Any, message: str) -> None:
    config = tmp_path / "k3d.yaml"
    config.write_text(yaml.safe_dump({"registries": registries}))
    with pytest.raises(UsageError, match=message):
        registries_with("localhost:5000", "http://x:1", config=config, environ={})


@pytest.mark.parametrize(
    ("args", "files", "environment", "expected"),
    [
        (["--egress-selector-mode=disabled"], {}, [], True),
        (["--egress-selector-mode", "disabled"], {}, [], True),
        (["-egress-selector-mode=disabled"], {}, [], True),
        (["--egress-selector-mode=disabled", "--egress-selector-mode=agent"], {}, [], False),
        ([], {}, [], False),
        ([], {"config.yaml": "disabled"}, [], True),
        ([], {"config.yaml.d/10-net.yaml": "disabled"}, [], True),
        ([], {"config.yaml.d/10-net.yml": "disabled"}, [], True),
        ([], {"config.yaml.d/10-net.json": "disabled"}, [], False),
        ([], {"config.yaml": "disabled", "config.yaml.d/10.yaml": "agent"}, [], False),
        ([], {"config.yaml.d/10.yaml": "agent", "config.yaml.d/20.yaml": "disabled"}, [], True),
        (["--egress-selector-mode=agent"], {"config.yaml": "disabled"}, [], False),
        (["--config", "/etc/rancher/k3s/mine.yaml"], {"mine.yaml": "disabled"}, [], True),
        (["--config=/etc/rancher/k3s/mine.yaml"], {"mine.yaml.d/1.yaml": "disabled"}, [], True),
        ([], {"mine.yaml": "disabled"}, ["K3S_CONFIG_FILE=/etc/rancher/k3s/mine.yaml"], True),
    ],
)
def test_where_k3s_may_be_told_to_reach_nodes_itself(
    world: World, settings: Settings, args: list[str], files: dict[str, str], environment: list[str], *, expected: bool
) -> None:
    add_node(world, "k3d-unit-server-0", "server", args=["server", *args], environment=environment)
    for name, mode in files.items():
        path = world.folder / "files/id-of-k3d-unit-server-0/etc/rancher/k3s" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"egress-selector-mode: {mode}\n")
    docker = Docker(settings.environ)
    (server,) = docker.containers(f"{LABEL}=unit")
    assert egress_disabled(docker, server) is expected


def test_what_was_made_is_written_down_as_it_appears(world: World, cluster: Cluster) -> None:
    provider = K3dProvider()
    add_node(world, "k3d-unit-tools", "noRole")
    provider.note_containers(cluster)
    assert facts(cluster).ids == ()
    add_node(world, "k3d-unit-server-0", "server")
    provider.note_containers(cluster)
    add_node(world, "k3d-unit-serverlb", "loadbalancer")
    provider.note_containers(cluster)
    assert facts(cluster).ids == ("id-of-k3d-unit-server-0", "id-of-k3d-unit-serverlb")
