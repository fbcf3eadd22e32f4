"""The Docker engine as kind and k3d use it: asked through its client, so that contexts, DOCKER_HOST and rights are the
user's own. Each question has a short limit, and each way of having no engine one clear line.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wasilet.errors import CommandError, HarnessError, UsageError
from wasilet.process import Completed, check_cancelled, run

ASK_SECONDS = 15.0
"""For a question. An engine that is paging may take seconds; one that hangs must not."""


DESCRIBE_ATTEMPTS = 5
SETTLE_SECONDS = 30.0
"""For a container that is being made or removed."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """What matters of a container that is a cluster's node."""

    id: str
    name: str
    running: bool
    created: str
    """RFC 3339 with nanoseconds, UTC: compares as text with other instants of that form."""

    labels: Mapping[str, str]
    command: tuple[str, ...]
    environment: tuple[str, ...]
    """``NAME=value`` each."""

    networks: Mapping[str, str]
    """Network name to the address of its gateway on this machine (IPv4)."""


@dataclass(frozen=True, kw_only=True)
class BridgeNetwork:
    """An engine's network with a bridge on its machine."""

    interface: str
    """Of the bridge."""

    network: ipaddress.IPv4Network
    gateway: str
    addresses: tuple[str, ...]
    """Of the containers that run."""


class Docker:
    """A Docker client with the environment of this run."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = dict(environ)

    def run(self, *arguments: str, timeout_seconds: float = ASK_SECONDS) -> Completed:
        """Run the client. Raises CommandError."""
        return run(["docker", *arguments], timeout_seconds=timeout_seconds, env=self._environ)

    def check(self) -> str:
        """The engine's version. Raises UsageError, in one line with a hint, when it cannot be used."""
        try:
            return self.run("version", "--format", "{{.Server.Version}}").stdout.strip()
        except CommandError as error:
            raise no_engine(error) from error

    def containers(self, label: str) -> list[Container]:
        """Every container with a label (``key=value``), stopped ones too, by name. Raises CommandError."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            ids = self.run("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={label}").stdout.split()
            if not ids:
                return []
            try:
                data = self._described("inspect", "--type", "container", *ids)
            except CommandError as error:
                # Going, or still coming: the engine lists a container while it makes its volumes, for seconds, and
                # goes on with that when the caller that asked for it is gone.
                if "no such container" not in error.message.lower() or time.monotonic() >= deadline:
                    raise
                check_cancelled()
                time.sleep(0.2)
                continue
            return sorted((_container(entry) for entry in data), key=lambda container: container.name)

    def _described(self, *arguments: str) -> list[dict[str, Any]]:
        """What the client prints as JSON. On a busy machine it was seen to print nothing, and to call that success; it
        is asked again then. Raises CommandError, HarnessError."""
        for _ in range(DESCRIBE_ATTEMPTS):
            if text := self.run(*arguments).stdout.strip():
                found: list[dict[str, Any]] = json.loads(text)
                return found
            check_cancelled()
            time.sleep(0.2)
        raise HarnessError(f"`docker {' '.join(arguments[:2])}` printed nothing", hint="see `docker version`")

    def read(self, container: str, path: str) -> str:
        """A file of a container; empty when there is none. Raises CommandError for anything else."""
        script = '[ ! -e "$1" ] || cat -- "$1"'
        return self.run("exec", container, "sh", "-c", script, "sh", path).stdout

    def write(self, container: str, path: str, text: str) -> None:
        """Write a small file of a container, folders included. Raises CommandError.

        The text is an argument: on a busy machine ``docker exec --interactive`` was seen to end before its input had
        arrived, and to call that success."""
        script = 'mkdir -p -- "$(dirname -- "$1")" && printf %s "$2" >"$1.new" && mv -- "$1.new" "$1"'
        self.run("exec", container, "sh", "-c", script, "sh", path, text)

    def append(self, container: str, path: str, line: str) -> None:
        """Add a line to a file that cannot be replaced, as ``/etc/hosts``, which the engine mounts. Raises
        CommandError."""
        self.run("exec", container, "sh", "-c", 'printf "%s\\n" "$2" >>"$1"', "sh", path, line)

    def names(self, container: str, folder: str) -> list[str]:
        """The names in a folder of a container, sorted; empty when there is none. Raises CommandError."""
        script = '[ ! -d "$1" ] || ls -1 -- "$1"'
        return sorted(self.run("exec", container, "sh", "-c", script, "sh", folder).stdout.splitlines())

    def networks(self, name: str, label: str) -> list[str]:
        """The ids of the networks of exactly that name with a label. Raises CommandError."""
        chosen = ("--filter", f"name=^{re.escape(name)}$", "--filter", f"label={label}")
        return self.run("network", "ls", "--quiet", "--no-trunc", *chosen).stdout.split()

    def bridge(self, name: str) -> BridgeNetwork | None:
        """The network of that name; None: it has no bridge, or no IPv4. Raises CommandError."""
        (data,) = self._described("network", "inspect", name)
        configured = ((data.get("IPAM") or {}).get("Config")) or []
        for entry in configured:
            with contextlib.suppress(ValueError, KeyError):
                network, own = ipaddress.IPv4Network(entry["Subnet"]), ipaddress.IPv4Address(entry["Gateway"])
                break
        else:
            return None
        if data.get("Driver") != "bridge":
            return None
        given = (data.get("Options") or {}).get("com.docker.network.bridge.name")
        containers = (data.get("Containers") or {}).values()
        return BridgeNetwork(
            interface=str(given or f"br-{data['Id'][:12]}"),
            network=network,
            gateway=str(own),
            addresses=tuple(str(each.get("IPv4Address") or "").partition("/")[0] for each in containers),
        )

    def remove_network(self, network: str) -> None:
        """Remove a network that no container uses. Raises CommandError."""
        self.run("network", "rm", network, timeout_seconds=SETTLE_SECONDS)

    def volumes(self, label: str) -> list[str]:
        """The names of the volumes with a label. Raises CommandError."""
        return self.run("volume", "ls", "--quiet", "--filter", f"label={label}").stdout.split()

    def remove_volume(self, volume: str) -> None:
        """Remove a volume that no container uses. Raises CommandError."""
        self.run("volume", "rm", volume, timeout_seconds=SETTLE_SECONDS)

    def remove(self, container: str, path: str) -> None:
        """Remove a folder of a container. Raises CommandError."""
        self.run("exec", container, "rm", "-rf", "--", path)


def no_engine(error: CommandError) -> UsageError:
    """Why the client got no answer."""
    words = " ".join([error.message, *error.tail]).lower()
    if error.returncode is None and "not installed" in error.message:
        return UsageError("the program docker is not installed, or not on PATH", hint="install Docker Engine")
    if "permission denied" in words:
        return UsageError(
            "this user has no right to Docker's socket",
            hint="sudo usermod -aG docker $USER, then log in again; or set DOCKER_HOST",
        )
    if "cannot connect" in words or "is the docker daemon running" in words or "connection refused" in words:
        return UsageError("Docker is not running", hint="sudo systemctl start docker, or set DOCKER_HOST")
    if error.returncode is None:
        return UsageError(f"Docker gives no answer: {error.message}", hint="see `docker version`")
    return UsageError(f"Docker cannot be used: {error.message}", hint="see `docker version`")


def gateway(containers: Sequence[Container], *, what: str) -> str:
    """The address of this machine in the containers' network. Raises HarnessError when it is none of this machine's:
    rootless Docker and Docker Desktop keep their networks in their own place."""
    for container in containers:
        for address in container.networks.values():
            if not is_local(address):
                raise HarnessError(
                    f"the gateway {address} of {what}'s network is no address of this machine (rootless Docker, or "
                    "Docker Desktop?)",
                    hint="--node-ip ADDRESS names one that its containers reach",
                )
            return address
    raise HarnessError(f"{what} has no network with a gateway", hint="see `docker network inspect`")


def is_local(address: str) -> bool:
    """Whether a process of this machine could listen on that address."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except (OSError, ValueError):
        return False
    return True


def _container(data: Mapping[str, Any]) -> Container:
    networks = (data.get("NetworkSettings") or {}).get("Networks") or {}
    config = data.get("Config") or {}
    return Container(
        id=str(data["Id"]),
        name=str(data["Name"]).lstrip("/"),
        running=bool((data.get("State") or {}).get("Running")),
        created=str(data.get("Created") or ""),
        labels=config.get("Labels") or {},
        command=tuple(map(str, data.get("Args") or ())),
        environment=tuple(map(str, config.get("Env") or ())),
        networks={name: str(entry["Gateway"]) for name, entry in networks.items() if (entry or {}).get("Gateway")},
    )
