"""Every setting of the harness, as frozen dataclasses: a docstring and a unit under each field.

The values here are the defaults; ``invoke.yaml`` shows those that people may want to change, a ``~/.invoke.yaml`` or
``INVOKE_...`` variables override them (Invoke reads all three), and ``WASILET_*`` variables override everything but
the command line. Nothing but :func:`load` reads the environment.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from harness.errors import UsageError

DEFAULT_NAME = "wasilet"
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")

KRUSTLET_TAINTS = (
    "kubernetes.io/arch=wasm32-wasi:NoSchedule",
    "kubernetes.io/arch=wasm32-wasi:NoExecute",
)
"""What Krustlet's manifests tolerate; for providers whose cluster has other nodes too."""


def cache_root(environ: Mapping[str, str] | None = None) -> Path:
    """Where what was downloaded or built is kept, for all clusters of this user: ``$WASILET_CACHE``, else the
    platform's cache folder (``~/.cache/wasilet``). It may not exist yet."""
    environ = os.environ if environ is None else environ
    if given := environ.get("WASILET_CACHE"):
        return Path(given).expanduser().absolute()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "wasilet"
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("wasilet", appauthor=False))


def state_root(environ: Mapping[str, str] | None = None) -> Path:
    """Where the folders of clusters are: ``$WASILET_STATE_HOME``, else ``~/.local/state/wasilet``."""
    environ = os.environ if environ is None else environ
    if given := environ.get("WASILET_STATE_HOME"):
        return Path(given).expanduser().absolute()
    if xdg := environ.get("XDG_STATE_HOME"):
        return Path(xdg) / "wasilet"
    from platformdirs import user_state_dir

    return Path(user_state_dir("wasilet", appauthor=False))


def checked_name(name: str, *, what: str = "cluster") -> str:
    """``name`` itself when it is a DNS label (RFC 1123, which Kubernetes asks of names); UsageError otherwise."""
    if not _DNS_LABEL.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a {what}",
            hint="1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
        )
    return name


@dataclass(frozen=True, kw_only=True)
class PortSettings:
    """TCP ports of the host provider. 0: Wasilet chooses a free one and remembers it; anything else is used as it is,
    and it is an error when something listens there."""

    apiserver: int = 0
    registry: int = 0
    etcd: int = 0
    etcd_peer: int = 0
    controller_manager: int = 0
    scheduler: int = 0
    kubelet: int = 0
    """The first node's; further nodes take free ones."""


@dataclass(frozen=True, kw_only=True)
class TimeoutSettings:
    """Limits of waits. Each names what it waited for when it runs out."""

    ready_seconds: float = 60.0
    """For one component to become ready."""

    node_ready_seconds: float = 60.0
    """For a node to join and become Ready."""

    stop_grace_seconds: float = 2.0
    """Between SIGTERM and SIGKILL of a control-plane component."""

    node_stop_seconds: float = 10.0
    """For a node to end its containers."""

    lock_seconds: float = 600.0
    """For another run on the same cluster to end."""

    poll_seconds: float = 0.05
    """Between two looks at something that becomes ready."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One cluster, and how to go about it."""

    name: str = DEFAULT_NAME
    """A DNS label; also names the folder of its state and the kubeconfig context."""

    provider: str = "host"
    """``host``, ``kind``, ``k3d``, ``minikube`` or ``existing``."""

    nodes: int = 0
    """How many wasm nodes join; 0: as many as the cluster has, one for a new cluster."""

    taints: tuple[str, ...] | None = None
    """``key=value:Effect`` that new nodes register; None: what the provider needs (none on host)."""

    node_ip: str = ""
    """The address nodes advertise; empty: found."""

    kubeconfig: Path | None = None
    """Write the context to this file alone; None: add it to the user's own kubeconfig."""

    image: str = ""
    """The node image of a new cluster (kind, k3d); empty: the tool's own, or that of ``kubernetes_version``."""

    kubernetes_version: str = ""
    """Of a new cluster, as ``1.34.4`` (kind, k3d, minikube); empty: the tool's own."""

    config: Path | None = None
    """The provider's own file: a cluster configuration of kind or k3d, the kubeconfig of an existing cluster."""

    context: str = ""
    """Which context of the kubeconfig names the existing cluster. Never guessed: the current one may be anybody's."""

    yes: bool = False
    """Whether an existing cluster may be changed."""

    approve_any: bool = False
    """Whether the approver serves every node of a cluster that is not Wasilet's own, too; else only those that it
    runs or that `bootstrap` and `token create --node` named."""

    mirror: str = ""
    """A base URL that replaces the official download hosts of the control-plane binaries."""

    download: bool = True
    """Whether binaries may be downloaded at all; else they are found or built."""

    install: bool = True
    """Whether missing system packages may be installed (as root, on Debian and Ubuntu)."""

    max_pods: int = 0
    """How many pods each node takes; 0: the node's own default, 110."""

    token_ttl_seconds: int = 3600
    """How long a bootstrap token lives."""

    ports: PortSettings = PortSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    environ: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """The environment this run was started with; components get a chosen part of it."""

    @property
    def context_name(self) -> str:
        """The context, cluster and user name in the kubeconfig: ``wasilet`` or ``wasilet-<name>``."""
        return self.name if self.name == DEFAULT_NAME else f"{DEFAULT_NAME}-{self.name}"

    @property
    def cache(self) -> Path:
        """See :func:`cache_root`."""
        return cache_root(self.environ)

    @property
    def state_root(self) -> Path:
        """See :func:`state_root`."""
        return state_root(self.environ)


_ENVIRONMENT = {
    "WASILET_NAME": "name",
    "WASILET_PROVIDER": "provider",
    "WASILET_NODES": "nodes",
    "WASILET_NODE_IP": "node_ip",
    "WASILET_MIRROR": "mirror",
    "WASILET_DOWNLOAD": "download",
    "WASILET_INSTALL": "install",
}


def load(
    config: Mapping[str, Any] | None = None, /, *, environ: Mapping[str, str] | None = None, **given: Any
) -> Settings:
    """Defaults, then ``config`` (the ``wasilet`` section of invoke.yaml), then ``WASILET_*``, then ``given`` (the
    command line; None or an empty string means not given). Raises UsageError for a value that makes no sense."""
    environ = dict(os.environ if environ is None else environ)
    values: dict[str, Any] = {}
    for key, value in (config or {}).items():
        if key == "ports":
            values["ports"] = _section(PortSettings, key, value)
        elif key == "timeouts":
            values["timeouts"] = _section(TimeoutSettings, key, value)
        else:
            values[key] = value
    for variable, key in _ENVIRONMENT.items():
        if environ.get(variable):
            values[key] = environ[variable]
    values |= {key: value for key, value in given.items() if value is not None and value != ""}
    known = {f.name for f in fields(Settings)}
    if unknown := sorted(set(values) - known):
        raise UsageError(f"unknown setting: {', '.join(unknown)}", hint=f"known are: {', '.join(sorted(known))}")
    return _checked(replace(Settings(environ=environ), **_typed(values)))


def _section(kind: type[Any], name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise UsageError(f"setting {name} must be a mapping")
    known = {f.name: f.type for f in fields(kind)}
    if unknown := sorted(set(value) - set(known)):
        raise UsageError(f"unknown setting: {name}.{unknown[0]}", hint=f"known are: {', '.join(known)}")
    number = int if kind is PortSettings else float
    return kind(**{key: _number(f"{name}.{key}", v, number) for key, v in value.items()})


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    typed = dict(values)
    for key in ("nodes", "max_pods", "token_ttl_seconds"):
        if key in typed:
            typed[key] = _number(key, typed[key], int)
    for key in ("download", "install", "approve_any"):
        if isinstance(typed.get(key), str):
            typed[key] = typed[key].strip().lower() not in {"0", "no", "false", "off"}
    if "taints" in typed and typed["taints"] is not None:
        taints = typed["taints"]
        typed["taints"] = (taints,) if isinstance(taints, str) else tuple(taints)
    for key in ("kubeconfig", "config"):
        if isinstance(typed.get(key), str):
            typed[key] = Path(typed[key]).expanduser().absolute()
    return typed


def _number(name: str, value: Any, kind: type[int | float]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise UsageError(f"setting {name} must be a number, not {value!r}") from None


def _check_address(text: str) -> None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise UsageError(f"{text!r} is no IP address", hint="--node-ip takes one of this machine's") from None
    if address.is_unspecified or address.is_multicast:
        raise UsageError(f"{text!r} is no address that nodes can have", hint="--node-ip takes one of this machine's")


def _checked(settings: Settings) -> Settings:
    checked_name(settings.name)
    if not 0 <= settings.nodes <= 50:
        raise UsageError(f"{settings.nodes} nodes: between 1 and 50 can join")
    if not 0 <= settings.max_pods <= 100_000:
        raise UsageError(f"setting max_pods: between 1 and 100000, not {settings.max_pods}")
    if settings.node_ip:
        _check_address(settings.node_ip)
    for port in fields(PortSettings):
        value = getattr(settings.ports, port.name)
        if not 0 <= value <= 65535:
            raise UsageError(f"setting ports.{port.name}: {value} is no TCP port")
    if not 60 <= settings.token_ttl_seconds <= 365 * 86400:
        raise UsageError("setting token_ttl_seconds: between a minute and a year")
    if settings.kubernetes_version and not re.fullmatch(r"v?\d+\.\d+\.\d+", settings.kubernetes_version):
        raise UsageError(f"{settings.kubernetes_version!r} is no version of Kubernetes", hint="write it as 1.34.4")
    if settings.image and settings.kubernetes_version:
        raise UsageError("--image and --kubernetes-version both say which version runs", hint="give one of them")
    if settings.config is not None and not settings.config.is_file():
        raise UsageError(f"there is no file {settings.config}")
    for taint in settings.taints or ():
        if not re.fullmatch(r"[^=:\s]+(=[^=:\s]*)?:(NoSchedule|PreferNoSchedule|NoExecute)", taint):
            raise UsageError(
                f"{taint!r} is no taint", hint="write key=value:NoSchedule (or PreferNoSchedule, NoExecute)"
            )
    return settings
