"""What the stand-ins share: a folder that stands for the machine's state, and launchers to put on PATH.

``calls.jsonl`` has every command line, ``containers.json`` what Docker would list, ``profiles.json`` what minikube
would. ``settings.json`` says how the stand-ins behave: whether Docker runs, which version a tool has, and which
kubeconfig of a real API server a new cluster gets.

What takes a tool seconds is a row of named phases here. ``hold`` names the phase at whose end the first tool that
gets there stays until it is killed: so a start is interrupted at each of its seconds, and not when a clock says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "STANDIN_MACHINE"
ROOT = Path(__file__).resolve().parent.parent.parent.parent
HOLD_SECONDS = 300.0
TOOLS = ("docker", "kind", "k3d", "minikube")


@dataclass(frozen=True)
class World:
    """The machine of the stand-ins."""

    folder: Path

    @classmethod
    def of_environment(cls) -> World:
        """For the stand-ins themselves."""
        return cls(Path(os.environ[FOLDER]))

    def read(self, name: str, default: Any) -> Any:
        """A JSON file of the folder."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else default

    def write(self, name: str, data: Any) -> None:
        """Write a JSON file of the folder, wholly or not at all: a stand-in may be killed at any moment."""
        new = self.folder / f".{name}.{os.getpid()}"
        new.write_text(json.dumps(data))
        new.replace(self.folder / f"{name}.json")

    @contextlib.contextmanager
    def changing(self, name: str, default: Any) -> Iterator[Any]:
        """The data of a JSON file, to be changed in place while no other stand-in does."""
        with (self.folder / f".{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            data = self.read(name, default)
            yield data
            self.write(name, data)

    def phase(self, name: str) -> None:
        """Something that takes a tool its time is done."""
        with self.changing("phases", []) as phases:
            phases.append(name)
            first = phases.count(name) == 1
        if self.setting("hold") != name or not first:
            return
        deadline = time.monotonic() + HOLD_SECONDS
        while self.setting("hold") == name and time.monotonic() < deadline:
            time.sleep(0.02)

    def setting(self, name: str, default: Any = None) -> Any:
        """How the stand-ins behave."""
        return self.read("settings", {}).get(name, default)

    def configure(self, **values: Any) -> None:
        """Say how they behave from now on."""
        self.write("settings", self.read("settings", {}) | values)

    def note(self, tool: str, words: list[str]) -> None:
        """Write a command line down."""
        with (self.folder / "calls.jsonl").open("a") as file:
            file.write(json.dumps([tool, *words]) + "\n")

    def calls(self, *beginning: str) -> list[list[str]]:
        """The command lines that began so."""
        path = self.folder / "calls.jsonl"
        if not path.is_file():
            return []
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [words for words in found if words[: len(beginning)] == list(beginning)]

    def add_container(self, **container: Any) -> None:
        """A container that Docker would list from now on."""
        with self.changing("containers", []) as containers:
            containers.append(container)

    def containers(self, label: str = "", value: str = "") -> list[dict[str, Any]]:
        """What Docker lists, of a label or all."""
        found: list[dict[str, Any]] = self.read("containers", [])
        return [container for container in found if not label or container["labels"].get(label) == value]

    def remove_containers(self, label: str, value: str) -> None:
        """As ``docker rm --force``."""
        with self.changing("containers", []) as containers:
            containers[:] = [container for container in containers if container["labels"].get(label) != value]

    def set_running(self, label: str, value: str, *, running: bool) -> None:
        """Start or stop all containers with a label. The engine writes their hosts files again when they start, and
        knows nothing of what others wrote into them."""
        with self.changing("containers", []) as containers:
            for container in containers:
                if container["labels"].get(label) == value:
                    if running:
                        self.write_hosts(container["id"])
                    container["running"] = running

    def hosts(self, container: str) -> Path:
        """The hosts file of a container."""
        return self.folder / "files" / container / "etc/hosts"

    def write_hosts(self, container: str, *more: str) -> None:
        """A hosts file as the engine makes it, with what somebody adds."""
        path = self.hosts(container)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in ("127.0.0.1\tlocalhost", *more)))

    def environment(self, base: Mapping[str, str], *tools: str) -> dict[str, str]:
        """``base`` with launchers of these tools before everything else on PATH."""
        import yaml  # takes a tool longer than all the rest of its start

        places = [str(ROOT), str(Path(yaml.__file__).parent.parent)]
        bin_folder = self.folder / "bin"
        bin_folder.mkdir(exist_ok=True)
        for old in bin_folder.iterdir():
            old.unlink()
        for tool in tools:
            launcher = bin_folder / tool
            launcher.write_text(
                # Without site-packages and what they do at each start: tools are started by the dozen.
                f"#!{sys.executable} -PS\nimport sys\nsys.path[:0] = {places!r}\n"
                f"from tests.rigs.standins.{tool} import main\nmain(sys.argv[1:])\n"
            )
            launcher.chmod(stat.S_IRWXU)
        hidden = {tool for tool in TOOLS if tool not in tools}
        path = os.pathsep.join([str(bin_folder), *_without(base.get("PATH", ""), hidden)])
        return {**base, "PATH": path, FOLDER: str(self.folder)}


def _without(path: str, tools: set[str]) -> Iterator[str]:
    """The folders of PATH that hold none of these tools: a real one must not be found in place of a stand-in."""
    for folder in path.split(os.pathsep):
        if folder and not any((Path(folder) / tool).exists() for tool in tools):
            yield folder
