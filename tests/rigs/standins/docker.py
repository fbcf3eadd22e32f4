"""Docker's client, as far as Wasilet asks it: ``version``, ``ps``, ``inspect``, ``start``, ``exec`` (28.x).

Containers are what the other stand-ins wrote down; their files are in a folder of the stand-ins' machine.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from tests.rigs.standins.commandline import Command, Flag, anything, matches, parse, switch
from tests.rigs.standins.world import World

COMMANDS: dict[tuple[str, ...], Command] = {
    ("version",): Command(flags={"--format": Flag(check=anything), "-f": Flag(check=anything)}),
    ("ps",): Command(
        flags={
            "--all": switch(), "--quiet": switch(), "--no-trunc": switch(), "--format": Flag(check=anything),
            "--filter": Flag(check=matches(r"(label|name|id|status)=.+"), repeatable=True),
        }
    ),
    ("inspect",): Command(
        flags={"--type": Flag(check=matches("container|image|network|volume")), "--format": Flag(check=anything)},
        arguments=(1, 100),
    ),
    ("start",): Command(flags={}, arguments=(1, 100)),
    ("exec",): Command(flags={"--interactive": switch(), "--user": Flag(check=anything)}, arguments=(2, 100)),
}  # fmt: skip

PROBLEMS = {
    "stopped": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
    "denied": "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
}


def main(words: list[str]) -> NoReturn:
    """Behave as the client would."""
    world = World.of_environment()
    world.note("docker", words)
    problem = world.setting("docker", "")
    if problem == "hangs":
        time.sleep(3600)
    if problem:
        sys.stderr.write(PROBLEMS[problem] + "\n")
        sys.exit(1)
    if words[:1] == ["exec"]:
        _exec(world, words[1:])
    parsed = parse(words, COMMANDS)
    containers: list[dict[str, Any]] = world.read("containers", [])
    match parsed.command:
        case ("version",):
            print("28.3.0")
        case ("ps",):
            wanted = [tuple(value.removeprefix("label=").split("=", 1)) for value in parsed.flags.get("--filter", [])]
            for container in containers:
                if all(container["labels"].get(key) == value for key, value in wanted):
                    print(container["id"])
        case ("inspect",):
            found = [_inspected(c) for c in containers if {c["id"], c["name"]} & set(parsed.arguments)]
            print(json.dumps(found))
            if len(found) != len(parsed.arguments):
                sys.stderr.write(f"Error response from daemon: No such container: {parsed.arguments[-1]}\n")
                sys.exit(1)
        case ("start",):
            for container in containers:
                if container["name"] in parsed.arguments:
                    container["running"] = True
            world.write("containers", containers)
    sys.exit(0)


def _inspected(container: dict[str, Any]) -> dict[str, Any]:
    return {
        "Id": container["id"],
        "Name": f"/{container['name']}",
        "Created": container.get("created", "2026-01-01T00:00:00.000000001Z"),
        "State": {"Running": container.get("running", True)},
        "Config": {"Labels": container["labels"]},
        "Args": container.get("args", []),
        "NetworkSettings": {"Networks": {"bridge": {"Gateway": container["gateway"]}}},
    }


def _exec(world: World, words: list[str]) -> NoReturn:
    """The three scripts that Wasilet runs, on files of the stand-ins' machine."""
    container, command = words[0], words[1:]
    root = world.folder / "files" / container
    if command[:1] == ["rm"]:
        shutil.rmtree(_inside(root, command[-1]), ignore_errors=True)
        sys.exit(0)
    if command[:2] != ["sh", "-c"] or len(command) not in {5, 6}:
        sys.stderr.write(f"unexpected command in a container: {command}\n")
        sys.exit(126)
    target = _inside(root, command[4])
    if len(command) == 6:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(command[5])
    elif target.is_file():
        sys.stdout.write(target.read_text())
    sys.exit(0)


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")
