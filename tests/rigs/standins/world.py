"""What the stand-ins share: a folder that stands for the machine's state, and launchers to put on PATH.

``calls.jsonl`` has every command line, ``containers.json`` what Docker would list, ``profiles.json`` what minikube
would. ``settings.json`` says how the stand-ins behave: whether Docker runs, which version a tool has, and which
kubeconfig of a real API server a new cluster gets.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "STANDIN_MACHINE"
ROOT = Path(__file__).resolve().parent.parent.parent.parent
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
        """Write a JSON file of the folder."""
        (self.folder / f"{name}.json").write_text(json.dumps(data))

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
        self.write("containers", [*self.read("containers", []), container])

    def environment(self, base: Mapping[str, str], *tools: str) -> dict[str, str]:
        """``base`` with launchers of these tools before everything else on PATH."""
        bin_folder = self.folder / "bin"
        bin_folder.mkdir(exist_ok=True)
        for old in bin_folder.iterdir():
            old.unlink()
        for tool in tools:
            launcher = bin_folder / tool
            launcher.write_text(
                f"#!{sys.executable} -P\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
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
