"""Every setting of the harness, as frozen dataclasses: a docstring and a unit under each field.

The values here are the defaults; ``invoke.yaml`` shows those that people may want to change, a ``~/.invoke.yaml`` or
``INVOKE_...`` variables override them (Invoke reads all three), and ``WASILET_*`` variables override everything but
the command line. Nothing but :func:`load` reads the environment.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from wasilet.errors import UsageError

DEFAULT_NAME = "wasilet"
POD_SECURITY_LEVELS = ("privileged", "baseline", "restricted")
"""Kubernetes' Pod Security Standards, from all to little."""

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")

KRUSTLET_TAINTS = (
    "kubernetes.io/arch=wasm32-wasi:NoSchedule",
    "kubernetes.io/arch=wasm32-wasi:NoExecute",
)
"""What Krustlet's manifests tolerate; for providers whose cluster has other nodes too."""


def cache_root(environ: Mapping[str, str] | None = None) -> Path:
    """Where what was downloaded or built is kept, for all clusters of this user: ``$WASILET_CACHE``, else
    ``~/.cache/wasilet``. It may not exist yet."""
    return _root("WASILET_CACHE", "XDG_CACHE_HOME", ".cache", environ)


def state_root(environ: Mapping[str, str] | None = None) -> Path:
    """Where the folders of clusters are: ``$WASILET_STATE_HOME``, else ``~/.local/state/wasilet``."""
    return _root("WASILET_STATE_HOME", "XDG_STATE_HOME", ".local/state", environ)


def _root(own: str, xdg: str, default: str, environ: Mapping[str, str] | None) -> Path:
    environ = os.environ if environ is None else environ
    if given := environ.get(own):
        return Path(environ.get("WASILET_INVOCATION_DIR") or Path.cwd()) / Path(given).expanduser()
    # "All paths set in these environment variables must be absolute. If an implementation encounters a relative path
    # [...] it should consider the path invalid and ignore it." (XDG Base Directory Specification)
    if (base := environ.get(xdg, "")).startswith("/"):
        return Path(base) / "wasilet"
    home = environ.get("HOME", "")
    return (Path(home) if home.startswith("/") else Path.home()) / default / "wasilet"


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
    """As ``1.37.2``; host: also a minor, as ``1.36``, of those that are supported. Empty: the newest (host), the tool's
    own (kind, k3d, minikube)."""

    config: Path | None = None
    """The provider's own file: a cluster configuration of kind or k3d, the kubeconfig of an existing cluster."""

    context: str = ""
    """Which context of the kubeconfig names the existing cluster. Never guessed: the current one may be anyone's."""

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

    local_origins: tuple[str, ...] = ()
    """Origins on this machine that pods' modules may call when their annotation lists them, as
    ``http://127.0.0.1:8090``; empty: those of the cluster so far. The API that a demo starts is always among them."""

    outbound_policy: Path | None = None
    """A file that says which namespaces may call what by HTTP, above what pods' annotations list; kept for the cluster.
    None: that of the cluster so far, if any."""

    pod_network: bool = True
    """Whether pods of a new cluster get their own network where this machine allows it (host)."""

    pod_cidr: str = ""
    """The range of the pods' addresses of a new cluster (host); empty: one that this machine has no route to."""

    service_cidr: str = ""
    """The range of the Services' addresses of a new cluster (host); empty: one that this machine has no route to."""

    pod_security: str = ""
    """What the API server lets pods of a namespace without PodSecurity labels do (host): ``privileged``, ``baseline``
    or ``restricted``; empty: as the cluster was made, ``baseline`` for a new one."""

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
    "WASILET_LOCAL_ORIGINS": "local_origins",
    "WASILET_OUTBOUND_POLICY": "outbound_policy",
    "WASILET_POD_NETWORK": "pod_network",
    "WASILET_POD_CIDR": "pod_cidr",
    "WASILET_SERVICE_CIDR": "service_cidr",
    "WASILET_POD_SECURITY": "pod_security",
}
INVOKE_PREFIX = "INVOKE_WASILET_"

_NUMBERS = frozenset({"nodes", "max_pods", "token_ttl_seconds"})
_FLAGS = frozenset({"yes", "download", "install", "approve_any", "pod_network"})
_PATHS = frozenset({"kubeconfig", "config", "outbound_policy"})
_TRUE, _FALSE = frozenset({"1", "yes", "true", "on", "y"}), frozenset({"0", "no", "false", "off", "n"})


def load(
    config: Mapping[str, Any] | None = None, /, *, environ: Mapping[str, str] | None = None, **given: Any
) -> Settings:
    """Defaults, then ``config`` (the ``wasilet`` section of invoke.yaml), then ``WASILET_*``, then ``given`` (the
    command line; None or an empty string means not given). Raises UsageError for a value that makes no sense."""
    environ = dict(os.environ if environ is None else environ)
    if not isinstance(config, Mapping | None):
        raise UsageError(f"the section wasilet of invoke.yaml must be a mapping, not {config!r}")
    values = {key: _typed(f"setting {key}", key, value) for key, value in (config or {}).items()}
    for variable, key in _ENVIRONMENT.items():
        if environ.get(variable):
            values[key] = _typed(variable, key, environ[variable])
    for key, value in given.items():
        if value is not None and value != "":
            values[key] = _typed(f"setting {key}", key, value)
    return _checked(replace(Settings(environ=environ), **values))


def from_invoke_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    """``INVOKE_WASILET_*`` as a section of a configuration file would hold it: Invoke names a variable by the path of
    its setting. Read here, not by Invoke, to which ``INVOKE_WASILET_DOWNLOAD=false`` is true and ``NODES=x`` a crash.
    Raises UsageError."""
    section: dict[str, Any] = {}
    for variable, text in sorted(environ.items()):
        if not variable.startswith(INVOKE_PREFIX) or not text:
            continue
        key = variable.removeprefix(INVOKE_PREFIX).lower()
        for name, kind in (("ports", PortSettings), ("timeouts", TimeoutSettings)):
            if key.startswith(f"{name}_"):
                part = key.removeprefix(f"{name}_")
                section.setdefault(name, {})[part] = getattr(_section(kind, name, {part: text}, variable), part)
                break
        else:
            section[key] = _typed(variable, key, text)
    return section


def flag(name: str, value: Any) -> bool:
    """A boolean of a file or of the environment. Raises UsageError that names it."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise UsageError(f"{name} must be true or false, not {value!r}")


def environment_flag(environ: Mapping[str, str], variable: str, *, default: bool = False) -> bool:
    """A boolean variable; empty is not set. Raises UsageError."""
    text = environ.get(variable, "")
    return flag(variable, text) if text else default


def _typed(name: str, key: str, value: Any) -> Any:
    """``value`` as the setting ``key`` has it; ``name`` is what messages call it. Raises UsageError."""
    known = {f.name for f in fields(Settings)} - {"environ"}
    if key not in known:
        raise UsageError(
            f"unknown setting: {name.removeprefix('setting ')}", hint=f"known are: {', '.join(sorted(known))}"
        )
    if key == "ports":
        return _section(PortSettings, key, value)
    if key == "timeouts":
        return _section(TimeoutSettings, key, value)
    if key in _NUMBERS:
        return _whole(name, value)
    if key in _FLAGS:
        return flag(name, value)
    if key == "taints":
        return None if value is None else _texts(name, [value] if isinstance(value, str) else value)
    if key == "local_origins":
        return _texts(name, value.split(",") if isinstance(value, str) else value or ())
    if key in _PATHS:
        if not isinstance(value, str | Path | None):
            raise UsageError(f"{name} must be a path, not {value!r}")
        return Path(value).expanduser().absolute() if isinstance(value, str) else value
    if not isinstance(value, str):
        raise UsageError(f"{name} must be a text, not {value!r}", hint=f'write "{value}"')
    return value


def _section(kind: type[Any], name: str, value: Any, shown: str = "") -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise UsageError(f"setting {name} must be a mapping")
    known = {f.name: f.type for f in fields(kind)}
    if unknown := sorted(map(str, set(value) - set(known))):
        raise UsageError(f"unknown setting: {shown or f'{name}.{unknown[0]}'}", hint=f"known are: {', '.join(known)}")
    check = _whole if kind is PortSettings else _duration
    return kind(**{key: check(shown or f"setting {name}.{key}", v) for key, v in value.items()})


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{name} must be a list of texts, not {value!r}")
    return tuple(item.strip() for item in value if item.strip())


def _whole(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = value.strip() if isinstance(value, str) else ""
    if not re.fullmatch(r"[-+]?[0-9]{1,18}", text, re.ASCII):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    return int(text)


def _duration(name: str, value: Any) -> float:
    try:
        seconds = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise UsageError(f"{name} must be a number of seconds, not {value!r}")
    return seconds


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
    if settings.pod_security and settings.pod_security not in POD_SECURITY_LEVELS:
        raise UsageError(
            f"setting pod_security: {settings.pod_security!r} is no level of the Pod Security Standards",
            hint=f"one of {', '.join(POD_SECURITY_LEVELS)}",
        )
    if not 60 <= settings.token_ttl_seconds <= 365 * 86400:
        raise UsageError("setting token_ttl_seconds: between a minute and a year")
    shape = r"v?\d+\.\d+(\.\d+)?" if settings.provider == "host" else r"v?\d+\.\d+\.\d+"
    if settings.kubernetes_version and not re.fullmatch(shape, settings.kubernetes_version):
        raise UsageError(f"{settings.kubernetes_version!r} is no version of Kubernetes", hint="write it as 1.37.2")
    if settings.image and settings.kubernetes_version:
        raise UsageError("--image and --kubernetes-version both say which version runs", hint="give one of them")
    if settings.config is not None and not settings.config.is_file():
        raise UsageError(f"there is no file {settings.config}")
    if settings.outbound_policy is not None and not settings.outbound_policy.is_file():
        raise UsageError(f"setting outbound_policy: there is no file {settings.outbound_policy}")
    for origin in settings.local_origins:
        if not re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s/:@\[\]]+)(:\d{1,5})?/?", origin):
            raise UsageError(
                f"setting local_origins: {origin!r} is no origin", hint="write it as http://127.0.0.1:8090"
            )
    for taint in settings.taints or ():
        if not re.fullmatch(r"[^=:\s]+(=[^=:\s]*)?:(NoSchedule|PreferNoSchedule|NoExecute)", taint):
            raise UsageError(
                f"{taint!r} is no taint", hint="write key=value:NoSchedule (or PreferNoSchedule, NoExecute)"
            )
    return settings


def invocation_path(path: str) -> str:
    """A path as typed: relative to the folder that ``run`` was called in, which Invoke leaves."""
    base = os.environ.get("WASILET_INVOCATION_DIR") or os.getcwd()  # noqa: PTH109
    return os.path.normpath(os.path.join(base, os.path.expanduser(path)))  # noqa: PTH111, PTH118
