"""What a node takes of its machine: memory, descriptors, threads, children, folders, control groups."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet_node.runtime.zygote import SANDBOX_NAME


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """At one moment. Two of them are compared to see whether anything is left behind."""

    agent_mib: float
    supervisor_mib: float
    agent_descriptors: int
    supervisor_descriptors: int
    agent_threads: int
    supervisor_threads: int
    sandboxes: int
    """Children of the supervisor, zombies too."""

    containers: int
    """Folders with records of containers."""

    volumes: int
    logs: int
    groups: int
    """Control groups of containers."""

    def lines(self) -> dict[str, Any]:
        """For a report."""
        return dataclasses.asdict(self)

    def remains(self) -> dict[str, int]:
        """What only pods have: all zero on a node without."""
        return {name: getattr(self, name) for name in ("sandboxes", "containers", "volumes", "logs", "groups")}


def footprint(node: dict[str, Any]) -> Footprint:
    """Of a node as ``status --output json`` names it. Raises OSError when one of its processes is gone."""
    agent, supervisor, data = int(node["pid"]), int(node["supervisor_pid"]), Path(node["data_dir"])
    pointers = [json.loads(file.read_bytes()) for file in data.glob("supervisor*.json")]
    groups = {Path(path) for pointer in pointers for path in pointer.get("cgroups") or ()}
    return Footprint(
        agent_mib=_resident_mib(agent),
        supervisor_mib=_resident_mib(supervisor),
        agent_descriptors=_entries(Path(f"/proc/{agent}/fd")),
        supervisor_descriptors=_entries(Path(f"/proc/{supervisor}/fd")),
        agent_threads=_entries(Path(f"/proc/{agent}/task")),
        supervisor_threads=_entries(Path(f"/proc/{supervisor}/task")),
        sandboxes=_sandboxes(supervisor),
        containers=_entries(data / "containers"),
        volumes=_entries(data / "pods"),
        logs=_entries(data / "logs" / "pods"),
        groups=sum(1 for group in groups if group.is_dir() for child in group.iterdir() if child.is_dir()),
    )


def _sandboxes(supervisor: int) -> int:
    """Those that have a container: not the zygote, and not those that wait."""
    found = 0
    for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        with contextlib.suppress(OSError):
            found += Path(f"/proc/{pid}/comm").read_text().strip() == SANDBOX_NAME
    return found


def _resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def _entries(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
