"""An agent's part, as a service: finds or starts the supervisor, starts one container if there is none, and tells."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from wasilet_node.runtime.client import ensure_supervisor
from wasilet_node.settings import LogSettings, NodePaths

from tests.unit.node.runtime.guests import SLEEPER, Rig


async def serve(data: Path, seen: Path) -> None:
    """For ever."""
    paths = NodePaths(data=data)
    rig = Rig(paths=paths, logs=LogSettings(), client=await ensure_supervisor(paths, LogSettings()))
    if not await rig.client.list():
        limits = {"memory_limit_bytes": 64 << 20, "cpu_limit_millicores": 500}
        await rig.client.start(rig.config(rig.artifact(SLEEPER), **limits))
    (container,) = await rig.client.list()
    group = Path(f"/proc/{container.pid}/cgroup").read_text().strip()
    scope = next((part for part in group.split("/") if part.endswith((".scope", ".service"))), group)
    with seen.open("a") as file:
        file.write(f"{container.pid} {container.state} in {scope}, {rig.client.capabilities}\n")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), Path(sys.argv[2])))
