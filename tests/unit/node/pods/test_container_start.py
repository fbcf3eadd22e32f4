"""Starting a container whose volumes hang: it waits with a reason, and the agent's own threads stay free."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.network.attachment import Attachment, MachineNetwork
from wasilet_node.network.errors import NetworkError
from wasilet_node.pods.container_start import ContainerStartError, start_container
from wasilet_node.runtime.protocol import GuestKind, Mount
from wasilet_node.volumes.host_threads import HostThreads

from tests.unit.node.pods.fakes import Fakes, FakeVolumes, make_pod

pytestmark = pytest.mark.unit


class HangingVolumes(FakeVolumes):
    """Volumes on a file system that does not answer until it is let go."""

    def __init__(self, let_go: threading.Event) -> None:
        super().__init__()
        self._let_go = let_go

    def mounts(
        self,
        pod: dict[str, Any],
        container: dict[str, Any],
        environment: Mapping[str, str],
        *,
        attempt: int = 0,
        working_dir: str = "",
    ) -> Sequence[Mount]:
        self._let_go.wait(30)
        return []


@pytest.fixture
def let_go() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_volumes_that_hang_make_the_container_wait_and_nothing_else(
    tmp_path: Path, let_go: threading.Event
) -> None:
    fakes = Fakes(data=tmp_path, volumes=HangingVolumes(let_go))
    dependencies = dataclasses.replace(fakes.dependencies(), host_threads=HostThreads(timeout_seconds=0.2))
    pod = make_pod()

    async def start() -> ContainerStartError:
        with pytest.raises(ContainerStartError) as caught:
            await start_container(
                dependencies, pod, pod["spec"]["containers"][0], attempt=0, sandbox="s", late=lambda _: None
            )
        return caught.value

    # More than the event loop's own threads on any machine that runs tests.
    async with asyncio.timeout(10):
        errors = await asyncio.gather(*(start() for _ in range(30)))
        assert await asyncio.to_thread(lambda: True)
    assert {error.reason for error in errors} == {"CreateContainerConfigError"}
    assert errors[0].message == 'the volumes of container "c" did not answer within 0.2 s'


class Network(MachineNetwork):
    """Every pod has an address and a namespace of its own."""

    async def attach(self, pod: dict[str, Any], guest: GuestKind | None = None) -> Attachment | None:
        return Attachment(key="k", addresses=("10.9.0.7",))

    async def etc_files(self, pod: dict[str, Any]) -> tuple[tuple[str, str], ...]:
        return (("/etc/hosts", "/pod/hosts"),)


async def started(fakes: Fakes, container: dict[str, Any], *, attempt: int = 0) -> Any:
    dependencies = dataclasses.replace(fakes.dependencies(), networks=Network())
    pod = make_pod(containers=[container])
    await start_container(dependencies, pod, container, attempt=attempt, sandbox="s", late=lambda _: None)
    return fakes.runtime.configs[-1]


async def test_a_core_module_stays_in_the_machines_network_and_its_ports_are_told_once(tmp_path: Path) -> None:
    fakes = Fakes(data=tmp_path)
    container = {"name": "c", "image": "x", "ports": [{"containerPort": 80}]}
    config = await started(fakes, container)
    await started(fakes, container, attempt=1)
    assert (config.network, config.etc_files) == ("", ())
    said = [text for text in fakes.events.said if text.startswith("CannotListen")]
    assert len(said) == 1
    assert "container c names ports, but its image is a core module" in said[0]


async def test_a_component_runs_in_its_pods_network(tmp_path: Path) -> None:
    fakes = Fakes(data=tmp_path)
    fakes.images.kind = GuestKind.COMPONENT
    config = await started(fakes, {"name": "c", "image": "x", "ports": [{"containerPort": 80}]})
    assert (config.network, config.etc_files) == ("k", (("/etc/hosts", "/pod/hosts"),))
    assert not [text for text in fakes.events.said if text.startswith("CannotListen")]


@pytest.mark.parametrize(("kind", "waits"), [(GuestKind.COMPONENT, True), (GuestKind.MODULE, False)])
async def test_what_may_open_sockets_starts_once_policies_know_its_pod(
    tmp_path: Path, kind: GuestKind, *, waits: bool
) -> None:
    fakes = Fakes(data=tmp_path)
    fakes.images.kind = kind
    asked: list[int] = []

    class Judged(Network):
        async def await_policies(self, pod: dict[str, Any]) -> None:
            asked.append(len(fakes.runtime.configs))

    container = {"name": "c", "image": "x"}
    pod = make_pod(containers=[container])
    dependencies = dataclasses.replace(fakes.dependencies(), networks=Judged())
    await start_container(dependencies, pod, container, attempt=0, sandbox="s", late=lambda _: None)
    assert asked == ([0] if waits else []), "before the runtime got it"
    assert len(fakes.runtime.configs) == 1


async def test_a_network_that_cannot_be_had_is_the_pods_reason_to_wait(tmp_path: Path) -> None:
    class Exhausted(MachineNetwork):
        async def attach(self, pod: dict[str, Any], guest: GuestKind | None = None) -> Attachment | None:
            raise NetworkError("no free address in 10.9.0.0/29: 5 are in use")

    fakes = Fakes(data=tmp_path)
    dependencies = dataclasses.replace(fakes.dependencies(), networks=Exhausted())
    pod = make_pod()
    with pytest.raises(ContainerStartError, match="no free address in") as caught:
        await start_container(
            dependencies, pod, pod["spec"]["containers"][0], attempt=0, sandbox="s", late=lambda _: None
        )
    assert caught.value.reason == "CreatePodSandboxError"


async def test_without_a_pod_network_a_server_listens_where_its_pod_asks_for_the_nodes_and_is_refused_elsewhere(
    tmp_path: Path,
) -> None:
    fakes = Fakes(data=tmp_path)
    fakes.images.kind = GuestKind.COMPONENT
    fakes.images.server = True
    container = {"name": "c", "image": "x", "ports": [{"containerPort": 8123}]}

    async def start(**spec: Any) -> None:
        pod = make_pod(containers=[container], **spec)
        dependencies = dataclasses.replace(fakes.dependencies(), networks=MachineNetwork())
        await start_container(dependencies, pod, container, attempt=0, sandbox="s", late=lambda _: None)

    with pytest.raises(ContainerStartError, match=r"no network of their own .* set hostNetwork") as caught:
        await start()
    assert caught.value.reason == "CreateContainerConfigError"
    assert not fakes.runtime.configs
    await start(hostNetwork=True)
    config = fakes.runtime.configs[-1]
    assert config.server is not None
    assert (config.server.port, config.network) == (8123, "")
