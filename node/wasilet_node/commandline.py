"""The command line and environment, turned into ``NodeSettings``: every value is checked before anything is started.

Krustlet's flags and environment variables mean here what they meant there, so its command lines go on to work. Each
option is looked for as a flag, then as ``WASILET_NODE_*``, then under Krustlet's name.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from wasilet_node.command_parser import DEFAULT_BOOTSTRAP_FILE, EFFECTS, LOG_LEVELS, UsageError, make_parser
from wasilet_node.pods import origins
from wasilet_node.settings import ImageSettings, NetworkSettings, NodePaths, NodeSettings

_Value = TypeVar("_Value")

_DNS_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_DNS_NAME = re.compile(rf"{_DNS_LABEL}(?:\.{_DNS_LABEL})*")
_NAME_PART = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")
_REGISTRY = re.compile(rf"(?:{_DNS_LABEL}(?:\.{_DNS_LABEL})*|\[[0-9a-f:]+\])(?::[0-9]{{1,5}})?")
_MAX_LABEL_LENGTH = 63

_ALLOWED_LABELS = frozenset(
    {
        "kubernetes.io/hostname",
        "kubernetes.io/arch",
        "kubernetes.io/os",
        "beta.kubernetes.io/arch",
        "beta.kubernetes.io/os",
        "beta.kubernetes.io/instance-type",
        "node.kubernetes.io/instance-type",
        "topology.kubernetes.io/region",
        "topology.kubernetes.io/zone",
        "failure-domain.beta.kubernetes.io/region",
        "failure-domain.beta.kubernetes.io/zone",
    }
)
"""Those of Kubernetes' own that a node may give itself (k8s.io/kubelet/pkg/apis/well_known_labels.go)."""

_ALLOWED_LABEL_SUFFIXES = ("kubelet.kubernetes.io", "node.kubernetes.io")


@dataclass(frozen=True, kw_only=True)
class RunCommand:
    """Run the agent."""

    settings: NodeSettings
    kubeconfig: Path | None
    """Where a copy of the node's kubeconfig is wanted (KUBECONFIG, as Krustlet)."""

    log_level: str


@dataclass(frozen=True, kw_only=True)
class ShutdownCommand:
    """Stop the agent of a data folder, its containers and its supervisors."""

    data: Path
    timeout_seconds: float
    log_level: str


@dataclass(frozen=True, kw_only=True)
class ComponentHostCommand:
    """Have the component host: find it, or build it."""

    check: bool
    """Only look."""

    log_level: str


Command = RunCommand | ShutdownCommand | ComponentHostCommand


def parse(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    *,
    version: str,
    hostname: Callable[[], str] = socket.gethostname,
) -> Command:
    """Raises UsageError; ``--help`` and ``--version`` raise SystemExit."""
    values = make_parser(version).parse_args(arguments)
    options = _Options(values, environ)
    log_level = options.get("log_level", ("WASILET_NODE_LOG_LEVEL",), _one_of(LOG_LEVELS)) or "info"
    data = options.get("data_dir", ("WASILET_NODE_DATA_DIR", "KRUSTLET_DATA_DIR"), _absolute) or default_data_dir(
        environ
    )
    if values.command == "shutdown":
        timeout = options.get("timeout", (), _seconds) or 10.0
        return ShutdownCommand(data=data, timeout_seconds=timeout, log_level=log_level)
    if values.command == "component-host":
        return ComponentHostCommand(check=values.check, log_level=log_level)
    return RunCommand(
        settings=_settings(options, data, hostname), kubeconfig=_kubeconfig(options, environ), log_level=log_level
    )


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """``$XDG_DATA_HOME/wasilet/node``, by default beneath ``~/.local/share``."""
    base = environ.get("XDG_DATA_HOME", "")
    if base.startswith("/"):
        return Path(base) / "wasilet" / "node"
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        raise UsageError("there is no HOME; say where to keep data with --data-dir")
    return Path(home) / ".local" / "share" / "wasilet" / "node"


class _Options:
    """A flag, or the first environment variable that is set and not empty, checked."""

    def __init__(self, values: argparse.Namespace, environ: Mapping[str, str]) -> None:
        self._values = vars(values)
        self._environ = environ

    def get(self, name: str, variables: Sequence[str], check: Callable[[str], _Value]) -> _Value | None:
        for origin, text in self._texts(name, variables):
            return self._checked(origin, text, check)
        return None

    def get_all(self, name: str, variables: Sequence[str], check: Callable[[str], _Value]) -> list[_Value]:
        """A list, by commas or by repetition."""
        return [
            self._checked(origin, part.strip(), check)
            for origin, text in self._texts(name, variables)
            for part in text.split(",")
            if part.strip()
        ]

    def _texts(self, name: str, variables: Sequence[str]) -> list[tuple[str, str]]:
        given = self._values.get(name)
        if given is not None:
            flag = f"--{name.replace('_', '-')}"
            return [(flag, text) for text in (given if isinstance(given, list) else [given])]
        for variable in variables:
            text = self._environ.get(variable, "")
            if text:
                return [(variable, text)]
        return []

    @staticmethod
    def _checked(origin: str, text: str, check: Callable[[str], _Value]) -> _Value:
        try:
            return check(text)
        except ValueError as error:
            raise UsageError(f"{origin} {text!r}: {error}") from error


def _settings(options: _Options, data: Path, hostname: Callable[[], str]) -> NodeSettings:
    name = options.get("node_name", ("WASILET_NODE_NAME", "KRUSTLET_NODE_NAME"), _node_name)
    host = options.get("hostname", ("WASILET_NODE_HOSTNAME", "KRUSTLET_HOSTNAME"), _host)
    if host is None:
        # Any client that selects by the label kubernetes.io/hostname takes it for the node's name, and several nodes of
        # one machine must differ in it: kubelet, too, has one name for both. A label is shorter than a name may be.
        host = name if name and len(name) <= _MAX_LABEL_LENGTH else _own_name(hostname())
    labels = dict(options.get_all("node_labels", ("WASILET_NODE_LABELS", "NODE_LABELS"), _label))
    taints = options.get_all("taint", ("WASILET_NODE_TAINTS",), _taint)
    seen = set()
    for taint in taints:
        identity = (taint.partition("=")[0].partition(":")[0], taint.rpartition(":")[2])
        if identity in seen:
            raise UsageError(f"--taint {taint!r}: there is another with this key and effect")
        seen.add(identity)
    port = options.get("port", ("WASILET_NODE_PORT", "KRUSTLET_PORT"), _number(0, 65535))
    return NodeSettings(
        node_name=name or host,
        paths=NodePaths(data=data),
        bootstrap_file=_bootstrap_file(options),
        node_ip=options.get("node_ip", ("WASILET_NODE_IP", "KRUSTLET_NODE_IP"), _node_ip),
        hostname=host,
        port=10250 if port is None else port,
        bind_address=options.get("bind_address", ("WASILET_NODE_BIND_ADDRESS", "KRUSTLET_ADDRESS"), _ip),
        labels=labels,
        taints=tuple(taints),
        max_pods=options.get("max_pods", ("WASILET_NODE_MAX_PODS", "MAX_PODS"), _number(1, 100_000)) or 110,
        images=ImageSettings(
            insecure_registries=tuple(
                options.get_all(
                    "insecure_registries",
                    ("WASILET_NODE_INSECURE_REGISTRIES", "KRUSTLET_INSECURE_REGISTRIES"),
                    _registry,
                )
            ),
            registry_config=options.get("registry_config", ("WASILET_NODE_REGISTRY_CONFIG",), _absolute),
        ),
        local_origins=tuple(
            options.get_all("allow_local_origins", ("WASILET_NODE_ALLOW_LOCAL_ORIGINS",), _http_origin)
        ),
        outbound_policy=options.get("outbound_policy", ("WASILET_NODE_OUTBOUND_POLICY",), _absolute),
        provider_id=options.get("provider_id", ("WASILET_NODE_PROVIDER_ID",), str),
        network=_network(options),
        network_absent=options.get("pod_network_absent", ("WASILET_NODE_POD_NETWORK_ABSENT",), str) or "",
    )


def _network(options: _Options) -> NetworkSettings | None:
    cluster = options.get("cluster_cidr", ("WASILET_NODE_CLUSTER_CIDR",), ipaddress.IPv4Network)
    if cluster is None:
        return None
    service = options.get("service_cidr", ("WASILET_NODE_SERVICE_CIDR",), ipaddress.IPv4Network)
    uplink = options.get("uplink", ("WASILET_NODE_UPLINK",), ipaddress.IPv4Interface)
    if service is None or uplink is None:
        raise UsageError("--cluster-cidr needs --service-cidr and --uplink as well")
    if service.overlaps(cluster):
        raise UsageError(f"--service-cidr {service} overlaps --cluster-cidr {cluster}")
    bridge = options.get("uplink_bridge", ("WASILET_NODE_UPLINK_BRIDGE",), str)
    gateway = options.get("uplink_gateway", ("WASILET_NODE_UPLINK_GATEWAY",), ipaddress.IPv4Address)
    if (bridge is None) != (gateway is None):
        raise UsageError("--uplink-bridge and --uplink-gateway go together")
    if gateway is not None and gateway not in uplink.network:
        raise UsageError(f"--uplink-gateway {gateway} is not in the network of --uplink {uplink}")
    proxy = options.get("kube_proxy", ("WASILET_NODE_KUBE_PROXY",), _absolute)
    kubeconfig = options.get("kube_proxy_kubeconfig", ("WASILET_NODE_KUBE_PROXY_KUBECONFIG",), _absolute)
    if (proxy is None) != (kubeconfig is None):
        raise UsageError("--kube-proxy and --kube-proxy-kubeconfig go together")
    policies = options.get("network_policies_kubeconfig", ("WASILET_NODE_NETWORK_POLICIES_KUBECONFIG",), _absolute)
    return NetworkSettings(
        cluster_cidr=cluster,
        service_cidr=service,
        uplink=uplink,
        bridge=bridge,
        gateway=gateway,
        keeper=options.get("network_keeper", ("WASILET_NODE_NETWORK_KEEPER",), _absolute),
        cluster_dns=tuple(options.get_all("cluster_dns", ("WASILET_NODE_CLUSTER_DNS",), _ip)),
        cluster_domain=options.get("cluster_domain", ("WASILET_NODE_CLUSTER_DOMAIN",), str) or "cluster.local",
        kube_proxy=proxy,
        kube_proxy_kubeconfig=kubeconfig,
        network_policies_kubeconfig=policies,
    )


def _bootstrap_file(options: _Options) -> Path | None:
    path = options.get("bootstrap_file", ("WASILET_NODE_BOOTSTRAP_FILE", "KRUSTLET_BOOTSTRAP_FILE"), _absolute)
    if path is not None:
        return path
    return DEFAULT_BOOTSTRAP_FILE if DEFAULT_BOOTSTRAP_FILE.exists() else None


def _kubeconfig(options: _Options, environ: Mapping[str, str]) -> Path | None:
    # kubectl reads a list of files there; a list is no place to write to.
    if os.pathsep in environ.get("KUBECONFIG", ""):
        return options.get("kubeconfig", (), _absolute)
    return options.get("kubeconfig", ("KUBECONFIG",), _absolute)


def _own_name(name: str) -> str:
    try:
        return _host(name)
    except ValueError:
        raise UsageError(
            f"the machine's host name {name!r} cannot be a node's; give one with --hostname and --node-name"
        ) from None


def _node_name(text: str) -> str:
    if len(text) > 253 or not _DNS_NAME.fullmatch(text):
        raise ValueError("a node's name is made of lower-case letters, digits, '-' and '.'")
    return text


def _host(text: str) -> str:
    name = text.lower().rstrip(".")
    if len(name) > _MAX_LABEL_LENGTH or not (_DNS_NAME.fullmatch(name) or _is_ip(name)):
        raise ValueError("not a host name of at most 63 characters")
    return name


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("not an IP address") from None


def _node_ip(text: str) -> str:
    address = ipaddress.ip_address(_ip(text))
    if address.is_unspecified or address.is_multicast:
        raise ValueError("no other machine can reach that address")
    return str(address)


def _absolute(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _number(lowest: int, highest: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and lowest <= int(text) <= highest):
            raise ValueError(f"not a number from {lowest} to {highest}")
        return int(text)

    return check


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 600:
        raise ValueError("not a number of seconds up to 600")
    return seconds


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return text.lower()

    return check


def _label(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    _check_key(key)
    _check_label_value(value)
    namespace = key.rpartition("/")[0]
    if _within(namespace, ("kubernetes.io", "k8s.io")) and not (
        key in _ALLOWED_LABELS or _within(namespace, _ALLOWED_LABEL_SUFFIXES)
    ):
        raise ValueError(
            "the API server forbids a node to give itself this label (NodeRestriction); an admin may: "
            f"kubectl label node NAME {key}={value}"
        )
    return key, value


def _within(namespace: str, suffixes: Sequence[str]) -> bool:
    return any(namespace == suffix or namespace.endswith(f".{suffix}") for suffix in suffixes)


def _taint(text: str) -> str:
    pair, _, effect = text.rpartition(":")
    if effect not in EFFECTS or not pair:
        raise ValueError(f"not KEY[=VALUE]:EFFECT with an effect of {', '.join(EFFECTS)}")
    key, _, value = pair.partition("=")
    _check_key(key)
    _check_label_value(value)
    return text


def _check_key(key: str) -> None:
    prefix, slash, name = key.rpartition("/")
    if not (0 < len(name) <= 63 and _NAME_PART.fullmatch(name)):
        raise ValueError(f"{key!r} is not a label key")
    if slash and not (len(prefix) <= 253 and _DNS_NAME.fullmatch(prefix)):
        raise ValueError(f"{key!r} is not a label key: {prefix!r} is not a DNS name")


def _check_label_value(value: str) -> None:
    if len(value) > 63 or (value and not _NAME_PART.fullmatch(value)):
        raise ValueError(f"{value!r} is not a label value")


def _http_origin(text: str) -> str:
    try:
        return origins.checked(text)
    except origins.OriginError as error:
        raise ValueError("not an origin, as http://127.0.0.1:8090") from error


def _registry(text: str) -> str:
    host = text.lower()
    if not _REGISTRY.fullmatch(host):
        raise ValueError("not HOST[:PORT] of a registry")
    return host


def terminal_error(message: str) -> None:
    """One line for a person."""
    sys.stderr.write(f"node: {message}\n")
