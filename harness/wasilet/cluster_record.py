"""``cluster.json``: what is remembered of a cluster between two commands, typed, with a version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from wasilet.errors import StateError

VERSION = 1
"""Raised when a field changes its meaning; new fields alone do not ask for it."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class KubeconfigRecord:
    """The context that was added to a kubeconfig, and what there was before."""

    path: Path
    context: str
    server: str = ""
    previous: str = ""
    """Which context was current; empty: none."""

    created: bool = False
    """Whether there was no such file."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "path": str(self.path),
            "context": self.context,
            "server": self.server,
            "previous": self.previous,
            "created": self.created,
        }


@dataclass(frozen=True)
class LeftOverRecord:
    """What the user's Docker had of the cluster's name before it was made."""

    networks: tuple[str, ...]
    volumes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExternalRecord:
    """A cluster of a provider other than host, as far as it was found; see ``wasilet.providers.existing_base``."""

    created: bool = False
    """Made here; else adopted, or not there yet."""

    creating: str = ""
    """Since when it is being made, RFC 3339; empty: it is not."""

    ids: tuple[str, ...] = ()
    """Of the containers that it is made of."""

    before: LeftOverRecord | None = None
    uid: str = ""
    server: str = ""
    node_address: str = ""
    """At which the cluster reaches this machine's nodes."""

    registry_address: str = ""
    """At which the cluster's own nodes reach this machine's registry; empty: they do not."""

    source: str = ""
    context: str = ""
    """The kubeconfig and the context that it was adopted from."""

    @property
    def found(self) -> bool:
        """Whether anything was written down."""
        return self != ExternalRecord()


@dataclass(frozen=True, kw_only=True)
class ClusterRecord:
    """The whole of it. Each field has the name that it has in the file, and is empty as long as nothing was written."""

    name: str = ""
    provider: str = ""
    nodes: int = 0
    run_id: str = ""
    """In the environment of every process of the cluster."""

    kubernetes: str = ""
    """Host provider: the version that etcd was last used with, as ``1.37.2``."""

    kubernetes_asked: str = ""
    """The minor that the user asked for, as ``1.36``; empty: the newest."""

    ports: Mapping[str, int] = field(default_factory=dict)
    kubeconfig: KubeconfigRecord | None = None
    created_objects: tuple[str, ...] = ()
    """``Kind/name`` of what was not there before."""

    proxies: Mapping[str, str] = field(default_factory=dict)
    """Proxies for nodes of other machines: component to the address that it listens on."""

    local_origins: tuple[str, ...] = ()
    outbound_policy: str = ""
    """The file of the nodes' rule of outbound HTTP; empty: there is none."""

    pod_security: str = ""
    """The default PodSecurity level; empty: the cluster was made before there was one."""

    registry_secret: str = field(default="", repr=False)
    client_configs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """File to server and digest of the certificate that it was written with."""

    known_nodes: Mapping[str, bool] = field(default_factory=dict)
    """Nodes that a bootstrap file was made for: whether they run on this machine."""

    service_ranges: tuple[str, ...] = ()
    """In CIDR notation, as the cluster reported it to an administrator."""

    external: ExternalRecord = ExternalRecord()
    """What a provider other than host found out."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any], path: Path) -> ClusterRecord:
        """Raises StateError when the file is of a newer version, or a field has another type than it should."""
        version = data.get("version", VERSION)
        if not isinstance(version, int) or version > VERSION:
            raise StateError(f"{path} was written by a newer Wasilet (version {version})", hint="use that one")
        reader = _Reader(data, path)
        return cls(
            name=reader.get("name", str, ""),
            provider=reader.get("provider", str, ""),
            nodes=reader.get("nodes", int, 0),
            run_id=reader.get("run_id", str, ""),
            kubernetes=reader.get("kubernetes", str, ""),
            kubernetes_asked=reader.get("kubernetes_asked", str, ""),
            ports={str(name): int(port) for name, port in reader.get("ports", dict, {}).items()},
            kubeconfig=reader.made("kubeconfig", _kubeconfig),
            created_objects=tuple(map(str, reader.get("created_objects", list, []))),
            proxies=_proxies(reader),
            local_origins=tuple(map(str, reader.get("local_origins", list, []))),
            outbound_policy=reader.get("outbound_policy", str, ""),
            pod_security=reader.get("pod_security", str, ""),
            registry_secret=reader.get("registry_secret", str, ""),
            client_configs=reader.made("client_configs", _client_configs) or {},
            known_nodes={str(name): bool(here) for name, here in reader.get("known_nodes", dict, {}).items()},
            service_ranges=tuple(map(str, reader.get("service_ranges", list, []))),
            external=reader.made("external", _external) or ExternalRecord(),
        )


def _proxies(reader: _Reader) -> Mapping[str, str]:
    """In older files the field is called ``doors``; nodes of other machines know those addresses."""
    found = reader.get("proxies", dict, {}) or reader.get("doors", dict, {})
    return {str(name): str(address) for name, address in found.items()}


class _Reader:
    def __init__(self, data: Mapping[str, Any], path: Path) -> None:
        self._data = data
        self._path = path

    def get(self, key: str, kind: type[_T], default: _T) -> _T:
        value = self._data.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self._damaged(key)
        return value

    def made(self, key: str, make: Callable[[Any], _T]) -> _T | None:
        try:
            return make(self._data[key]) if self._data.get(key) else None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(key) from error

    def _damaged(self, key: str) -> StateError:
        return StateError(f"{self._path} is damaged: {key}", hint="`invoke down --purge` removes the cluster")


def _kubeconfig(data: Mapping[str, Any]) -> KubeconfigRecord:
    return KubeconfigRecord(
        path=Path(data["path"]),
        context=str(data["context"]),
        server=str(data.get("server") or ""),
        previous=str(data.get("previous") or ""),
        created=bool(data.get("created")),
    )


def _external(data: Mapping[str, Any]) -> ExternalRecord:
    def text(name: str) -> str:
        return str(data.get(name) or "")

    return ExternalRecord(
        created=bool(data.get("created")),
        creating=text("creating"),
        ids=tuple(map(str, data.get("ids") or ())),
        before=_left_over(data["before"]) if data.get("before") is not None else None,
        uid=text("uid"),
        server=text("server"),
        node_address=text("node_address"),
        registry_address=text("registry_address"),
        source=text("source"),
        context=text("context"),
    )


def _left_over(data: Mapping[str, Any]) -> LeftOverRecord:
    return LeftOverRecord(tuple(data.get("networks") or ()), tuple(data.get("volumes") or ()))


def _client_configs(data: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {str(file): (str(server), str(digest)) for file, (server, digest) in data.items()}
