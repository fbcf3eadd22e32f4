"""Which Kubernetes a cluster of the host provider runs, and the way from an older minor to it.

A cluster that was made with ``--kubernetes-version`` stays with that minor until another is asked for; any other
follows the newest that this Wasilet supports. Kubernetes is upgraded one minor at a time and never back (its version
skew policy): so the API server of each minor between runs once on the cluster's own etcd, until it is ready.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from wasilet.controlplane.components import Component, ensure_running, wait_ready
from wasilet.controlplane.versions import default_kubernetes, minor_of, supported_kubernetes, versions
from wasilet.errors import UsageError
from wasilet.providers.base import Cluster
from wasilet.steps import Finding, Progress, Step

UPGRADE_STEP = "kubernetes"
BEFORE_IT_WAS_WRITTEN_DOWN = "1.34.4"
"""What a cluster runs whose record does not say: that of the first Wasilet."""

Components = Callable[[Cluster], Mapping[str, Callable[[], Component]]]


def wanted(cluster: Cluster) -> str:
    """The version that is to run, as ``1.37.2``; empty where another tool decides. Raises UsageError for one that is
    not supported, or that lies before what the cluster has."""
    if cluster.provider.name != "host":
        return ""
    asked, pinned = cluster.settings.kubernetes_version, _pinned(cluster)
    if not asked and pinned and pinned not in versions().kubernetes:
        raise UsageError(
            f"cluster {cluster.settings.name!r} was made with --kubernetes-version {pinned}, which this Wasilet"
            " no longer brings",
            hint=f"`invoke up --name {cluster.settings.name} --kubernetes-version {minor_of(default_kubernetes())}`"
            " upgrades it",
        )
    version = supported_kubernetes(asked or pinned)
    have = running(cluster)
    if have and _number(version) < _number(have):
        raise UsageError(
            f"cluster {cluster.settings.name!r} runs Kubernetes {have}, which cannot go back to {version}",
            hint=f"`invoke down --purge --name {cluster.settings.name}` removes it, then `up` makes it again",
        )
    return version


def running(cluster: Cluster) -> str:
    """What its etcd was last used with; empty: there is none yet."""
    if not (cluster.state.path / "etcd").is_dir():
        return ""
    return cluster.state.cluster.kubernetes or BEFORE_IT_WAS_WRITTEN_DOWN


def between(have: str, want: str) -> list[str]:
    """The versions on the way, without both ends: ``["1.35.4", "1.36.3"]`` from 1.34 to 1.37. Raises UsageError for a
    minor on the way that is not supported."""
    major, last = (int(part) for part in minor_of(want).split("."))
    _, first = (int(part) for part in minor_of(have).split("."))
    way = [f"{major}.{minor}" for minor in range(first + 1, last)]
    missing = [minor for minor in way if minor not in versions().kubernetes]
    if missing:
        raise UsageError(
            f"the way from Kubernetes {have} to {want} leads over {', '.join(missing)}, which is not brought",
            hint="an older Wasilet brings it; or `invoke down --purge` removes the cluster",
        )
    return [versions().kubernetes[minor] for minor in way]


def upgrade_step(cluster: Cluster, components: Components, *, after: tuple[str, ...]) -> Step:
    """Comes before etcd and the API server."""

    def look() -> Finding:
        have, want = running(cluster), wanted(cluster)
        if not have:
            return Finding.differs(want)
        if have == want and cluster.state.cluster.kubernetes == want:
            return Finding.ok(want)
        way = [have, *between(have, want), want]
        return Finding.differs(f"upgrade: {' -> '.join(dict.fromkeys(way))}", [f"- {have}", f"+ {want}"])

    def change(progress: Progress) -> str:
        have, want = running(cluster), wanted(cluster)
        way = between(have, want) if have else []
        for version in way:
            progress(f"{have} to {want}: the API server of {version}")
            _run_once(cluster, version, components, progress)
            cluster.state.update(kubernetes=version)
        asked = cluster.settings.kubernetes_version
        cluster.state.update(kubernetes=want, **({"kubernetes_asked": minor_of(asked)} if asked else {}))
        return f"{have} -> {' -> '.join([*way, want])}" if have and have != want else want

    return Step(name="Kubernetes", key=UPGRADE_STEP, look=look, change=change, after=after)


def _run_once(cluster: Cluster, version: str, components: Components, progress: Progress) -> None:
    """etcd and the API server of ``version``, until both are ready. What comes next replaces them."""
    from wasilet.controlplane.acquire import acquire

    settings, state = cluster.settings, cluster.state
    names = ("etcd", "kube-apiserver")
    found = acquire(
        names,
        cache=settings.cache,
        environ=settings.environ,
        progress=progress,
        mirror=settings.mirror,
        allow_download=settings.download,
        kubernetes=version,
    )
    binaries = {**cluster.binaries, **{name: place.path for name, place in found.items()}}
    made = components(dataclasses.replace(cluster, binaries=binaries))
    for name in names:
        component = made[name]()
        record = ensure_running(component, state=state, settings=settings)
        wait_ready(component, record, timeout_seconds=settings.timeouts.ready_seconds, settings=settings, say=progress)


def _pinned(cluster: Cluster) -> str:
    return cluster.state.cluster.kubernetes_asked


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
