"""Docker's client, as far as Wasilet asks it: ``version``, ``ps``, ``inspect``, ``start``, ``exec``, and networks and
volumes (28.x).

Containers are what the other stand-ins wrote down; their files are in a folder of the stand-ins' machine.
"""

from __future__ import annotations

import json
import re
import subprocess
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
    ("network", "ls"): Command(
        flags={
            "--quiet": switch(), "--no-trunc": switch(),
            "--filter": Flag(check=matches(r"(label|name|id)=.+"), repeatable=True),
        }
    ),
    ("network", "inspect"): Command(flags={}, arguments=(1, 100)),
    ("network", "rm"): Command(flags={"--force": switch()}, arguments=(1, 100)),
    ("volume", "ls"): Command(
        flags={"--quiet": switch(), "--filter": Flag(check=matches(r"(label|name)=.+"), repeatable=True)}
    ),
    ("volume", "rm"): Command(flags={"--force": switch()}, arguments=(1, 100)),
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
            with world.changing("containers", []) as changing:
                for container in changing:
                    if container["name"] in parsed.arguments:
                        container["running"] = True
        case ("network" | "volume" as kind, "ls"):
            for entry in _chosen(world, kind, parsed.flags.get("--filter", [])):
                print(entry["id"] if kind == "network" else entry["name"])
        case ("network", "inspect"):
            # As the engine describes them: a test that needs this puts the whole of it into the world.
            known = {entry["name"]: entry for entry in world.read("networks", [])}
            print(json.dumps([known[name]["inspected"] for name in parsed.arguments]))
        case ("network" | "volume" as kind, "rm"):
            _remove(world, kind, parsed.arguments)
    sys.exit(0)


def _inspected(container: dict[str, Any]) -> dict[str, Any]:
    return {
        "Id": container["id"],
        "Name": f"/{container['name']}",
        "Created": container.get("created", "2026-01-01T00:00:00.000000001Z"),
        "State": {"Running": container.get("running", True)},
        "Config": {"Labels": container["labels"], "Env": container.get("environment", [])},
        "Args": container.get("args", []),
        "NetworkSettings": {
            "Networks": {
                container.get("network", "bridge"): {
                    # The engine knows none of a container that is stopped.
                    "Gateway": container["gateway"] if container.get("running", True) else ""
                }
            }
        },
    }


def _chosen(world: World, kind: str, filters: list[str]) -> list[dict[str, Any]]:
    """Networks or volumes; every filter must match, and names are regular expressions."""
    found: list[dict[str, Any]] = world.read(f"{kind}s", [])
    for text in filters:
        what, _, value = text.partition("=")
        key, _, wanted = value.partition("=")
        if what == "name":
            found = [entry for entry in found if re.search(value, entry["name"])]
        elif what == "label":
            found = [entry for entry in found if entry["labels"].get(key) == wanted]
    return found


def _remove(world: World, kind: str, names: list[str]) -> None:
    with world.changing(f"{kind}s", []) as entries:
        for name in names:
            gone = [entry for entry in entries if name in {entry["name"], entry.get("id")}]
            if not gone:
                sys.stderr.write(f"Error response from daemon: {kind} {name} not found\n")
                sys.exit(1)
            if kind == "network" and any(c.get("network") == gone[0]["name"] for c in world.containers()):
                sys.stderr.write(
                    f"Error response from daemon: error while removing network: {name} has active endpoints\n"
                )
                sys.exit(1)
            entries[:] = [entry for entry in entries if entry not in gone]


def _exec(world: World, words: list[str]) -> NoReturn:
    """A command on files of the stand-ins' machine: what is an absolute path in it leads there."""
    container, command = words[0], words[1:]
    root = world.folder / "files" / container
    known = [entry for entry in world.containers() if container in {entry["id"], entry["name"]}]
    if not known or not known[0].get("running", True):
        problem = f"container {container} is not running" if known else f"No such container: {container}"
        sys.stderr.write(f"Error response from daemon: {problem}\n")
        sys.exit(1)
    if command[:2] != ["sh", "-c"] and command[:1] != ["rm"]:
        sys.stderr.write(f"unexpected command in a container: {command}\n")
        sys.exit(126)
    root.mkdir(parents=True, exist_ok=True)
    sys.exit(subprocess.run([str(_inside(root, word)) for word in command], check=False).returncode)


def _inside(root: Path, word: str) -> Path | str:
    return root / word.lstrip("/") if word.startswith("/") else word
