"""What a pod resolves names by: resolv.conf, hosts and nsswitch.conf, as the kubelet makes them.

The policies are those of kubelet's ``pkg/kubelet/network/dns``: a search list has at most 32 domains of 2,048
characters together, three name servers count, and dnsConfig adds to whatever the policy gave.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_NAME_SERVERS = 3
MAX_SEARCH_DOMAINS = 32
MAX_SEARCH_CHARACTERS = 2048
CLUSTER_OPTIONS = ("ndots:5",)
MACHINE_RESOLV_CONF = Path("/etc/resolv.conf")
NSSWITCH = "hosts: files dns\n"


@dataclass(frozen=True, kw_only=True)
class ResolvConf:
    """The contents of a resolv.conf."""

    name_servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def text(self) -> str:
        """As the file holds it."""
        lines = [f"search {' '.join(self.searches)}"] if self.searches else []
        lines += [f"nameserver {server}" for server in self.name_servers]
        if self.options:
            lines.append(f"options {' '.join(self.options)}")
        return "".join(line + "\n" for line in lines)


def parse(text: str) -> ResolvConf:
    """What counts of a resolv.conf: of several search lines the last one."""
    servers: list[str] = []
    searches: tuple[str, ...] = ()
    options: list[str] = []
    for line in text.splitlines():
        words = line.split("#")[0].split(";")[0].split()
        if len(words) < 2:
            continue
        if words[0] == "nameserver":
            servers.append(words[1])
        elif words[0] in {"search", "domain"}:
            searches = tuple(word.rstrip(".") or "." for word in words[1:])
        elif words[0] == "options":
            options += words[1:]
    return ResolvConf(name_servers=tuple(servers), searches=searches, options=tuple(dict.fromkeys(options)))


def read_machine(path: Path = MACHINE_RESOLV_CONF) -> ResolvConf:
    """The machine's own; nothing where it has none."""
    try:
        return parse(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ResolvConf()


def for_pod(
    pod: dict[str, Any], *, cluster_dns: Sequence[str], cluster_domain: str, machine: ResolvConf
) -> tuple[ResolvConf, str]:
    """A pod's resolv.conf by dnsPolicy and dnsConfig, and what had to be left out of it (empty: nothing)."""
    spec = pod.get("spec", {})
    policy = spec.get("dnsPolicy") or "ClusterFirst"
    if policy == "ClusterFirst" and spec.get("hostNetwork"):
        policy = "Default"
    if policy == "None":
        base = ResolvConf()
    elif policy in {"ClusterFirst", "ClusterFirstWithHostNet"} and cluster_dns:
        namespace = pod["metadata"]["namespace"]
        own = (f"{namespace}.svc.{cluster_domain}", f"svc.{cluster_domain}", cluster_domain)
        base = ResolvConf(
            name_servers=tuple(cluster_dns), searches=_unique((*own, *machine.searches)), options=CLUSTER_OPTIONS
        )
    else:
        base = machine
    return _limited(_with_config(base, spec.get("dnsConfig") or {}))


def _with_config(base: ResolvConf, config: dict[str, Any]) -> ResolvConf:
    options = dict(_option(text) for text in base.options)
    for option in config.get("options") or ():
        options[str(option["name"])] = str(option.get("value") or "")
    return ResolvConf(
        name_servers=_unique((*base.name_servers, *map(str, config.get("nameservers") or ()))),
        searches=_unique((*base.searches, *map(str, config.get("searches") or ()))),
        options=tuple(f"{name}:{value}" if value else name for name, value in options.items()),
    )


def _option(text: str) -> tuple[str, str]:
    name, _, value = text.partition(":")
    return name, value


def _limited(conf: ResolvConf) -> tuple[ResolvConf, str]:
    problems = []
    servers = conf.name_servers[:MAX_NAME_SERVERS]
    if len(conf.name_servers) > MAX_NAME_SERVERS:
        problems.append(
            "Nameserver limits were exceeded, some nameservers have been omitted, "
            f"the applied nameserver line is: {' '.join(servers)}"
        )
    searches = list(conf.searches[:MAX_SEARCH_DOMAINS])
    while len(" ".join(searches)) > MAX_SEARCH_CHARACTERS:
        searches.pop()
    if len(searches) < len(conf.searches):
        problems.append(
            "Search Line limits were exceeded, some search paths have been omitted, "
            f"the applied search line is: {' '.join(searches)}"
        )
    limited = ResolvConf(name_servers=servers, searches=tuple(searches), options=conf.options)
    return limited, "; ".join(problems)


def _unique(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))


def bindings(folder: Path, *, etc: Path = Path("/etc")) -> tuple[tuple[str, str], ...]:
    """Where each of the files in ``folder`` has to be seen. A file that the machine does not have, or whose link leads
    nowhere, cannot be covered by another, so it is left out."""
    found = []
    for name in ("resolv.conf", "hosts", "nsswitch.conf"):
        place = os.path.realpath(etc / name)
        if os.path.isfile(place):  # noqa: PTH113 - a resolved path
            found.append((place, str(folder / name)))
    return tuple(found)


def write(folder: Path, resolv_conf: str, hosts: bytes) -> None:
    """Put a pod's files into ``folder``. They are public, as every process of the pod reads them. Raises OSError."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    for name, content in (
        ("resolv.conf", resolv_conf.encode()), ("hosts", hosts), ("nsswitch.conf", NSSWITCH.encode())
    ):  # fmt: skip
        # In place: a running pod has bound this very file.
        with (folder / name).open("wb") as file:
            file.write(content)
