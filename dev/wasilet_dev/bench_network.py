"""``invoke bench network``: what the pod network gives, and what it costs.

The cost: pods start in turns on two clusters, one of which shares the machine's network. What it gives: connections
between pods, directly and through a Service, in turns with the same program as a native one in the same namespaces;
many pods that all answer; many Services whose rules are awaited.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from wasilet import process
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.up import up
from wasilet.controlplane import pod_network
from wasilet.errors import HarnessError, WaitTimeoutError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.providers.base import Cluster
from wasilet.settings import Settings
from wasilet.steps import Reporter

from wasilet_dev import network_load
from wasilet_dev.bench import (
    LATENCY_RUNS,
    NAMESPACE,
    Figure,
    Watched,
    bench_cluster,
    make_namespace,
    push_guest,
    remove_cluster,
)
from wasilet_dev.network_load import PORT, Load, Native

PODS = 500
"""That are all reached."""

BURST_PODS = 100
SERVICES = 100
ENDPOINTS = 10
_NATIVE_PORT = 7800
_SERVICE_PORT = 80
_REACH_SECONDS = 120.0
_RULES_SECONDS = 60.0
_POLL_SECONDS = 0.02
_SPARE_PODS = 50

Say = Callable[[str], None]
_Of = TypeVar("_Of")
_Sample = TypeVar("_Sample")


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A median and that of what it is held against, measured in turns."""

    name: str
    unit: str
    values: Sequence[float]
    others: Sequence[float]
    what: str
    """The others are."""

    target: str = ""

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def other(self) -> float:
        """The others' median."""
        return statistics.median(self.others)

    @property
    def ratio(self) -> float:
        """0 where there is nothing to compare."""
        return self.value / self.other if self.other else 0.0

    def to_json(self) -> dict[str, Any]:
        """For ``--output json``."""
        data: dict[str, Any] = {"name": self.name, "value": round(self.value, 3), "unit": self.unit}
        data |= {"beside": {"what": self.what, "value": round(self.other, 3)}, "ratio": round(self.ratio, 2)}
        return data | {"runs": len(self.values)} | ({"target": self.target} if self.target else {})

    def line(self) -> str:
        """For people."""
        target = f"  target {self.target}" if self.target else ""
        return (
            f"{self.name:<44} {self.value:10.2f} {self.unit:<8} {self.what} {self.other:.2f}, ratio {self.ratio:.2f}"
            f"{target}"
        )


def bench_network(
    settings: Settings, *, rounds: int, pods: int, reporter: Reporter, say: Say
) -> Iterator[Figure | Beside]:
    """All of it. Raises HarnessError where the machine allows no pod network, or a cluster does not come up."""
    if os.geteuid() != 0 or shutil.which("nsenter") is None:
        raise HarnessError("native processes enter pods' network namespaces: that takes root, and nsenter (util-linux)")
    yield _machine_load("before")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wasilet-bench-")))
        programs = network_load.programs(folder, settings.environ, say)
        cluster = _cluster(stack, replace(settings, max_pods=max(pods, BURST_PODS) + _SPARE_PODS), "bench", reporter)
        if absent := pod_network.why_absent(cluster.state):
            raise HarnessError(f"there is no pod network here to measure: {absent}")
        bare = replace(settings, pod_network=False)
        yield from _starts(cluster, bare, programs.component, rounds=rounds, reporter=reporter, say=say)
        image = push_guest(cluster, programs.component)
        with Watched(Kube(cluster.admin_credentials())) as watched:
            network = _Network(cluster, watched, image, programs.native, say)
            yield from network.measure(rounds, pods)
    yield _machine_load("after")


def _machine_load(when: str) -> Figure:
    detail = f"{os.cpu_count()} processors: what else they do is in every figure"
    return Figure(name=f"load average of the machine, {when}", value=os.getloadavg()[0], unit="", detail=detail)


def _cluster(stack: contextlib.ExitStack, settings: Settings, name: str, reporter: Reporter) -> Cluster:
    """One that is removed with ``stack``."""
    bench = stack.enter_context(bench_cluster(settings, name))
    stack.callback(remove_cluster, bench)
    up(bench, reporter=reporter).raise_for_failure()
    cluster = stack.enter_context(open_cluster(bench))
    make_namespace(cluster.admin())
    return cluster


# --- what a network costs a start ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Where pods are started."""

    pods: _Pods
    image: str
    """A component: a core module's pod has an address and no network namespace."""

    def one(self, name: str) -> float:
        """Milliseconds from creation to Running; the pod is gone afterwards."""
        return self.many([name]) * 1000

    def many(self, names: Sequence[str]) -> float:
        """Seconds until all run."""
        began = time.monotonic()
        for name in names:
            self.pods.create(name, self.image, "sleep", "3600", restartPolicy="Never")
        self.pods.watched.wait(dict.fromkeys(names, "Running"), "Running")
        taken = max(self.pods.watched.at[name, "Running"] for name in names) - began
        self.pods.delete(names)
        return taken


def _starts(
    cluster: Cluster, bare: Settings, component: Path, *, rounds: int, reporter: Reporter, say: Say
) -> Iterator[Figure | Beside]:
    with contextlib.ExitStack() as stack:
        other = _cluster(stack, replace(bare, max_pods=BURST_PODS + _SPARE_PODS), "bench-bare", reporter)
        sides = [
            _Side(pods=_Pods(each, watched), image=push_guest(each, component))
            for each in (cluster, other)
            for watched in [stack.enter_context(Watched(Kube(each.admin_credentials())))]
        ]
        say(f"{LATENCY_RUNS} pods with a network and {LATENCY_RUNS} without, in turns")
        for side in sides:
            side.one("warm")
        found = in_turns(sides, LATENCY_RUNS, lambda side, number: side.one(f"single-{number}"))
        yield Beside(
            name="create to Running",
            unit="ms",
            values=found[0],
            others=found[1],
            what="without a network",
            target="at most 3 ms more",
        )
        say(f"{rounds} bursts of {BURST_PODS} with a network and {rounds} without, in turns")
        found = in_turns(
            sides, rounds, lambda side, number: side.many([f"burst-{number}-{each}" for each in range(BURST_PODS)])
        )
        yield Beside(
            name=f"burst of {BURST_PODS}, all Running",
            unit="pods/s",
            values=[BURST_PODS / seconds for seconds in found[0]],
            others=[BURST_PODS / seconds for seconds in found[1]],
            what="without a network",
            target="a ratio of 0.9 or more",
        )


def in_turns(sides: Sequence[_Of], rounds: int, measure: Callable[[_Of, int], _Sample]) -> list[list[_Sample]]:
    """The samples of each side. The first of one round is the last of the next, so that what one leaves behind on the
    machine meets all alike."""
    found: list[list[_Sample]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            found[index].append(measure(sides[index], number))
    return found


class _Pods:
    """Pods of one cluster."""

    def __init__(self, cluster: Cluster, watched: Watched) -> None:
        self.kube = cluster.admin()
        self.watched = watched

    def create(self, name: str, image: str, *words: str, app: str = "", **fields: Any) -> None:
        container: KubeObject = {"name": "main", "image": image, "imagePullPolicy": "IfNotPresent", "args": list(words)}
        spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False}
        metadata = {"name": name, "labels": {"app": app}} if app else {"name": name}
        pod: KubeObject = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec | fields}
        self.kube.create(api_path("pods", namespace=NAMESPACE), pod)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self.kube.delete(api_path("pods", name, namespace=NAMESPACE))
        self.watched.wait(dict.fromkeys(names, "gone"), "gone")

    def service(self, name: str, app: str, target_port: int) -> str:
        """Its cluster address."""
        spec = {"selector": {"app": app}, "ports": [{"port": _SERVICE_PORT, "targetPort": target_port}]}
        made = self.kube.create(
            api_path("services", namespace=NAMESPACE),
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec},
        )
        return str(made["spec"]["clusterIP"])


# --- what it gives ---------------------------------------------------------------------------------------------------


class _Network:
    def __init__(self, cluster: Cluster, watched: Watched, image: str, native: Path, say: Say) -> None:
        self.cluster = cluster
        self.pods = _Pods(cluster, watched)
        self.image = image
        self.native = native
        self.say = say

    def measure(self, rounds: int, pods: int) -> Iterator[Figure | Beside]:
        self._serve(["server", "other"])
        addresses = self.pods.watched.addresses
        server, other = (
            Native(program=self.native, namespace=network_load.namespace_of(self.cluster, addresses[name]))
            for name in ("server", "other")
        )
        with server.serving(_NATIVE_PORT):
            yield from self._echoes(rounds, addresses["server"], other)
        yield from self._services(other)
        yield from self._many(pods, other)

    def _serve(self, names: Sequence[str], app: str = "") -> float:
        """Seconds until all run."""
        began = time.monotonic()
        for name in names:
            self.pods.create(name, self.image, "serve", str(PORT), app=app or name)
        self.pods.watched.wait(dict.fromkeys(names, "Ready"), "Ready")
        return max(self.pods.watched.at[name, "Ready"] for name in names) - began

    def _echoes(self, rounds: int, server: str, other: Native) -> Iterator[Figure | Beside]:
        ways = {
            "pod to pod": [(server, PORT), (server, _NATIVE_PORT)],
            "through a Service": [
                (self.pods.service("to-pod", "server", PORT), _SERVICE_PORT),
                (self.pods.service("to-native", "server", _NATIVE_PORT), _SERVICE_PORT),
            ],
        }
        for way, (to_pod, to_native) in ways.items():
            self._await_reached(other, [to_pod[0]], to_pod[1])
            self._await_reached(other, [to_native[0]], to_native[1])
            self.say(f"{way}: {rounds} rounds of {network_load.CONNECTS} connections and {network_load.SECONDS} s")
            clients: list[Callable[[int], Load]] = [
                lambda number, to=to_pod, way=way: self._from_pod(f"client-{way.split()[0]}-{number}", *to),  # type: ignore[misc]
                lambda _number, to=to_native: other.load(*to),  # type: ignore[misc]
            ]
            pods, native = in_turns(clients, rounds, lambda client, number: client(number))
            yield Beside(
                name=f"connect to first byte, {way}, p50",
                unit="ms",
                values=[each for load in pods for each in load.first_byte_ms],
                others=[each for load in native for each in load.first_byte_ms],
                what="native",
                target="0.3" if way == "pod to pod" else "",
            )
            yield Beside(
                name=f"echoes, {way}",
                unit="req/s",
                values=[load.per_second for load in pods],
                others=[load.per_second for load in native],
                what="native",
            )

    def _from_pod(self, name: str, address: str, port: int) -> Load:
        self.pods.create(name, self.image, *network_load.load_words(address, port), restartPolicy="Never")
        self.pods.watched.wait({name: "Succeeded"}, "Succeeded")
        text = self.pods.kube.body(f"{api_path('pods', name, namespace=NAMESPACE)}/log").decode()
        self.pods.delete([name])
        return network_load.read_load(text)

    def _await_reached(self, client: Native, addresses: Sequence[str], port: int) -> float:
        """When all of them had answered. Raises WaitTimeoutError."""
        deadline = time.monotonic() + _REACH_SECONDS
        while (reached := client.reached(addresses, port)) < len(addresses):
            if time.monotonic() > deadline:
                raise WaitTimeoutError(f"{reached} of {len(addresses)} answered within {_REACH_SECONDS:g} s")
            time.sleep(0.1)
        return time.monotonic()

    def _services(self, other: Native) -> Iterator[Figure]:
        self.say(f"{SERVICES} Services with {ENDPOINTS} endpoints each")
        node = network_load.node_namespace(self.cluster)
        addresses = [self.pods.service(f"many-{number}", "backend", PORT) for number in range(SERVICES)]
        names = [f"backend-{number}" for number in range(ENDPOINTS)]
        self._serve(names, app="backend")
        ready = max(self.pods.watched.at[name, "Ready"] for name in names)
        wanted = SERVICES * ENDPOINTS
        deadline = time.monotonic() + _RULES_SECONDS
        backends = [self.pods.watched.addresses[name] for name in names]
        while (found := count_endpoints(_rules(node), backends)) < wanted:
            if time.monotonic() > deadline:
                raise WaitTimeoutError(f"{found} of {wanted} endpoints had rules within {_RULES_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)
        taken = time.monotonic() - ready
        self._await_reached(other, addresses, _SERVICE_PORT)
        yield Figure(
            name=f"{SERVICES} Services x {ENDPOINTS} endpoints, rules after ready",
            value=taken,
            unit="s",
            target=1.0,
            detail="after the last pod's Ready was seen; each Service answered",
        )
        for number in range(SERVICES):
            self.pods.kube.delete(api_path("services", f"many-{number}", namespace=NAMESPACE))
        self.pods.delete(names)

    def _many(self, pods: int, other: Native) -> Iterator[Figure]:
        self.say(f"{pods} pods that listen")
        names = [f"many-{number}" for number in range(pods)]
        ready = self._serve(names, app="many")
        began = time.monotonic()
        self._await_reached(other, [self.pods.watched.addresses[name] for name in names], PORT)
        yield Figure(
            name=f"{pods} pods on a node, all reached from a pod",
            value=time.monotonic() - began,
            unit="s",
            detail=f"one by one; all Ready {ready:.1f} s after the first was created, {pods / ready:.1f} pods/s",
        )
        self.pods.delete(names)


def _rules(node: Path) -> str:
    argv = ["nsenter", f"--net={node}", "nft", "--numeric", "list", "table", "ip", "kube-proxy"]
    return process.run(argv, timeout_seconds=_RULES_SECONDS).stdout


def count_endpoints(rules: str, addresses: Sequence[str]) -> int:
    """How many times the Services ``many-...`` lead to one of the addresses, by what ``nft`` lists of kube-proxy's
    table: in a Service's chain, whether it replaces addresses itself (1.37) or goes to a chain per endpoint (1.34)."""
    chains = re.findall(rf"^\s*chain service-\w+-{NAMESPACE}/many-\d+/.*?^\s*}}$", rules, re.MULTILINE | re.DOTALL)
    wanted = set(addresses)
    return sum(len(wanted & set(re.findall(r"\d+\.\d+\.\d+\.\d+", chain))) for chain in chains)
