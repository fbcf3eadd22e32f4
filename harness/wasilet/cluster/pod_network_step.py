"""The steps of ``up`` that give a cluster of the host provider its pod network: one as far as a first pod waits for it,
and one that waits for what pods find the API server and names by."""

from __future__ import annotations

import time

from wasilet.cluster import cluster_dns, service_ports
from wasilet.cluster.readiness import api_answers
from wasilet.controlplane import pod_network
from wasilet.controlplane.components import Component, ensure_running
from wasilet.errors import ComponentError
from wasilet.process import check_cancelled, tail_of
from wasilet.providers.base import API_SERVER_STEP, Cluster
from wasilet.state import State
from wasilet.steps import Finding, Progress, Step

POD_NETWORK_STEP = "pod network"
SERVICES_STEP = "Services and names"
_POLL_SECONDS = 0.1


def service_ports_component(cluster: Cluster) -> Component:
    through = pod_network.keeper_of(cluster.state)
    return service_ports.component(cluster.state, cluster.provider.access(cluster).node_address, through)


def _why_no_pod_network(state: State) -> str:
    return pod_network.why_absent(state) or "this cluster was made without one; `invoke down --purge` ends it for good"


def _described(plan: pod_network.NetworkPlan) -> str:
    return f"pods {plan.pods}, Services {plan.services}{f', {pod_network.ROOTLESS}' if plan.rootless else ''}"


def pod_network_steps(cluster: Cluster) -> list[Step]:
    """Whether there is a pod network is decided by the first step, so these are always in the list."""
    from wasilet.kube.manifests import create_missing, missing_objects

    state = cluster.state
    if cluster.provider.name != "host":
        return []

    def look() -> Finding:
        plan = pod_network.plan_of(state)
        if plan is None:
            return (
                Finding.ok(f"none: {_why_no_pod_network(state)}")
                if state.exists()
                else Finding.differs("choose addresses")
            )
        record = state.alive(pod_network.PROXY)
        text = _described(plan)
        if record is None or not api_answers(cluster):
            return Finding.differs(text, [f"+ {pod_network.PROXY}"])
        if state.alive(service_ports.COMPONENT) is None:
            return Finding.differs(text, [f"+ {service_ports.COMPONENT}"])
        if cluster_dns.has_binaries(cluster.settings) and state.alive(cluster_dns.COMPONENT) is None:
            return Finding.differs(text, [f"+ {cluster_dns.COMPONENT}"])
        wanted = pod_network.objects(plan, cluster.ports())
        return Finding.differs(text) if missing_objects(cluster.admin(), wanted) else Finding.ok(text)

    def change(_: Progress) -> str:
        plan = pod_network.plan_of(state)
        if plan is None:
            return f"none: {_why_no_pod_network(state)}"
        ports, settings = cluster.ports(), cluster.settings
        ensure_running(pod_network.proxy_component(plan, state), state=state, settings=settings)
        create_missing(cluster.admin(), pod_network.objects(plan, ports))
        ensure_running(service_ports_component(cluster), state=state, settings=settings)
        text = _described(plan)
        if not cluster_dns.has_binaries(settings):
            return f"{text}; what makes Services and names work comes after all else"
        ensure_running(cluster_dns.component(plan, settings, state), state=state, settings=settings)
        return text

    return [Step(name=POD_NETWORK_STEP, look=look, change=change, after=(API_SERVER_STEP,))]


def services_steps(cluster: Cluster, *, after: tuple[str, ...]) -> list[Step]:
    """Wait until pods get answers from the API server's proxy and from CoreDNS; both need the address that the first
    node brings. Where CoreDNS has to be built first, which takes minutes, there is nothing to wait for."""
    state, settings = cluster.state, cluster.settings
    if cluster.provider.name != "host":
        return []

    def silent() -> list[Component]:
        plan = pod_network.plan_of(state)
        if plan is None or not cluster_dns.has_binaries(settings):
            return []
        made = (
            pod_network.proxy_component(plan, state),
            cluster_dns.component(plan, settings, state),
        )
        return [each for each in made if not each.ready()]

    def text() -> str:
        plan = pod_network.plan_of(state)
        if plan is None:
            return f"none: {_why_no_pod_network(state)}"
        if not cluster_dns.has_binaries(settings):
            return "they come in the background"
        return f"the API server and names are answered at {plan.machine_address}"

    def look() -> Finding:
        if not state.exists():
            return Finding.differs("wait for the cluster's DNS")
        left = silent()
        return Finding.differs(f"wait for {_names(left)}") if left else Finding.ok(text())

    def change(progress: Progress) -> str:
        limit = settings.timeouts.ready_seconds
        deadline = time.monotonic() + limit
        while left := silent():
            progress(f"waiting for {_names(left)}")
            if time.monotonic() >= deadline:
                log = state.log(left[0].name)
                raise ComponentError(f"{_names(left)} did not answer within {limit:g} s", log=log, tail=tail_of(log))
            check_cancelled()
            time.sleep(_POLL_SECONDS)
        return text()

    return [Step(name=SERVICES_STEP, look=look, change=change, after=after)]


def _names(components: list[Component]) -> str:
    return " and ".join(each.name for each in components)
