"""``up``: the ordered list of steps between nothing and a Ready node. Read :func:`steps`; the rest is what they do."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wasilet.cluster import cluster_dns, service_ports
from wasilet.cluster.join import proxies, proxy_steps
from wasilet.cluster.kubeconfig_step import kubeconfig_is_right, kubeconfig_place, kubeconfig_step
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.pod_network_step import (
    POD_NETWORK_STEP,
    pod_network_steps,
    service_ports_component,
    services_steps,
)
from wasilet.cluster.readiness import api_answers, ready_step
from wasilet.controlplane import joined_network, pod_network, pod_security, public_info
from wasilet.controlplane.components import Component, component_step, ensure_running
from wasilet.controlplane.health import accepts
from wasilet.controlplane.local_registry import COMPONENT as REGISTRY
from wasilet.controlplane.local_registry import login_file, main_registry
from wasilet.errors import StateError, UsageError
from wasilet.kube.client import KubeObject
from wasilet.ports import EVERYWHERE
from wasilet.providers import kubernetes_version
from wasilet.providers.base import (
    API_SERVER_STEP,
    BINARIES_STEP,
    NETWORK_STEP,
    PREPARATION_STEP,
    Cluster,
    check_options,
)
from wasilet.providers.node_process import node_component
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Finding, Play, Progress, Recap, Step

if TYPE_CHECKING:
    from wasilet.steps import Reporter

APPROVER = "approver"
RBAC_STEP = "rbac"
TOKEN_STEP = "bootstrap-token"  # noqa: S105  (a step's key)
POLICY_STEP = "approver-policy"
NEEDED_BYTES = 250_000_000
"""Of disk for a new control plane: etcd alone reserves two files of 64 MB for its log."""


def up(settings: Settings, *, reporter: Reporter, check: bool = False, services: bool = True) -> Recap:
    """Bring a cluster up, or repair what is missing of it. Without ``services`` a caller that has something more urgent
    calls :func:`bring_services` when that is done. Raises UsageError and StateError before anything is changed;
    a failed step is in the recap."""
    check_provider(settings)
    with open_cluster(settings) as cluster:
        check_options(cluster.provider, settings)
        detection = cluster.provider.detect(settings)
        if not detection.usable:
            raise UsageError(f"provider {settings.provider!r} cannot be used: {detection.detail}", hint=detection.hint)
        _check_places(cluster)
        play = Play(f"up {settings.name} ({settings.provider})", steps(cluster, services=services))
        if check:
            return play.run(reporter=reporter, check=True)
        cluster.provider.confirm(settings)
        with cluster.state.locked(
            timeout_seconds=settings.timeouts.lock_seconds,
            say=reporter.notice,
            what="invoke up",
        ):
            new = not cluster.state.exists()
            try:
                recap = play.run(reporter=reporter)
                if services and recap.succeeded:
                    bring_services(cluster, reporter=reporter)
                return recap
            finally:
                if new and not _left_something(cluster):
                    # It failed before anything was started: there is no cluster, so there is no folder of one.
                    cluster.state.remove()


def bring_services(cluster: Cluster, *, reporter: Reporter) -> None:
    """Have kube-proxy and CoreDNS installed in the background, where they are still missing, and report it."""
    plan, state, settings = pod_network.plan_of(cluster.state), cluster.state, cluster.settings
    if plan is None or state.alive(cluster_dns.COMPONENT) is not None:
        return
    ensure_running(cluster_dns.component(plan, settings, state), state=state, settings=settings)
    reporter.notice(
        "Services and names work in some minutes: what they need is brought in the background, "
        f"once per machine (`invoke logs {cluster_dns.COMPONENT}`)"
    )


def check_provider(settings: Settings) -> None:
    """Raises UsageError when there is a cluster of that name by another provider than the one asked for."""
    recorded = State.of(settings).cluster.provider
    if recorded and recorded != settings.provider:
        raise UsageError(
            f"cluster {settings.name!r} is of provider {recorded!r}, not {settings.provider!r}",
            hint=f"`invoke down --purge --name {settings.name}` first, or choose another --name",
        )


def _left_something(cluster: Cluster) -> bool:
    state = cluster.state
    return bool(state.records() or state.stray_processes() or cluster.provider.deletion(cluster))


def _check_places(cluster: Cluster) -> None:
    """Refuse what would fail half-way: a kubeconfig that cannot be changed, a disk that is (nearly) full. Raises
    StateError."""
    from wasilet.kube import kubeconfig as files

    settings, state = cluster.settings, cluster.state
    if not kubeconfig_is_right(cluster):
        files.check_changeable(kubeconfig_place(cluster))
    if "etcd" not in cluster.provider.wanted_ports or (state.path / "etcd").exists():
        return
    place = next(folder for folder in (state.path, *state.path.parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < NEEDED_BYTES:
        raise StateError(
            f"only {free_bytes // 1_000_000} MB are free in {place}, and cluster {settings.name!r} needs "
            f"{NEEDED_BYTES // 1_000_000} MB",
            hint="set WASILET_STATE_HOME to a folder with more room",
        )


def control_plane_steps(cluster: Cluster) -> list[Step]:
    """The beginning of :func:`steps`: an API server with what is behind it, and the roles that nodes need. Tests that
    need no node stop here."""
    return [
        _preparation_step(cluster),
        _binaries_step(cluster),
        *cluster.provider.create_steps(cluster),
        _rbac_step(cluster),
    ]


def steps(cluster: Cluster, *, services: bool = True) -> list[Step]:
    """Each starts as soon as what it names in ``after`` is done. ``services``: wait for the cluster's DNS as well."""
    settings, state = cluster.settings, cluster.state
    made = own_components(cluster)
    nodes = [_node_step(cluster, name, made[node_component(name)]) for name in cluster.node_names()]
    return [
        *control_plane_steps(cluster),
        component_step(
            made[REGISTRY], REGISTRY, title=REGISTRY, state=state, settings=settings,
            after=(BINARIES_STEP, PREPARATION_STEP),
        ),
        kubeconfig_step(cluster),
        _policy_step(cluster),
        component_step(
            made[APPROVER], APPROVER, title=APPROVER, state=state, settings=settings, after=(RBAC_STEP, POLICY_STEP)
        ),
        _token_step(cluster),
        *proxy_steps(cluster, after=(API_SERVER_STEP, REGISTRY)),
        *pod_network_steps(cluster),
        *nodes,
        ready_step(cluster, after=(*cluster.provider.must_settle(), REGISTRY, APPROVER, *(n.key for n in nodes))),
        *(services_steps(cluster, after=(POD_NETWORK_STEP, *(n.key for n in nodes))) if services else ()),
    ]  # fmt: skip


def own_components(cluster: Cluster) -> Mapping[str, Callable[[], Component]]:
    """The long-lived processes that every provider's cluster has, by name, in the order of ``status``."""
    made: dict[str, Callable[[], Component]] = {
        REGISTRY: lambda: main_registry(
            binary=cluster.binary("registry"), port=cluster.ports()["registry"], state=cluster.state
        ),
        APPROVER: lambda: _approver_component(cluster),
    }
    made.update(proxies(cluster))
    if (plan := pod_network.plan_of(cluster.state)) is not None:
        made[pod_network.PROXY] = lambda: pod_network.proxy_component(plan, cluster.state)
        made[service_ports.COMPONENT] = lambda: service_ports_component(cluster)
        if cluster.state.record(cluster_dns.COMPONENT) is not None:
            made[cluster_dns.COMPONENT] = lambda: cluster_dns.component(plan, cluster.settings, cluster.state)
    for index, node in enumerate(cluster.node_names()):
        made[node_component(node)] = lambda node=node, index=index: _node_component(cluster, node, index)  # type: ignore[misc]
    return made


# --- what the steps do -----------------------------------------------------------------------------------------------


def _preparation_step(cluster: Cluster) -> Step:
    settings, state = cluster.settings, cluster.state

    def level() -> str:
        return pod_security.decide(settings, state, provider=cluster.provider.name)

    def wanted() -> dict[str, int]:
        asked = {
            name: getattr(settings.ports, name) for name in (*cluster.provider.wanted_ports, "registry", "kubelet")
        }
        # The demos' own API, which the nodes are told of when they start: its own port, kept for it.
        asked["cat_facts"] = 0
        if cluster.provider.name == "host":
            asked |= {cluster_dns.DNS_PORT: 0, cluster_dns.READY_PORT: 0}
        return asked | {f"kubelet_{number}": 0 for number in range(2, cluster.node_count() + 1)}

    def look() -> Finding:
        record = state.cluster
        ports = record.ports
        missing = [name for name, port in wanted().items() if not ports.get(name) or (port and ports[name] != port)]
        other = bool(settings.local_origins) and record.local_origins != settings.local_origins
        other = other or level() != record.pod_security
        policy = settings.outbound_policy
        other = other or (policy is not None and str(policy) != record.outbound_policy)
        if not record.run_id or record.nodes != cluster.node_count() or missing or other:
            return Finding.differs(
                f"use {state.path}", [f"+ {state.path}", *(f"+ port for {name}" for name in missing)]
            )
        return Finding.ok(str(state.path))

    def change(progress: Progress) -> str:
        state.create()
        # Not by the run id, which the pytest plugin makes before anything else: a running cluster has ports.
        is_new = not state.cluster.ports
        chosen_level = level()
        # First, because it may fail: then nothing is written down yet. Nodes are reached from elsewhere, the rest is
        # not; which address that is, another provider knows only when its cluster is there.
        asked = wanted()
        kubelets = {name: asked.pop(name) for name in list(asked) if name.startswith("kubelet")}
        ports = state.allocate_ports(kubelets, addresses=(settings.node_ip or EVERYWHERE,))
        ports |= state.allocate_ports(asked)
        if cluster.provider.name == "host" and is_new:
            pod_network.reserve(settings, state, say=progress)
        state.update(pod_security=chosen_level)
        state.update(name=settings.name, provider=cluster.provider.name, nodes=cluster.node_count())
        if settings.local_origins:
            state.update(local_origins=list(settings.local_origins))
        if settings.outbound_policy is not None:
            state.update(outbound_policy=str(settings.outbound_policy))
        state.run_id()
        return f"{state.path}, ports {', '.join(f'{name} {port}' for name, port in ports.items())}"

    return Step(name="folder and ports", key=PREPARATION_STEP, look=look, change=change, after=())


def _binaries_step(cluster: Cluster) -> Step:
    from wasilet.controlplane.acquire import acquire, locate

    settings = cluster.settings
    names = (*cluster.provider.binaries, "registry")
    version = kubernetes_version.wanted(cluster)

    def look() -> Finding:
        missing = []
        for name in names:
            found = locate(name, cache=settings.cache, environ=settings.environ, kubernetes=version)
            if found is None:
                missing.append(name)
            else:
                cluster.binaries[name] = found.path
        if missing:
            return Finding.differs(f"acquire {', '.join(missing)}", [f"+ {name}" for name in missing])
        return Finding.ok(f"{len(names)} found")

    def change(progress: Progress) -> str:
        found = acquire(
            names,
            cache=settings.cache,
            environ=settings.environ,
            progress=progress,
            mirror=settings.mirror,
            allow_download=settings.download,
            kubernetes=version,
        )
        cluster.binaries.update({name: binary.path for name, binary in found.items()})
        return ", ".join(f"{name} ({binary.source})" for name, binary in found.items())

    return Step(name="binaries", key=BINARIES_STEP, look=look, change=change, after=())


def _rbac_step(cluster: Cluster) -> Step:
    from wasilet.kube.manifests import create_missing, missing_objects, render_objects

    def wanted() -> list[KubeObject]:
        templates = ["bootstrap-rbac.yaml.j2", "approver-rbac.yaml.j2"]
        if cluster.provider.name == "host":
            templates.append("host-rbac.yaml.j2")
        if cluster.provider.name == "kind":
            templates.append("joined-network.yaml.j2")
        return [obj for template in templates for obj in render_objects(template)]

    def look() -> Finding:
        if not api_answers(cluster):
            return Finding.differs("create roles and bindings")
        missing = missing_objects(cluster.admin(), wanted())
        names = [f"{obj['kind']}/{obj['metadata']['name']}" for obj in missing]
        if cluster.provider.name == "host" and not public_info.is_closed(cluster.admin()):
            names.append(f"ClusterRoleBinding/{public_info.BINDING}")
        if not names:
            return Finding.ok("all there")
        return Finding.differs(f"create {len(names)}", [f"+ {name}" for name in names])

    def change(_: Progress) -> str:
        made = create_missing(cluster.admin(), wanted())
        if cluster.provider.name == "host":
            public_info.close(cluster.admin())
        # What was there before is the cluster's own, and stays when Wasilet goes.
        cluster.state.update(created_objects=sorted({*cluster.state.cluster.created_objects, *made}))
        return f"created {len(made)}"

    return Step(name="RBAC", key=RBAC_STEP, look=look, change=change, after=(API_SERVER_STEP,))


def _policy_step(cluster: Cluster) -> Step:
    from wasilet.cluster.approver_facts import policy_file, same_policy, service_ranges, write_policy
    from wasilet.cluster.known_nodes import policy_of

    path = policy_file(cluster.state)

    def look() -> Finding:
        if not api_answers(cluster):
            return Finding.differs("write it")
        if path.is_file() and same_policy(path, policy_of(cluster)):
            return Finding.ok(str(path))
        return Finding.differs("write it", [f"+ {path.name}"])

    def change(_: Progress) -> str:
        # As long as the cluster lives its ranges may be added to, never taken from: the approver asks again itself.
        cluster.state.update(service_ranges=service_ranges(cluster.admin()))
        write_policy(path, policy_of(cluster))
        return str(path)

    return Step(
        name="approver's policy",
        key=POLICY_STEP,
        look=look,
        change=change,
        after=(API_SERVER_STEP, *network_steps(cluster)),
    )


def _token_step(cluster: Cluster) -> Step:
    from wasilet.kube.bootstrap_token import bootstrap_config, create_token, usable_token, write_bootstrap_file

    state, settings = cluster.state, cluster.settings

    def look() -> Finding:
        if not api_answers(cluster):
            return Finding.differs("create a token and bootstrap.conf")
        access = cluster.provider.access(cluster)
        if all(node_has_certificate(state.node(name)) for name in cluster.node_names()):
            return Finding.ok("every node has its certificate")
        info = usable_token(
            cluster.admin(), state.bootstrap_file, server=access.server, ca=access.ca, client_ca=access.client_ca
        )
        if info is not None:
            return Finding.ok(f"{info.id} is good for {info.seconds_left / 60:.0f} min")
        return Finding.differs(
            "create a token and bootstrap.conf", ["+ kube-system/bootstrap-token-...", "+ bootstrap.conf"]
        )

    def change(_: Progress) -> str:
        access = cluster.provider.access(cluster)
        token = create_token(cluster.admin(), ttl_seconds=settings.token_ttl_seconds, description="wasilet up")
        config = bootstrap_config(server=access.server, ca=access.ca, client_ca=access.client_ca, token=token)
        write_bootstrap_file(state.bootstrap_file, config)
        return f"{token.id}, good for {settings.token_ttl_seconds / 60:.0f} min"

    return Step(name="bootstrap token", key=TOKEN_STEP, look=look, change=change, after=(API_SERVER_STEP,))


def node_has_certificate(data: Path) -> bool:
    """Whether a node holds a client certificate that is good for another hour."""
    import datetime as dt

    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate((data / "pki" / "client.pem").read_bytes())
    except (OSError, ValueError):
        return False
    return certificate.not_valid_after_utc - dt.datetime.now(dt.UTC) > dt.timedelta(hours=1)


def _approver_component(cluster: Cluster) -> Component:
    from wasilet.cluster.approver_facts import policy_file
    from wasilet.storage import read_json

    state = cluster.state
    kubeconfig = cluster.provider.approver_kubeconfig(cluster)
    status_file = state.run / "approver.status"

    def ready() -> bool:
        record = state.record(APPROVER)
        status = read_json(status_file)
        return record is not None and status.get("pid") == record.process.pid and bool(status.get("ready"))

    return Component(
        name=APPROVER,
        argv=(
            sys.executable, "-P", "-m", "wasilet.cluster.approver",
            "--kubeconfig", str(kubeconfig), "--policy", str(policy_file(state)), "--status-file", str(status_file),
        ),
        inputs=(kubeconfig,),
        ready=ready,
    )  # fmt: skip


def _node_component(cluster: Cluster, node: str, index: int) -> Component:
    state = cluster.state
    access = cluster.provider.access(cluster)
    joined = joined_network.plan_of(state)
    port = cluster.ports()["kubelet" if index == 0 else f"kubelet_{index + 1}"]
    argv = [
        sys.executable, "-P", "-m", "wasilet_node",
        "--node-name", node,
        "--data-dir", str(state.node(node)),
        "--bootstrap-file", str(state.bootstrap_file),
        "--port", str(port),
        "--node-ip", joined.addresses[index] if joined is not None else access.node_address,
        "--registry-config", str(login_file(state)),
    ]  # fmt: skip
    for taint in cluster.taints():
        argv += ["--taint", taint]
    for origin in local_origins(cluster):
        argv += ["--allow-local-origins", origin]
    if state.cluster.outbound_policy:
        argv += ["--outbound-policy", state.cluster.outbound_policy]
    if (plan := pod_network.plan_of(state)) is not None:
        argv += pod_network.node_arguments(
            plan,
            index=index,
            state=state,
            kube_proxy=_late_binary(cluster, "kube-proxy", kubernetes_version.wanted(cluster)),
        )
    elif joined is not None:
        # It is known to the cluster by its address on the bridge, which leads to where it listens.
        argv += ["--bind-address", access.node_address]
        proxy = _late_binary(cluster, "kube-proxy", joined.kubernetes)
        argv += joined_network.node_arguments(joined, index=index, folder=state.etc, kube_proxy=proxy)
    elif reason := pod_network.why_absent(state):
        argv += ["--pod-network-absent", reason]
    if cluster.settings.max_pods:
        argv += ["--max-pods", str(cluster.settings.max_pods)]
    return Component(
        name=node_component(node),
        argv=tuple(argv),
        ports={"kubelet API": port},
        gate=(lambda: pod_network.keeper_answers(state)) if plan is not None and plan.rootless else None,
        addresses=(access.node_address,),
        clients=True,
        # The kubelet API answers no one without a credential, so a connection has to do; the Node's own condition says
        # the rest, but is believed for 40 s after an agent died.
        ready=lambda: accepts(access.node_address, port),
    )


def local_origins(cluster: Cluster) -> tuple[str, ...]:
    """What pods may call on this machine: the demos' own API, and what the user allowed."""
    from wasilet.controlplane.components import cat_facts_origin

    port = cluster.ports().get("cat_facts")
    own = (cat_facts_origin(port),) if port else ()
    return tuple(dict.fromkeys((*own, *cluster.state.cluster.local_origins)))


def _late_binary(cluster: Cluster, name: str, version: str) -> Path:
    """Where it is, or will be."""
    from wasilet.controlplane.acquire import expected

    return expected(name, cache=cluster.settings.cache, environ=cluster.settings.environ, kubernetes=version)


def network_steps(cluster: Cluster) -> tuple[str, ...]:
    """The key of the step that decides about nodes' addresses, where the provider has one."""
    return (NETWORK_STEP,) if cluster.provider.name == "kind" else ()


def _node_step(cluster: Cluster, node: str, component: Callable[[], Component]) -> Step:
    return component_step(
        component,
        node_component(node),
        title=f"node {node}",
        state=cluster.state,
        settings=cluster.settings,
        after=(TOKEN_STEP, RBAC_STEP, *network_steps(cluster)),
    )
