"""Starting a container whose volumes hang: it waits with a reason, and the agent's own threads stay free."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.pods.container_start import LaunchError, launch
from wasilet_node.runtime.protocol import Mount
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
    services = dataclasses.replace(fakes.dependencies(), host_threads=HostThreads(timeout_seconds=0.2))
    pod = make_pod()

    async def start() -> LaunchError:
        with pytest.raises(LaunchError) as caught:
            await launch(services, pod, pod["spec"]["containers"][0], attempt=0, sandbox="s", late=lambda _: None)
        return caught.value

    # More than the event loop's own threads on any machine that runs tests.
    async with asyncio.timeout(10):
        errors = await asyncio.gather(*(start() for _ in range(30)))
        assert await asyncio.to_thread(lambda: True)
    assert {error.reason for error in errors} == {"CreateContainerConfigError"}
    assert errors[0].message == 'the volumes of container "c" did not answer within 0.2 s'
