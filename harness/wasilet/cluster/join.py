"""Nodes on other machines: a self-contained bootstrap file, the proxies they need, and a systemd unit.

A cluster that listens on loopback gets a proxy on an address that other machines reach (``wasilet.cluster.tcp_proxy``);
one that is reachable anyway needs none. Proxies are long-lived processes like any other: listed by ``status``, repaired
by ``up``, ended by ``down``."""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from wasilet.controlplane.acquire import locate
from wasilet.controlplane.components import Component, component_step
from wasilet.controlplane.health import accepts
from wasilet.controlplane.local_registry import registry_component
from wasilet.errors import UsageError
from wasilet.kube.bootstrap_token import bootstrap_config, create_token, hand_over
from wasilet.kube.manifests import manifests_folder
from wasilet.providers.base import Cluster
from wasilet.providers.docker import is_local
from wasilet.providers.host import node_address
from wasilet.steps import Play, Step
from wasilet.storage import write_file

# On disk of clusters that run, and in what `status` prints: names that stay.
API_SERVER_PROXY = "apiserver-door"
REGISTRY_PROXY = "registry-door"
REGISTRY_LOGIN_SUFFIX = ".registry.json"
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_PORTS = {API_SERVER_PROXY: "apiserver_door", REGISTRY_PROXY: "registry_door"}


@dataclass(frozen=True, kw_only=True)
class Joining:
    """What ``invoke bootstrap`` made."""

    file: Path
    server: str
    token_id: str
    command: tuple[str, ...]
    """To be typed on the other machine."""

    registry: str = ""
    """``host:port`` by which that machine pulls from the local registry; empty: no proxy was asked for."""

    registry_login: Path | None = None
    """A docker ``config.json`` with a login for it, which can only read; None: no proxy was asked for."""


# --- proxies ---------------------------------------------------------------------------------------------------------


def proxies(cluster: Cluster) -> Mapping[str, Callable[[], Component]]:
    """Those that were asked for, by component name."""
    known = cluster.state.cluster.proxies
    made = {API_SERVER_PROXY: _apiserver_proxy, REGISTRY_PROXY: _registry_proxy}
    return {name: lambda name=name: made[name](cluster, known[name]) for name in made if name in known}  # type: ignore[misc]


def proxy_steps(cluster: Cluster, *, after: tuple[str, ...]) -> list[Step]:
    """The steps of ``up`` that repair them."""
    return [
        component_step(
            component, name, title=name.replace("-", " "), state=cluster.state, settings=cluster.settings, after=after
        )
        for name, component in proxies(cluster).items()
    ]


def _apiserver_proxy(cluster: Cluster, address: str) -> Component:
    parts = urlsplit(cluster.provider.access(cluster).server)
    host, port = parts.hostname or "127.0.0.1", cluster.ports()[_PORTS[API_SERVER_PROXY]]
    return Component(
        name=API_SERVER_PROXY,
        argv=(
            *(sys.executable, "-P", "-m", "wasilet.cluster.tcp_proxy", "--listen", f"{address}:{port}"),
            *("--to", f"{host}:{parts.port or 443}"),
        ),
        ports={"TLS": port},
        addresses=(address,),
        ready=lambda: accepts(address, port),
    )


def _registry_proxy(cluster: Cluster, address: str) -> Component:
    return registry_component(
        binary=cluster.binary("registry"),
        port=cluster.ports()[_PORTS[REGISTRY_PROXY]],
        state=cluster.state,
        name=REGISTRY_PROXY,
        address=address,
        readonly=True,
        # Not the one that may push: it is handed to other machines.
        login=(_reader_login(cluster).parent, [_registry_place(cluster, address)]),
    )


def _registry_place(cluster: Cluster, address: str) -> str:
    return f"{_host_of_url(address)}:{cluster.ports()[_PORTS[REGISTRY_PROXY]]}"


def _reader_login(cluster: Cluster) -> Path:
    """As docker writes one; it is there when the proxy is."""
    return cluster.state.path / "registry-reader" / "config.json"


# --- invoke bootstrap ------------------------------------------------------------------------------------------------


def bootstrap(
    cluster: Cluster,
    *,
    node: str,
    file: Path,
    address: str = "",
    registry: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Joining:
    """Make a token and a bootstrap file for a node of another machine, and the proxies it connects through.

    ``address``: of this machine, as that one reaches it; empty: that of the default route. ``registry``: whether it
    may pull from the local registry too. ``say`` receives a line about another run that has to be waited for. Raises
    UsageError, and HarnessError when a proxy does not start.
    """
    _check_node_name(node)
    make_known(cluster, node, local=False, say=say, what="invoke bootstrap")
    access = cluster.provider.access(cluster)
    server, server_name = access.server, ""
    if is_loopback(access.server) or registry:
        address = _checked_address(address or node_address(cluster.settings))
        wanted = ([API_SERVER_PROXY] if is_loopback(access.server) else []) + ([REGISTRY_PROXY] if registry else [])
        _open(cluster, wanted, address, say)
    if is_loopback(access.server):
        server = f"https://{_host_of_url(address)}:{cluster.ports()[_PORTS[API_SERVER_PROXY]]}"
        server_name = urlsplit(access.server).hostname or ""
    token = create_token(
        cluster.admin(), ttl_seconds=cluster.settings.token_ttl_seconds, description=f"for node {node}"
    )
    config = bootstrap_config(
        server=server, ca=access.ca, client_ca=access.client_ca, token=token, tls_server_name=server_name
    )
    hand_over(cluster.admin(), token, file, config)
    pull_from, login = "", None
    if registry:
        pull_from, login = _registry_place(cluster, address), file.with_name(file.name + REGISTRY_LOGIN_SUFFIX)
        write_file(login, _reader_login(cluster).read_bytes())
    command = ["wasilet-node", "--bootstrap-file", file.name, "--node-name", node]
    for taint in cluster.taints():
        command += ["--taint", taint]
    if login is not None:
        command += ["--insecure-registries", pull_from, "--registry-config", login.name]
    return Joining(
        file=file, server=server, token_id=token.id, command=tuple(command), registry=pull_from, registry_login=login
    )


def make_known(
    cluster: Cluster, node: str, *, local: bool, say: Callable[[str], None] = lambda _: None, what: str
) -> None:
    """Inform the approver of a node that will join. ``local``: it runs on this machine, beside the cluster's own nodes.
    Raises UsageError, StateError."""
    from wasilet.cluster.known_nodes import remember_node

    _check_node_name(node)
    timeout_seconds = cluster.settings.timeouts.lock_seconds
    with cluster.state.locked(timeout_seconds=timeout_seconds, say=say, what=what):
        remember_node(cluster, node, local=local)


def joining_lines(joining: Joining) -> list[str]:
    """What to print for the user."""
    lines = [
        f"{joining.file}: a token ({joining.token_id}) for {joining.server}; keep it private",
        f"on the other machine: {shlex.join(joining.command)}",
    ]
    if joining.registry:
        lines.append(
            f"images there: {joining.registry}/NAME (reading only, with the login in {joining.registry_login})"
        )
    return lines


def is_loopback(server: str) -> bool:
    """Whether a URL's host can be reached from this machine only."""
    host = urlsplit(server).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open(cluster: Cluster, names: Sequence[str], address: str, say: Callable[[str], None]) -> None:
    state, settings = cluster.state, cluster.settings
    found = locate("registry", cache=settings.cache, environ=settings.environ)
    if found is not None:
        cluster.binaries["registry"] = found.path
    with state.locked(timeout_seconds=settings.timeouts.lock_seconds, say=say, what="invoke bootstrap"):
        known = state.cluster.proxies
        state.allocate_ports({_PORTS[name]: 0 for name in names}, addresses=("127.0.0.1", address))
        state.update(proxies=dict(known) | dict.fromkeys(names, address))
        steps = [step for step in proxy_steps(cluster, after=()) if step.key in names]
        Play("proxies", steps).run().raise_for_failure()


def _checked_address(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise UsageError(f"{address!r} is no IP address") from None
    if parsed.is_loopback:
        raise UsageError(
            f"{address} is reached from this machine only", hint="--address names one that other machines reach"
        )
    if parsed.is_unspecified or not is_local(address):
        raise UsageError(f"{address} is no address of this machine")
    return address


def _host_of_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _check_node_name(node: str) -> None:
    if not _NODE_NAME.fullmatch(node):
        raise UsageError(f"{node!r} is no name for a node", hint="lower-case letters, digits, '-' and '.'")


# --- invoke node -----------------------------------------------------------------------------------------------------


def node_command(*, node: str, data_dir: str, bootstrap_file: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command line of an agent of this installation. Raises UsageError."""
    _check_node_name(node)
    return [
        *(sys.executable, "-P", "-m", "wasilet_node", "--node-name", node),
        *("--data-dir", _checked_path(data_dir), "--bootstrap-file", _checked_path(bootstrap_file), *arguments),
    ]


def systemd_unit(
    *, node: str, data_dir: str, bootstrap_file: str, user: str = "", arguments: Sequence[str] = ()
) -> str:
    """A unit that runs the agent of this installation. Raises UsageError for what a unit file cannot say."""
    import jinja2

    _check_node_name(node)
    if user and not re.fullmatch(r"[a-z_][-a-z0-9_]{0,31}", user):
        raise UsageError(f"{user!r} is no user's name")
    for argument in arguments:
        if re.search(r"[\x00-\x1f\\]", argument):
            raise UsageError(f"{argument!r} cannot stand in a unit file")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(manifests_folder()),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  (a unit file, not HTML; every value is checked above)
        keep_trailing_newline=True,
    )
    return environment.get_template("wasilet-node.service.j2").render(
        python=_checked_path(sys.executable),
        working_directory="/",
        node_name=node,
        data_dir=_checked_path(data_dir),
        bootstrap_file=_checked_path(bootstrap_file),
        arguments=[argument.replace("$", "$$") for argument in arguments],
        user="" if user == "root" else user,
        state_directory=_state_directory(data_dir) if user not in {"", "root"} else "",
    )


def unit_user(environ: Mapping[str, str]) -> str:
    """Whom a unit's node runs as by default: the user who asks for it, by sudo too. Root only for root itself, whose
    Python another user might not be able to read. Raises UsageError."""
    try:
        return environ.get("SUDO_USER") or pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise UsageError("this user has no name", hint="--user names whom the node runs as") from None


def _state_directory(data_dir: str) -> str:
    """What systemd can make for a user who may not write there."""
    path = PurePosixPath(data_dir)
    if not path.is_relative_to("/var/lib") or ".." in path.parts or " " in data_dir:
        return ""
    return str(path.relative_to("/var/lib"))


def write_unit(path: Path, text: str) -> None:
    """Write a unit, readable by all as systemd wants it. Raises StateError."""
    write_file(path, text.encode(), mode=0o644)


def _checked_path(path: str) -> str:
    """A path as it may stand in a unit: nothing that systemd would expand or unquote."""
    if not Path(path).is_absolute():
        raise UsageError(f"{path!r} must be an absolute path")
    if re.search(r"[\x00-\x1f\"'\\%$]", path):
        raise UsageError(f"{path!r} holds a character that a unit file would take for its own")
    return path
