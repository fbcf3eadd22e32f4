"""What a user of kind may do wrong, or find broken: one clear line each, and nothing is changed. With stand-ins."""

from __future__ import annotations

import io
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.cluster.down import down
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.up import up
from wasilet.console import PlainReporter
from wasilet.errors import UsageError
from wasilet.process import stop
from wasilet.providers.base import Cluster
from wasilet.providers.docker import is_local
from wasilet.providers.existing_base import StoppedError
from wasilet.providers.existing_facts import made_since, update_facts
from wasilet.providers.kind import KindProvider, first_error, node_image
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Recap, SilentReporter

from tests.rigs.standins.settings import ADMIN, standin_settings
from tests.rigs.standins.world import ROOT, World

pytestmark = pytest.mark.unit

PORTS = {"registry": 5000, "registry_for_nodes": 5001}


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "machine")
    made.folder.mkdir()
    made.configure(gateway="127.0.0.1")
    return made


@pytest.fixture
def settings(world: World, tmp_path: Path) -> Iterator[Settings]:
    made = settings_with(world, tmp_path, "docker", "kind")
    yield made
    # A failed `up` leaves what it started for `down`, or the next `up`.
    stop([record.process for record in State.of(made).records()], grace_seconds=2)


def settings_with(world: World, folder: Path, *tools: str, **given: Any) -> Settings:
    return standin_settings(world, folder, "kind", *tools, **given)


@pytest.fixture
def cluster(settings: Settings) -> Iterator[Cluster]:
    with open_cluster(settings) as made:
        yield made


def refused(settings: Settings) -> UsageError:
    with pytest.raises(UsageError) as caught:
        up(settings, reporter=SilentReporter())
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    assert not State.of(settings).path.exists()
    return caught.value


def failed(settings: Settings) -> Recap:
    return up(settings, reporter=PlainReporter(io.StringIO()))


def test_no_docker(world: World, tmp_path: Path) -> None:
    error = refused(settings_with(world, tmp_path, "kind"))
    assert error.message == "the program docker is not installed, or not on PATH"


def test_docker_that_does_not_run(world: World, settings: Settings) -> None:
    world.configure(docker="stopped")
    error = refused(settings)
    assert error.message == "Docker is not running"
    assert "systemctl start docker" in error.hint


def test_no_right_to_dockers_socket(world: World, settings: Settings) -> None:
    world.configure(docker="denied")
    error = refused(settings)
    assert error.message == "this user has no right to Docker's socket"
    assert "usermod -aG docker" in error.hint


def test_docker_that_hangs_is_given_up_on(world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wasilet.providers.docker.ASK_SECONDS", 1.0)
    world.configure(docker="hangs")
    from wasilet.errors import CommandError
    from wasilet.providers.docker import Docker, no_engine

    with pytest.raises(CommandError) as caught:
        Docker(settings.environ).run("version", timeout_seconds=1.0)
    assert no_engine(caught.value).message.startswith("Docker gives no answer")


@pytest.mark.parametrize("version", ["0.17.0", "0.26.9"])
def test_an_old_kind_is_refused_by_its_version(world: World, settings: Settings, version: str) -> None:
    world.configure(kind_version=version)
    error = refused(settings)
    assert f"is kind v{version}, and 0.27 or newer is needed" in error.message


def test_a_name_that_is_too_long_for_its_nodes_is_refused(world: World, tmp_path: Path) -> None:
    error = refused(settings_with(world, tmp_path, "docker", "kind", name="a" * 50))
    assert error.message == f"{'a' * 50!r} is no name for a kind cluster: 50 characters"
    assert world.calls("kind") == world.calls("docker") == []


def test_check_of_a_stopped_cluster_is_a_difference(world: World, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    world.configure(kubeconfig=str(tmp_path / "admin"))
    theirs(world, running=False)
    with open_cluster(settings) as cluster:
        cluster.state.update(provider="kind", run_id=uuid.uuid4().hex, ports=PORTS)
        update_facts(cluster, created=True, ids=["theirs"], uid="1", server="https://127.0.0.1:1")
        update_facts(cluster, node_address="127.0.0.1", registry_address="127.0.0.1")
        cluster.state.admin_kubeconfig.write_text(ADMIN)
    recap = up(settings, reporter=SilentReporter(), check=True)
    assert [(outcome.name, outcome.detail) for outcome in recap.failures] == []


def test_the_first_error_is_the_headline() -> None:
    lines = [" x Preparing nodes", "ERROR: failed to create cluster: no space", "Command Output: more", ""]
    assert first_error(lines) == "failed to create cluster: no space"
    assert first_error(["only this"]) is None


def test_the_task_ends_with_exit_code_2_and_one_line(world: World, settings: Settings) -> None:
    world.configure(docker="stopped")
    command = [sys.executable, "-P", "-m", "invoke", "up", "--provider", "kind", "--name", "unit"]
    done = subprocess.run(
        command, env=dict(settings.environ), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: Docker is not running (sudo systemctl start docker, or set DOCKER_HOST)"
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": "x", "kubernetes_version": "1.34.4"}, "both say which version"),
        ({"kubernetes_version": "1.34"}, "is no version of Kubernetes"),
        ({"config": "/nowhere/kind.yaml"}, "there is no file"),
    ],
)
def test_options_that_make_no_sense(world: World, tmp_path: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_with(world, tmp_path, "docker", "kind", **given)


def test_an_option_of_another_provider_is_refused_not_ignored(world: World, tmp_path: Path) -> None:
    error = refused(settings_with(world, tmp_path, "docker", "kind", context="prod"))
    assert error.message == "--context means nothing to provider 'kind'"


def test_a_version_names_kinds_own_image(settings: Settings) -> None:
    assert node_image(replace(settings, kubernetes_version="1.33.1")) == "kindest/node:v1.33.1"
    assert node_image(replace(settings, kubernetes_version="v1.33.1")) == "kindest/node:v1.33.1"
    assert node_image(settings) == ""


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        (["control-plane"], 1),
        (["control-plane", "worker", "worker"], 3),
        # Two control planes have a balancer before them, which runs no pods and has no containerd.
        (["control-plane", "control-plane", "worker"], 3),
    ],
)
def test_every_node_of_a_configuration_is_told_of_the_registry(
    world: World, tmp_path: Path, roles: list[str], told: int
) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    world.configure(kubeconfig=str(tmp_path / "admin"))
    config = tmp_path / "kind.yaml"
    config.write_text(yaml.safe_dump({"kind": "Cluster", "nodes": [{"role": role} for role in roles]}))
    with open_cluster(settings_with(world, tmp_path, "docker", "kind", config=str(config))) as cluster:
        cluster.state.update(provider="kind", run_id=uuid.uuid4().hex, ports=PORTS)
        provider = KindProvider()
        found = provider.create(cluster, say=lambda _: None)
        assert len(found.ids) == len(roles) + (roles.count("control-plane") > 1)
        update_facts(cluster, created=True, ids=list(found.ids), registry_address="127.0.0.1")
        (step,) = provider.registry_steps(cluster)
        assert step.look().detail == f"tell {told} nodes where it is"
        step.change(lambda _: None)
        assert step.look().detail == "known to each node"
        assert len(list((world.folder / "files").glob("*/etc/containerd/certs.d/localhost:5000/hosts.toml"))) == told
        provider.unwire(cluster)
        assert not list((world.folder / "files").glob("*/etc/containerd/certs.d/localhost:5000"))


# --- ownership -------------------------------------------------------------------------------------------------------


def theirs(world: World, **changed: Any) -> None:
    container = {
        "id": "theirs",
        "name": "unit-control-plane",
        "labels": {"io.x-k8s.kind.cluster": "unit", "io.x-k8s.kind.role": "control-plane"},
        "gateway": "127.0.0.1",
    }
    world.add_container(**container | changed)


def test_a_half_made_cluster_of_somebody_else_is_named_and_left_alone(world: World, cluster: Cluster) -> None:
    theirs(world)
    with pytest.raises(UsageError, match="has no working control plane, and was not made here") as caught:
        KindProvider().find(cluster)
    assert "kind delete cluster --name unit" in caught.value.hint
    assert world.calls("kind", "delete") == []


def test_a_stopped_cluster_of_somebody_else_is_not_started(world: World, cluster: Cluster) -> None:
    theirs(world, running=False)
    with pytest.raises(UsageError, match="is stopped") as caught:
        KindProvider().find(cluster)
    assert caught.value.hint == "docker start unit-control-plane"


def test_a_stopped_cluster_of_ours_is_started_again(world: World, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    world.configure(kubeconfig=str(tmp_path / "admin"))
    theirs(world, running=False)
    update_facts(cluster, created=True, ids=["theirs"])
    with pytest.raises(StoppedError, match="is stopped"):
        KindProvider().find(cluster)
    assert world.calls("docker", "start") == []
    KindProvider().start(cluster, say=lambda _: None)
    found = KindProvider().find(cluster)
    assert found is not None
    assert found.created


def test_up_starts_a_stopped_cluster_of_ours_and_waits_for_it(world: World, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    world.configure(kubeconfig=str(tmp_path / "admin"))
    theirs(world, running=False)
    with open_cluster(settings) as cluster:
        cluster.state.update(provider="kind", run_id=uuid.uuid4().hex)
        update_facts(cluster, created=True, ids=["theirs"], uid="1", server="https://127.0.0.1:1")
    recap = up(settings, reporter=SilentReporter(), check=True)
    assert "is stopped; start it" in next(o.detail for o in recap.outcomes if o.name == "API server")
    assert world.calls("docker", "start") == []
    recap = failed(settings)
    assert [words[1:] for words in world.calls("docker", "start")] == [["start", "unit-control-plane"]]
    assert world.calls("kind", "create") == []
    (failure,) = recap.failures  # the stand-in's cluster has no API server
    assert (failure.name, failure.detail.endswith("for 0.5 s")) == ("API server", True)
    assert failure.hint.startswith("`invoke down --purge --name unit`")


def test_what_an_interrupted_run_left_is_deleted_and_made_again(world: World, settings: Settings) -> None:
    world.configure(kubeconfig="")
    theirs(world, id="half", created="2099-01-01T00:00:00.000000001Z")
    with open_cluster(settings) as cluster:
        cluster.state.update(provider="kind")
        update_facts(cluster, creating="2026-01-01T00:00:00Z", ids=[])
    recap = failed(settings)
    assert [words[1:3] for words in world.calls("kind") if words[1] in {"create", "delete"}] == [
        ["delete", "cluster"],
        ["create", "cluster"],
    ]
    assert not recap.succeeded  # the stand-in's cluster has no API server


def test_a_cluster_made_before_our_run_began_is_never_taken_for_ours(world: World, cluster: Cluster) -> None:
    theirs(world, created="2025-01-01T00:00:00.000000001Z")
    update_facts(cluster, creating="2026-01-01T00:00:00Z", ids=[])
    assert KindProvider().destroy(cluster) == "kind cluster unit is another one by now, and stays"
    assert world.calls("kind", "delete") == []


def test_a_cluster_that_was_made_again_by_hand_under_our_name_stays(world: World, cluster: Cluster) -> None:
    theirs(world)
    update_facts(cluster, created=True, ids=["ours"])
    assert "stays" in KindProvider().destroy(cluster)
    assert world.calls("kind", "delete") == []


def test_down_of_a_cluster_that_is_gone_already_succeeds(world: World, settings: Settings) -> None:
    with open_cluster(settings) as cluster:
        cluster.state.update(provider="kind", run_id=uuid.uuid4().hex)
        update_facts(cluster, created=True, ids=["ours"])
    recap = down(settings, reporter=SilentReporter(), purge=True)
    assert recap.succeeded
    assert not State.of(settings).path.exists()


def test_check_of_a_cluster_that_could_be_adopted_changes_nothing(
    world: World, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    world.configure(kubeconfig=str(tmp_path / "admin"))
    theirs(world)
    recap = up(settings, reporter=SilentReporter(), check=True)
    assert recap.succeeded
    assert "adopt the kind cluster unit" in next(o.detail for o in recap.outcomes if o.name == "API server")
    assert not State.of(settings).path.exists()


def test_check_changes_nothing(world: World, settings: Settings) -> None:
    recap = up(settings, reporter=SilentReporter(), check=True)
    assert recap.succeeded
    assert not State.of(settings).path.exists()
    assert {words[1] for words in world.calls("kind")} <= {"version", "get"}


# --- small parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("created", "since", "expected"),
    [
        ("2026-01-01T10:00:00.123456789Z", "2026-01-01T10:00:00Z", True),
        ("2026-01-01T09:59:50.1Z", "2026-01-01T10:00:00+00:00", False),
        ("2026-01-01T10:00:00Z", "2026-01-01T10:00:00.500000Z", True),
        ("nonsense", "2026-01-01T10:00:00Z", False),
        ("", "", False),
    ],
)
def test_instants_are_compared_as_docker_tells_them(created: str, since: str, *, expected: bool) -> None:
    assert made_since(created, since) is expected


def test_an_address_is_local_when_one_could_listen_there() -> None:
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.77")
    assert not is_local("no address")


def test_a_network_whose_gateway_is_elsewhere_asks_for_an_address(
    world: World, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "admin").write_text(ADMIN)
    world.configure(kubeconfig=str(tmp_path / "admin"))
    theirs(world, gateway="192.0.2.77")
    with pytest.raises(Exception, match="is no address of this machine") as caught:
        KindProvider().find(cluster)
    assert "--node-ip" in str(caught.value)
    given = replace(cluster.settings, node_ip="127.0.0.1")
    with open_cluster(given) as other:
        found = KindProvider().find(other)
    assert found is not None
    assert found.node_address == "127.0.0.1"
