"""The step of ``up`` that gives a cluster of the host provider its pod network, as far as a first pod waits for it."""

from __future__ import annotations

from wasilet.cluster import cluster_dns, service_ports
from wasilet.cluster.readiness import api_answers
from wasilet.controlplane import pod_network
from wasilet.controlplane.components import Component, ensure_running
from wasilet.providers.base import API_SERVER_STEP, Cluster
from wasilet.state import State
from wasilet.steps import Finding, Progress, Step


def service_ports_component(cluster: Cluster) -> Component:
    plan = pod_network.plan_of(cluster.state)
    through = pod_network.keeper_sockets(cluster.state)[1] if plan is not None and plan.rootless else None
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

    return [Step(name="pod network", look=look, change=change, after=(API_SERVER_STEP,))]
