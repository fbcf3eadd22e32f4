"""kind's command line (0.30), for what needs no cluster: its version, and clusters that are broken."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import NoReturn

import yaml

from tests.rigs.standins.commandline import Command, Flag, anything, duration, existing_file, matches, parse, switch
from tests.rigs.standins.world import World

NAME = Flag(check=matches(r"[a-z0-9.-]+"))
GLOBAL = {"--quiet": switch(), "--verbosity": Flag(check=matches(r"\d+"))}
COMMANDS: dict[tuple[str, ...], Command] = {
    ("version",): Command(flags=GLOBAL),
    ("create", "cluster"): Command(
        flags=GLOBAL
        | {
            "--name": NAME,
            "--image": Flag(check=anything),
            "--config": Flag(check=existing_file),
            "--kubeconfig": Flag(check=anything),
            "--retain": switch(),
            "--wait": Flag(check=duration),
        }
    ),
    ("delete", "cluster"): Command(flags=GLOBAL | {"--name": NAME, "--kubeconfig": Flag(check=anything)}),
    ("get", "kubeconfig"): Command(flags=GLOBAL | {"--name": NAME, "--internal": switch()}),
    ("get", "clusters"): Command(flags=GLOBAL),
}


def nodes_of(config: str, name: str) -> list[tuple[str, str]]:
    """Containers and their roles, named as kind names them; before several control planes there is a balancer."""
    listed = (yaml.safe_load(Path(config).read_text()).get("nodes") if config else None) or [{"role": "control-plane"}]
    roles = [str(node["role"]) for node in listed]
    counts: Counter[str] = Counter()
    made = []
    for role in roles:
        counts[role] += 1
        made.append((f"{name}-{role}{counts[role] if counts[role] > 1 else ''}", role))
    if counts["control-plane"] > 1:
        made.append((f"{name}-external-load-balancer", "external-load-balancer"))
    return made


def main(words: list[str]) -> NoReturn:
    """Behave as kind would."""
    world = World.of_environment()
    world.note("kind", words)
    parsed = parse(words, COMMANDS)
    match parsed.command:
        case ("version",):
            print(f"kind v{world.setting('kind_version', '0.30.0')} go1.24.6 linux/amd64")
        case ("create", "cluster"):
            name = parsed.one("--name", "kind")
            for line in ("Ensuring node image", "Preparing nodes"):
                sys.stderr.write(f" • {line} 📦  ...\n")
            for node, role in nodes_of(parsed.one("--config", ""), name):
                world.add_container(
                    id=f"id-of-{name}" if node == f"{name}-control-plane" else f"id-of-{node}",
                    name=node,
                    labels={"io.x-k8s.kind.cluster": name, "io.x-k8s.kind.role": role},
                    gateway=world.setting("gateway"),
                )
                config = world.folder / "files" / f"id-of-{name}" / "etc/containerd/config.toml"
                config.parent.mkdir(parents=True, exist_ok=True)
                config.write_text('config_path = "/etc/containerd/certs.d"\n')
        case ("delete", "cluster"):
            name = parsed.one("--name", "kind")
            containers = world.read("containers", [])
            world.write("containers", [c for c in containers if c["labels"].get("io.x-k8s.kind.cluster") != name])
        case ("get", "kubeconfig"):
            kubeconfig = world.setting("kubeconfig")
            if not kubeconfig:
                sys.stderr.write("ERROR: failed to get cluster internal kubeconfig: command failed\n")
                sys.exit(1)
            sys.stdout.write(Path(kubeconfig).read_text())
    sys.exit(0)
