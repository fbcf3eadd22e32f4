"""k3d's command line (5.8), after its reference (docs/usage/commands). A new cluster's API server is a real one, of
another provider, that ``settings.json`` names.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NoReturn

from tests.rigs.standins.commandline import (
    Command,
    Flag,
    anything,
    boolean,
    duration,
    existing_file,
    matches,
    number,
    parse,
    refuse,
    switch,
)
from tests.rigs.standins.world import World

FILTER = r"(@(all|loadbalancer|((server|agent)s?(:(\*|\d+(-\d+)?(,\d+)*))?)(;.+)?))"
NAMED = {"timestamps": switch(), "trace": switch(), "verbose": switch()}
GLOBAL = {f"--{name}": flag for name, flag in NAMED.items()} | {"--help": switch(), "-h": switch()}
BOOLEAN = Flag(check=boolean, switch=True)

K3S_SERVER_FLAGS = {
    "--egress-selector-mode": matches("agent|cluster|pod|disabled"),
    "--kube-apiserver-arg": matches(r"[a-z0-9-]+(=.*)?"),
    "--kube-controller-manager-arg": matches(r"[a-z0-9-]+(=.*)?"),
    "--kubelet-arg": matches(r"[a-z0-9-]+(=.*)?"),
    "--disable": matches("coredns|servicelb|traefik|local-storage|metrics-server|runtimes"),
}
"""Of ``k3s server --help`` (1.31), those that clusters for tests are made with."""

CREATE_FLAGS = {
    "--agents": Flag(check=number),
    "-a": Flag(check=number),
    "--agents-memory": Flag(check=anything),
    "--api-port": Flag(check=matches(r"([^:]+:)?(\d{1,5}|random)")),
    "--config": Flag(check=existing_file),
    "-c": Flag(check=existing_file),
    "--env": Flag(check=anything, repeatable=True),
    "-e": Flag(check=anything, repeatable=True),
    "--gpus": Flag(check=anything),
    "--host-alias": Flag(check=matches(r"[^:]+:.+"), repeatable=True),
    "--host-pid-mode": BOOLEAN,
    "--image": Flag(check=matches(r"[\w./:+@-]+")),
    "-i": Flag(check=matches(r"[\w./:+@-]+")),
    "--k3s-arg": Flag(check=matches(rf".+{FILTER}"), repeatable=True),
    "--k3s-node-label": Flag(check=anything, repeatable=True),
    "--kubeconfig-switch-context": BOOLEAN,
    "--kubeconfig-update-default": BOOLEAN,
    "--lb-config-override": Flag(check=anything, repeatable=True),
    "--network": Flag(check=anything),
    "--no-image-volume": BOOLEAN,
    "--no-lb": BOOLEAN,
    "--no-rollback": BOOLEAN,
    "--port": Flag(check=anything, repeatable=True),
    "-p": Flag(check=anything, repeatable=True),
    "--registry-config": Flag(check=existing_file),
    "--registry-create": Flag(check=anything),
    "--registry-use": Flag(check=anything, repeatable=True),
    "--runtime-label": Flag(check=anything, repeatable=True),
    "--runtime-ulimit": Flag(check=anything, repeatable=True),
    "--servers": Flag(check=number),
    "-s": Flag(check=number),
    "--servers-memory": Flag(check=anything),
    "--subnet": Flag(check=anything),
    "--timeout": Flag(check=duration),
    "--token": Flag(check=anything),
    "--volume": Flag(check=anything, repeatable=True),
    "-v": Flag(check=anything, repeatable=True),
    "--wait": BOOLEAN,
}
COMMANDS: dict[tuple[str, ...], Command] = {
    ("version",): Command(flags=GLOBAL | {"--output": Flag(check=matches("json")), "-o": Flag(check=matches("json"))}),
    ("cluster", "create"): Command(flags=GLOBAL | CREATE_FLAGS, arguments=(0, 1)),
    ("cluster", "delete"): Command(
        flags=GLOBAL | {"--all": switch(), "-a": switch(), "--config": Flag(check=existing_file)}, arguments=(0, 100)
    ),
    ("cluster", "start"): Command(
        flags=GLOBAL | {"--all": switch(), "-a": switch(), "--wait": BOOLEAN, "--timeout": Flag(check=duration)},
        arguments=(0, 100),
    ),
    ("cluster", "list"): Command(
        flags=GLOBAL | {"--no-headers": switch(), "--token": switch(), "--output": Flag(check=matches("json|yaml"))},
        arguments=(0, 100),
    ),
    ("kubeconfig", "get"): Command(flags=GLOBAL | {"--all": switch(), "-a": switch()}, arguments=(0, 100)),
}


def main(words: list[str]) -> NoReturn:
    """Behave as k3d would."""
    world = World.of_environment()
    world.note("k3d", words)
    parsed = parse(words, COMMANDS)
    match parsed.command:
        case ("version",):
            print(f"k3d version v{world.setting('k3d_version', '5.8.3')}\nk3s version v1.31.5-k3s1 (default)")
        case ("cluster", "create"):
            create(world, parsed.arguments[0], parsed.flags)
        case ("cluster", "delete"):
            gone = {f"k3d-{name}" for name in parsed.arguments}
            kept = [c for c in world.read("containers", []) if c["name"].rpartition("-server")[0] not in gone]
            world.write("containers", kept)
        case ("cluster", "start"):
            containers = world.read("containers", [])
            for container in containers:
                container["running"] |= container["labels"].get("k3d.cluster") in parsed.arguments
            world.write("containers", containers)
        case ("kubeconfig", "get"):
            for name in parsed.arguments:
                if not any(c["labels"].get("k3d.cluster") == name for c in world.read("containers", [])):
                    sys.stderr.write(f"FATA[0000] No nodes found for cluster '{name}'\n")
                    sys.exit(1)
            sys.stdout.write(Path(world.setting("kubeconfig")).read_text())
    sys.exit(0)


def create(world: World, name: str, flags: dict[str, list[str]]) -> None:
    """Check what k3s itself would check, and write a server down."""
    if not re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?", name):
        refuse(f"failed to validate cluster name '{name}'")
    arguments = [re.sub(rf"{FILTER}$", "", value) for value in flags.get("--k3s-arg", [])]
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag not in K3S_SERVER_FLAGS or not K3S_SERVER_FLAGS[flag](value):
            refuse(f"k3s would not start with {argument!r}")
    for file in flags.get("--registry-config", []):
        mirrors = json.loads(Path(file).read_text())["mirrors"]
        assert all(re.fullmatch(r"https?://[^/]+", url) for entry in mirrors.values() for url in entry["endpoint"])
    sys.stdout.write("\x1b[36mINFO\x1b[0m[0000] Prep: Network\n\x1b[36mINFO\x1b[0m[0002] Creating node\n")
    world.add_container(
        id=f"id-of-{name}",
        name=f"k3d-{name}-server-0",
        labels={"k3d.cluster": name, "k3d.role": "server"},
        gateway=world.setting("gateway"),
        args=["server", *arguments, "--tls-san", "0.0.0.0"],
    )
