"""k3d's command line (5.8), after its reference (docs/usage/commands) and what the real one does (pkg/client). A new
cluster's API server is a real one, of another provider, that ``settings.json`` names.
"""

from __future__ import annotations

import datetime as dt
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

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


RED, CYAN, OFF = "\x1b[31m", "\x1b[36m", "\x1b[0m"


def info(text: str) -> None:
    """k3d colours its lines always, on terminals and elsewhere."""
    sys.stderr.write(f"{CYAN}INFO{OFF}[0000] {text}\n")
    sys.stderr.flush()


def error(text: str) -> None:
    """An error that k3d goes on after."""
    sys.stderr.write(f"{RED}ERRO{OFF}[0003] {text}\n")


def fatal(text: str) -> NoReturn:
    """The last line of a k3d that failed."""
    sys.stderr.write(f"{RED}FATA{OFF}[0003] {text}\n")
    sys.exit(1)


def main(words: list[str]) -> NoReturn:
    """Behave as k3d would."""
    world = World.of_environment()
    world.note("k3d", words)
    parsed = parse(words, COMMANDS)
    match parsed.command:
        case ("version",):
            print(f"k3d version {world.setting('k3d_version', 'v5.8.3')}\nk3s version v1.31.5-k3s1 (default)")
        case ("cluster", "create"):
            create(world, parsed.arguments[0], parsed.flags)
        case ("cluster", "delete"):
            for name in parsed.arguments:
                delete(world, name)
        case ("cluster", "start"):
            for name in parsed.arguments:
                start(world, name)
        case ("kubeconfig", "get"):
            for name in parsed.arguments:
                nodes = world.containers("k3d.cluster", name)
                if not nodes:
                    fatal(f"No nodes found for cluster '{name}'")
                if not any(c["labels"]["k3d.role"] == "server" and c.get("running", True) for c in nodes):
                    fatal(f"failed to get kubeconfig from cluster '{name}': no running server")
            print("---\n" + Path(world.setting("kubeconfig")).read_text())
    sys.exit(0)


def create(world: World, name: str, flags: dict[str, list[str]]) -> None:
    """Check what k3s itself would check, and make what k3d makes, in its order."""
    if len(name) > 32:
        fatal(f"Cluster name must be <= 32 characters, but has {len(name)}")
    if not re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?", name):
        fatal(f"Invalid cluster name. '{name}'")
    if world.containers("k3d.cluster", name):
        fatal(f"Failed to create cluster '{name}' because a cluster with that name already exists")
    arguments = [re.sub(rf"{FILTER}$", "", value) for value in flags.get("--k3s-arg", [])]
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag not in K3S_SERVER_FLAGS or not K3S_SERVER_FLAGS[flag](value):
            refuse(f"k3s would not start with {argument!r}")
    registries = _registries(flags)
    world.write("registries", registries)
    for mirror in (registries.get("mirrors") or {}).values():
        assert all(re.fullmatch(r"https?://[^/]+", url) for url in mirror["endpoint"])
    external = _make_network(world, name)
    with world.changing("volumes", []) as volumes:
        volumes.append({"name": f"k3d-{name}-images", "labels": {"k3d.cluster": name}})
    info(f"Created image volume k3d-{name}-images")
    world.phase("volume")
    labels = {"app": "k3d", "k3d.cluster": name}
    info("Starting new tools node...")
    _add(world, name, "tools", labels | {"k3d.role": "noRole"}, running=True)
    world.phase("tools")
    labels |= {"k3d.cluster.network": f"k3d-{name}", "k3d.cluster.network.external": external}
    marks = dict(value.partition("@")[0].split("=", 1) for value in flags.get("--runtime-label", []))
    info(f"Creating node 'k3d-{name}-server-0'")
    args = ["server", *arguments, "--tls-san", "0.0.0.0"]
    _add(world, name, "server-0", labels | marks | {"k3d.role": "server"}, args=args)
    world.phase("server")
    info(f"Creating LoadBalancer 'k3d-{name}-serverlb'")
    _add(world, name, "serverlb", labels | {"k3d.role": "loadbalancer"})
    world.phase("balancer")
    world.remove_containers("k3d.role", "noRole")
    info(f"Starting cluster '{name}'")
    world.phase("helper gone")
    if why := world.setting("k3d_fails"):
        error(f"Failed Cluster Start: {why}")
        error("Failed to create cluster >>> Rolling Back")
        delete(world, name)
        fatal("Cluster creation FAILED, all changes have been rolled back!")
    start(world, name)
    world.phase("started")
    info(f"Cluster '{name}' created successfully!")


def _registries(flags: dict[str, list[str]]) -> dict[str, Any]:
    """A flag takes the place of what a configuration says."""
    import yaml  # takes longer than all the rest of a start

    for file in flags.get("--registry-config", []):
        return dict(yaml.safe_load(Path(file).read_text()))
    for file in flags.get("--config", []):
        text = (yaml.safe_load(Path(file).read_text()).get("registries") or {}).get("config") or "{}"
        return dict(yaml.safe_load(text if "\n" in text else Path(text).read_text()))
    return {}


def _make_network(world: World, name: str) -> str:
    info("Prep: Network")
    with world.changing("networks", []) as networks:
        if there := [network for network in networks if network["name"] == f"k3d-{name}"]:
            info(f"Re-using existing network 'k3d-{name}' ({there[0]['id']})")
        else:
            networks.append({"id": f"network-of-{name}", "name": f"k3d-{name}", "labels": {"app": "k3d"}})
            info(f"Created network 'k3d-{name}'")
    world.phase("network")
    return "true" if there else "false"


def _add(world: World, cluster: str, suffix: str, labels: dict[str, str], **more: Any) -> None:
    number = len(world.read("phases", []))
    world.add_container(
        **{
            "id": f"{number}-id-of-{suffix}-of-{cluster}",
            "name": f"k3d-{cluster}-{suffix}",
            "labels": labels,
            "network": f"k3d-{cluster}",
            "gateway": world.setting("gateway"),
            "created": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z"),
            "running": False,
        }
        | more
    )


def start(world: World, name: str) -> None:
    """Start what is stopped; those nodes learn again what this machine is called."""
    for container in world.containers("k3d.cluster", name):
        if not container.get("running", True) and container["labels"]["k3d.role"] in {"server", "agent"}:
            world.write_hosts(container["id"], f"{world.setting('gateway')} host.k3d.internal")
    with world.changing("containers", []) as containers:
        for container in containers:
            container["running"] = container.get("running", True) or container["labels"].get("k3d.cluster") == name


def delete(world: World, name: str) -> None:
    """Of a cluster without containers k3d knows nothing; of its network it learns from nodes, not from the helper."""
    containers = world.containers("k3d.cluster", name)
    if not containers:
        info("No clusters found")
        return
    info(f"Deleting cluster '{name}'")
    world.remove_containers("k3d.cluster", name)
    owned = {
        c["labels"]["k3d.cluster.network"]
        for c in containers
        if c["labels"].get("k3d.cluster.network.external") == "false"
    }
    with world.changing("networks", []) as networks:
        networks[:] = [network for network in networks if network["name"] not in owned]
    with world.changing("volumes", []) as volumes:
        volumes[:] = [volume for volume in volumes if volume["labels"].get("k3d.cluster") != name]
