"""``existing``: any cluster that a kubeconfig names. Wasm nodes of this machine join it; nothing of it is created.

The context must be typed: the current one may be someone's production. What would be added is printed first, and
nothing is changed before ``--yes``. MicroK8s, kubeadm and managed clusters use this provider (``docs/providers``).
"""

from __future__ import annotations

import copy
import ipaddress
import socket
from pathlib import Path
from urllib.parse import urlsplit

from wasilet.cluster_record import ExternalRecord
from wasilet.errors import ApiError, CommandError, UsageError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.credentials import Credentials, read_credentials
from wasilet.kube.kubeconfig import kubeconfig_files, read_config
from wasilet.providers.base import Cluster, Detection
from wasilet.providers.existing_base import ExternalProvider, Found
from wasilet.providers.host import node_address
from wasilet.providers.preflight import check_node_names, inspect, try_bootstrap_token
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Progress

_ANSWER_SECONDS = 5.0
_FILES = ("certificate-authority", "client-certificate", "client-key", "tokenFile")


class ExistingProvider(ExternalProvider):
    """See the module."""

    name = "existing"
    summary = "a cluster that a kubeconfig names (--context, --config FILE), joined by wasm nodes of this machine"
    options = ("config", "context")

    def detect(self, settings: Settings) -> Detection:
        """The context is named, its server answers, the user may do what is needed. Reads only. Raises UsageError."""
        source, context = chosen(settings)
        with _admin(source, context) as kube:
            uid = _uid(kube, context)
            known = _known(settings)
            if known.uid == uid:
                return Detection(usable=True, detail=f"context {context}, adopted")
            added = inspect(kube, what=f"context {context!r}")
            check_node_names(kube, Cluster(settings=settings, state=State.of(settings), provider=self).node_names())
        return Detection(usable=True, detail=f"context {context}; would be added: {', '.join(added)}")

    def confirm(self, settings: Settings) -> None:
        """A cluster that is not adopted yet is not touched without ``--yes``."""
        source, context = chosen(settings)
        with _admin(source, context) as kube:
            if settings.yes or _known(settings).uid == _uid(kube, context):
                return
            added = inspect(kube, what=f"context {context!r}")
        raise UsageError(
            f"nothing was changed; `up` would add to the cluster of context {context!r} ({kube.server}): "
            f"{', '.join(added)}, and {max(settings.nodes, 1)} wasm node(s)",
            hint="add --yes to go on",
        )

    def find(self, cluster: Cluster) -> Found:
        """What the kubeconfig holds."""
        settings = cluster.settings
        source, context = chosen(settings)
        kubeconfig = minified(source, context)
        server = str(kubeconfig["clusters"][0]["cluster"].get("server") or "")
        return Found(
            kubeconfig=kubeconfig,
            node_address=settings.node_ip or routed_address(server, settings),
            created=False,
            remember={"source": str(source), "context": context},
        )

    def create(self, cluster: Cluster, say: Progress) -> Found:  # noqa: ARG002
        """Never asked for: :meth:`find` finds, or raises."""
        return self.find(cluster)

    def destroy(self, cluster: Cluster) -> str:
        """Never asked for: nothing is ever created."""
        return f"cluster {cluster.settings.name} is not Wasilet's"

    def preflight(self, cluster: Cluster, kube: Kube, say: Progress) -> None:
        """The one thing that has to be tried."""
        say("trying a bootstrap token")
        try_bootstrap_token(kube, read_credentials(cluster.state.admin_kubeconfig))


def chosen(settings: Settings) -> tuple[Path, str]:
    """The kubeconfig and the context that are meant. Raises UsageError when no context is named, or another one than
    the cluster was adopted with."""
    known = _known(settings)
    files = _files(settings, known)
    context = settings.context or known.context
    if not context:
        names = [name for file in files for name in _contexts(file)]
        raise UsageError(
            "which cluster? Name its context: --context NAME", hint=f"there are: {', '.join(names) or 'none'}"
        )
    if known.context and context != known.context:
        raise UsageError(
            f"cluster {settings.name!r} was adopted from context {known.context!r}, not {context!r}",
            hint="give the other one another --name",
        )
    for file in files:
        if context in _contexts(file):
            return file, context
    names = [name for file in files for name in _contexts(file)]
    where = ", ".join(map(str, files))
    raise UsageError(f"{where} has no context {context!r}", hint=f"its contexts: {', '.join(names) or 'none'}")


def _known(settings: Settings) -> ExternalRecord:
    return State.of(settings).cluster.external


def _files(settings: Settings, known: ExternalRecord) -> list[Path]:
    if settings.config is not None:
        return [settings.config]
    if known.source:
        return [Path(known.source)]
    return kubeconfig_files(settings.environ)


def _contexts(file: Path) -> list[str]:
    entries = read_config(file).get("contexts") or []
    return [str(entry.get("name")) for entry in entries if isinstance(entry, dict)]


def _admin(source: Path, context: str) -> _Closing:
    return _Closing(Kube(usable_credentials(source, context)))


class _Closing:
    def __init__(self, kube: Kube) -> None:
        self._kube = kube

    def __enter__(self) -> Kube:
        return self._kube

    def __exit__(self, *_: object) -> None:
        self._kube.close()


def usable_credentials(source: Path, context: str) -> Credentials:
    """What the context holds. Raises UsageError for what nodes could not use as well."""
    entry = minified(source, context)["clusters"][0]["cluster"]
    for key in ("proxy-url", "tls-server-name"):
        if entry.get(key):
            raise UsageError(
                f"context {context!r} reaches its server by {key}, which nodes are not given",
                hint="use a context that reaches it directly",
            )
    try:
        return read_credentials(source, context=context)
    except CommandError as error:
        raise UsageError(f"the credential plugin of context {context!r} failed: {error.message}") from error


def _uid(kube: Kube, context: str) -> str:
    try:
        found = kube.get(api_path("namespaces", "kube-system"), timeout_seconds=_ANSWER_SECONDS)
    except ApiError as error:
        if error.code == 401:
            raise UsageError(f"the cluster of context {context!r} refuses its credentials") from error
        if error.code:
            raise UsageError(f"the cluster of context {context!r} refuses: {error.message}") from error
        raise UsageError(f"the cluster of context {context!r} is not there: {error.message}") from error
    return str(found["metadata"]["uid"])


def minified(source: Path, context: str) -> KubeObject:
    """One context of a kubeconfig as a separate file. Credentials stay what they are (plugins, files), so that they
    go on to be renewed; file names become absolute. Raises UsageError when the file contradicts itself."""
    data = read_config(source)
    chosen_context = _entry(data, "contexts", context, source).get("context") or {}
    cluster = copy.deepcopy(_entry(data, "clusters", str(chosen_context.get("cluster")), source).get("cluster") or {})
    user = copy.deepcopy(_entry(data, "users", str(chosen_context.get("user")), source).get("user") or {})
    folder = source.resolve().parent
    for entry in (cluster, user):
        for key in _FILES:
            if entry.get(key):
                entry[key] = str(folder / str(entry[key]))
    plugin = user.get("exec") or {}
    if "/" in str(plugin.get("command") or ""):
        plugin["command"] = str(folder / str(plugin["command"]))
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "wasilet", "cluster": cluster}],
        "contexts": [{"name": "wasilet", "context": {"cluster": "wasilet", "user": "wasilet"}}],
        "users": [{"name": "wasilet", "user": user}],
        "current-context": "wasilet",
    }


def _entry(data: KubeObject, section: str, name: str, source: Path) -> KubeObject:
    for entry in data.get(section) or []:
        if isinstance(entry, dict) and entry.get("name") == name:
            return entry
    raise UsageError(f"kubeconfig {source} names a {section.removesuffix('s')} {name!r} that it does not hold")


def routed_address(server: str, settings: Settings) -> str:
    """The address of this machine on the way to the API server: most likely the one by which it finds back. A server
    on loopback is on this machine, and finds it by any address. Raises UsageError when there is no way."""
    parts = urlsplit(server)
    host, port = parts.hostname or "", parts.port or 443
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise UsageError(f"the API server's name {host!r} does not resolve: {error.strerror or error}") from error
    family, kind, _, _, address = found[0]
    if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        return node_address(settings)
    try:
        with socket.socket(family, kind) as probe:
            # Connecting a datagram socket sends nothing; it only asks the routing table for the source address.
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(
            f"there is no way from here to {host}: {error.strerror}", hint="--node-ip names this machine's address"
        ) from error
