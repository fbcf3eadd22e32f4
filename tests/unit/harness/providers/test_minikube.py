"""minikube as it is: when a profile is whole, what it says when it fails, and each of its nodes."""

from __future__ import annotations

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
from wasilet.errors import CommandError, HarnessError, UsageError
from wasilet.providers.base import API_SERVER_STEP, Cluster
from wasilet.providers.existing_base import HalfMadeError, StoppedError
from wasilet.providers.existing_facts import update_facts
from wasilet.providers.minikube import RESERVED_NAMES, MinikubeProvider, exit_line
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Play, SilentReporter, Status

from tests.rigs.standins.interruption import interrupt
from tests.rigs.standins.settings import ADMIN, standin_settings
from tests.rigs.standins.world import World

pytestmark = pytest.mark.unit


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "machine")
    made.folder.mkdir()
    (tmp_path / "admin").write_text(ADMIN)
    made.configure(gateway="127.0.0.1", kubeconfig=str(tmp_path / "admin"))
    made.write("profiles", {"other": {"Driver": "docker"}})
    return made


@pytest.fixture
def settings(world: World, tmp_path: Path) -> Settings:
    return standin_settings(world, tmp_path, "minikube", "minikube")


@pytest.fixture
def cluster(settings: Settings) -> Iterator[Cluster]:
    with opened(settings) as made:
        yield made


def opened(settings: Settings) -> Cluster:
    made = open_cluster(settings)
    made.state.update(provider="minikube", ports={"registry": 5000, "registry_for_nodes": 5001})
    # Another test, which runs beside this one, ends what carries its own run id.
    made.state.run_id()
    return made


def nothing(_: str) -> None:
    """No progress is shown."""


def created(cluster: Cluster) -> None:
    update_facts(cluster, creating="2026-01-01T00:00:00Z")
    found = MinikubeProvider().create(cluster, nothing)
    update_facts(cluster, creating=None, created=True, registry_address=found.registry_address)


# --- interrupted -----------------------------------------------------------------------------------------------------

PHASES = ("profile", "machine", "apiserver", "context")
"""Of ``minikube start``, one after another."""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
@pytest.mark.parametrize("phase", PHASES)
def test_whenever_up_is_interrupted_down_leaves_nothing(
    world: World, settings: Settings, phase: str, signum: signal.Signals
) -> None:
    interrupt(world, settings, phase, signum)
    recap = down(settings, reporter=SilentReporter(), purge=True)
    assert [outcome.detail for outcome in recap.failures] == []
    assert list(world.read("profiles", {})) == ["other"]
    assert not State.of(settings).path.exists()
    assert not Path(settings.environ["KUBECONFIG"]).exists()


@pytest.mark.parametrize("phase", PHASES[:3])
def test_a_profile_without_its_context_is_made_again(world: World, settings: Settings, phase: str) -> None:
    interrupt(world, settings, phase, signal.SIGKILL)
    with opened(settings) as cluster:
        with pytest.raises(HalfMadeError, match="an interrupted run left minikube profile unit half made"):
            MinikubeProvider().find(cluster)
        (step,) = [step for step in cluster.provider.create_steps(cluster) if step.key == API_SERVER_STEP]
        recap = Play("up", [replace(step, after=())]).run()
        # The stand-in's cluster has no API server.
        assert [outcome.detail.endswith("for 0.5 s") for outcome in recap.failures] == [True]
    assert [words[1] for words in world.calls("minikube") if words[1] in {"start", "delete"}] == [
        "start",
        "delete",
        "start",
    ]


def test_a_lost_context_of_ours_is_written_again_by_starting(world: World, cluster: Cluster) -> None:
    created(cluster)
    (cluster.state.etc / "minikube.conf").unlink()
    with pytest.raises(StoppedError, match="the context of minikube profile unit is lost"):
        MinikubeProvider().find(cluster)
    MinikubeProvider().start(cluster, nothing)
    found = MinikubeProvider().find(cluster)
    assert found is not None
    assert found.created


def test_a_lost_context_of_theirs_is_theirs_to_write(world: World, cluster: Cluster) -> None:
    world.write("profiles", {"unit": {"Driver": "docker"}})
    world.write("running", ["unit"])
    with pytest.raises(HarnessError, match="has no context unit") as caught:
        MinikubeProvider().find(cluster)
    assert caught.value.hint == "`minikube update-context -p unit` writes it again"


def test_a_profile_that_a_failed_start_left_damaged(world: World, cluster: Cluster) -> None:
    world.configure(minikube_fails="GUEST_PROVISION: error provisioning guest")
    update_facts(cluster, creating="2026-01-01T00:00:00Z")
    with pytest.raises(CommandError) as caught:
        MinikubeProvider().create(cluster, nothing)
    assert caught.value.message == (
        "minikube start failed with exit code 80: Exiting due to GUEST_PROVISION: error provisioning guest"
    )
    with pytest.raises(HalfMadeError, match="is damaged"):
        MinikubeProvider().find(cluster)
    assert MinikubeProvider().destroy(cluster) == "minikube profile unit deleted"


def test_a_damaged_profile_of_somebody_else_is_left_to_them(world: World, cluster: Cluster) -> None:
    world.write("profiles", {"unit": None})
    with pytest.raises(UsageError, match="minikube profile unit is damaged") as caught:
        MinikubeProvider().find(cluster)
    assert caught.value.hint == "`minikube delete -p unit` removes it"


# --- stopped ---------------------------------------------------------------------------------------------------------


def test_check_of_a_stopped_profile_is_a_difference(world: World, settings: Settings) -> None:
    with opened(settings) as cluster:
        created(cluster)
        update_facts(cluster, uid="1", server="https://127.0.0.1:1", node_address="127.0.0.1")
        cluster.state.admin_kubeconfig.write_text(ADMIN)
    world.write("running", [])
    world.write("booting", [])
    recap = up(settings, reporter=SilentReporter(), check=True)
    assert [(outcome.name, outcome.detail) for outcome in recap.failures] == []
    assert "does not run; start it" in next(o.detail for o in recap.outcomes if o.name == "API server")
    assert len(world.calls("minikube", "start")) == 1


# --- drivers ---------------------------------------------------------------------------------------------------------


def test_the_driver_that_minikube_chose_is_looked_at(world: World, cluster: Cluster) -> None:
    world.configure(minikube_driver="qemu2")
    with pytest.raises(UsageError, match="has driver 'qemu2'; docker and kvm2 are supported; it was deleted") as caught:
        MinikubeProvider().create(cluster, nothing)
    assert caught.value.hint == "MINIKUBE_DRIVER=docker in the environment chooses one"
    assert list(world.read("profiles", {})) == ["other"]


@pytest.mark.parametrize("variable", ["MINIKUBE_DRIVER", "MINIKUBE_VM_DRIVER"])
def test_a_driver_that_is_asked_for_is_refused_before_anything_is_made(
    world: World, tmp_path: Path, variable: str
) -> None:
    settings = standin_settings(world, tmp_path, "minikube", "minikube", environment={variable: "podman"})
    with opened(settings) as cluster, pytest.raises(UsageError, match="told to use driver 'podman'"):
        MinikubeProvider().find(cluster)
    assert world.calls("minikube", "start") == []


def test_minikube_as_root_says_what_allows_it(world: World, tmp_path: Path, cluster: Cluster) -> None:
    world.configure(root=True)
    with pytest.raises(CommandError) as caught:
        MinikubeProvider().create(cluster, nothing)
    assert caught.value.message.startswith("minikube start failed with exit code 57: Exiting due to DRV_AS_ROOT: ")
    assert "MINIKUBE_FORCE=true" in caught.value.hint
    forced = standin_settings(world, tmp_path, "minikube", "minikube", environment={"MINIKUBE_FORCE": "true"})
    with opened(forced) as other:
        created(other)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["* Using", "X Exiting due to MK_USAGE: why", "", "* Suggestion: x"], "Exiting due to MK_USAGE: why"),
        (["\u274c  Exiting due to K8S_FAIL: why"], "Exiting due to K8S_FAIL: why"),
        (["Error: unknown flag: --x"], None),
    ],
)
def test_the_headline_of_a_failure(lines: list[str], expected: str | None) -> None:
    assert exit_line(lines) == expected


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", *sorted(RESERVED_NAMES)])
def test_a_name_that_minikube_refuses_is_refused_first(world: World, tmp_path: Path, name: str) -> None:
    settings = standin_settings(world, tmp_path, "minikube", "minikube", name=name)
    with pytest.raises(UsageError, match=f"'{name}' is no name for a minikube profile"):
        up(settings, reporter=SilentReporter())
    assert world.calls("minikube") == []
    assert not State.of(settings).path.exists()


# --- several nodes ---------------------------------------------------------------------------------------------------


def wired(world: World) -> list[str]:
    return sorted(file.parent.name for file in (world.folder / "files").glob("*/hosts.toml"))


def test_each_node_is_told_of_the_registry(world: World, cluster: Cluster) -> None:
    world.configure(nodes=3)
    created(cluster)
    (step,) = MinikubeProvider().registry_steps(cluster)
    assert step.look().detail == "tell 3 of minikube's nodes where it is"
    step.change(nothing)
    assert wired(world) == ["unit", "unit-m02", "unit-m03"]
    assert step.look().detail == "known to 3 nodes"
    (world.folder / "files/unit-m02/hosts.toml").unlink()
    assert step.look().status is Status.CHANGED
    step.change(nothing)
    MinikubeProvider().unwire(cluster)
    assert wired(world) == []


def test_a_node_that_is_stopped_is_not_asked(world: World, cluster: Cluster) -> None:
    world.configure(nodes=2, stopped_nodes=["unit-m02"])
    created(cluster)
    (step,) = MinikubeProvider().registry_steps(cluster)
    step.change(nothing)
    assert wired(world) == ["unit"]
    assert step.look().status is Status.OK


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_missing_profile_is_none(world: World, cluster: Cluster, nodes: int) -> None:
    world.configure(nodes=nodes)
    assert MinikubeProvider().find(cluster) is None
    assert MinikubeProvider().destroy(cluster) == "minikube profile unit was gone already"


def test_contexts_of_others_are_left_out(world: World, cluster: Cluster, tmp_path: Path) -> None:
    """An adopted profile's entry is taken, whatever else is in the user's file."""
    world.write("profiles", {"unit": {"Driver": "docker", "KubernetesConfig": {"ContainerRuntime": "docker"}}})
    world.write("running", ["unit"])
    data: dict[str, Any] = yaml.safe_load(ADMIN)
    for section in ("clusters", "users"):
        data[section].append({**data[section][0], "name": "unit"})
    data["contexts"].append({"name": "unit", "context": {"cluster": "unit", "user": "unit"}})
    Path(cluster.settings.environ["KUBECONFIG"]).write_text(yaml.safe_dump(data))
    found = MinikubeProvider().find(cluster)
    assert found is not None
    assert not found.created
    assert len(found.kubeconfig["contexts"]) == 1
