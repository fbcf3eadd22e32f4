"""Which pods the node refuses, in whose words, and which it holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from wasilet_node.pods import admission, eviction
from wasilet_node.pods.admission import ADMITTED, Neighbour, admit, never
from wasilet_node.pods.nodeinfo import Pressure
from wasilet_node.pods.resources import pod_requests
from wasilet_node.volumes.base import VolumeRefusedError

from tests.unit.node.pods.fakes import NODE, FakeVolumes, make_pod

pytestmark = pytest.mark.unit


def pod_with(requests: dict[str, str] | None = None, ports: list[dict[str, Any]] | None = None, **spec: Any) -> Any:
    container = {"name": "c", "image": "x", "resources": {"requests": requests or {}}, "ports": ports or []}
    return make_pod(containers=[container], **spec)


def neighbours(*pods: Any) -> list[Neighbour]:
    return [Neighbour(pod=pod, requests=pod_requests(pod)) for pod in pods]


def refusal(pod: Any, *others: Any) -> tuple[str, str]:
    found = admit(pod, node=NODE, neighbours=neighbours(*others))
    return (found.verdict.reason, found.verdict.message) if found.verdict else ("", "")


def test_a_pod_that_fits_is_admitted() -> None:
    assert admit(pod_with({"cpu": "2", "memory": "1Gi"}), node=NODE, neighbours=[]) is ADMITTED


def test_too_many_pods() -> None:
    assert refusal(pod_with(), *[pod_with()] * 3) == (
        "OutOfpods",
        "Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3",
    )


def test_too_much_memory_is_counted_in_bytes() -> None:
    assert refusal(pod_with({"memory": "600Mi"}), pod_with({"memory": "600Mi"})) == (
        "OutOfmemory",
        "Node didn't have enough resource: memory, requested: 629145600, used: 629145600, capacity: 1073741824",
    )


def sysctl_refusal(*names: str, **more: Any) -> str:
    pod = make_pod(securityContext={"sysctls": [{"name": name, "value": "1"} for name in names]}, **more)
    found = never(pod, volumes=FakeVolumes())
    if found is ADMITTED:
        return ""
    assert found.verdict is not None
    assert found.verdict.reason == "SysctlForbidden"
    return found.verdict.message


def test_only_safe_sysctls_are_admitted() -> None:
    assert sysctl_refusal("kernel.shm_rmid_forced", "kernel/shm_rmid_forced", "net.ipv4.tcp_rmem") == ""
    assert sysctl_refusal("net.ipv4.tcp_rmem", "kernel.msgmax") == 'forbidden sysctl: "kernel.msgmax" not allowlisted'
    assert sysctl_refusal("net/ipv4/conf/eth0.1/rp_filter") == (
        'forbidden sysctl: "net.ipv4.conf.eth0/1.rp_filter" not allowlisted'
    )


def test_sysctls_of_a_namespace_that_the_host_shares_are_refused() -> None:
    assert sysctl_refusal("net.ipv4.tcp_rmem", hostNetwork=True) == (
        'forbidden sysctl: "net.ipv4.tcp_rmem" not allowed with host Net enabled'
    )
    assert sysctl_refusal("kernel.shm_rmid_forced", hostIPC=True) == (
        'forbidden sysctl: "kernel.shm_rmid_forced" not allowed with host IPC enabled'
    )
    assert sysctl_refusal("kernel.shm_rmid_forced", hostNetwork=True) == ""


TAINTED = dataclasses.replace(
    NODE,
    taints=(
        {"key": "arch", "value": "wasm", "effect": "NoExecute"},
        {"key": "arch", "value": "wasm", "effect": "NoSchedule"},
        {"key": "gone", "effect": "PreferNoSchedule"},
    ),
)


@pytest.mark.parametrize(
    "tolerations",
    [
        [{"operator": "Exists"}],
        [{"key": "arch", "operator": "Exists"}],
        [{"key": "arch", "operator": "Exists", "effect": "NoExecute"}],
        [{"key": "other"}, {"key": "arch", "value": "wasm"}],
        [{"key": "arch", "operator": "Equal", "value": "wasm", "effect": "NoExecute", "tolerationSeconds": 5}],
    ],
)
def test_a_taint_that_is_tolerated_admits(tolerations: list[dict[str, Any]]) -> None:
    assert admit(make_pod(tolerations=tolerations), node=TAINTED, neighbours=[]) is ADMITTED


@pytest.mark.parametrize(
    "tolerations",
    [
        None,
        [{"key": "arch"}],
        [{"key": "arch", "value": "arm"}],
        [{"key": "arch", "operator": "Exists", "effect": "NoSchedule"}],
        [{"key": "arch", "operator": "Resembles", "value": "wasm"}],
    ],
)
def test_a_no_execute_taint_refuses(tolerations: list[dict[str, Any]] | None) -> None:
    found = admit(make_pod(tolerations=tolerations), node=TAINTED, neighbours=[])
    assert found.verdict is not None
    assert (found.verdict.reason, found.verdict.message) == (
        "TaintToleration",
        "Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate",
    )


def test_a_resource_that_the_node_does_not_state_is_not_checked() -> None:
    assert refusal(pod_with({"ephemeral-storage": "1Ti"})) == ("", "")


@pytest.mark.parametrize(
    "spec",
    [
        {"nodeSelector": {"kubernetes.io/os": "linux"}},
        {
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [
                            {
                                "matchExpressions": [
                                    {"key": "kubernetes.io/os", "operator": "NotIn", "values": ["wasm32-wasi"]}
                                ]
                            },
                            {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["other"]}]},
                            {},
                        ]
                    }
                }
            }
        },
    ],
)
def test_a_node_that_is_not_the_one_asked_for(spec: dict[str, Any]) -> None:
    assert refusal(pod_with(**spec)) == (
        "NodeAffinity",
        "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector",
    )


@pytest.mark.parametrize(
    ("operator", "values", "matches"),
    [
        ("In", ["wasm32-wasi"], True),
        ("NotIn", ["linux"], True),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
        ("Gt", ["1"], False),
    ],
)
def test_affinity_operators(operator: str, values: list[str], matches: bool) -> None:  # noqa: FBT001
    expression = {"key": "kubernetes.io/os", "operator": operator, "values": values}
    required = {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    assert (refusal(pod_with(affinity=affinity)) == ("", "")) is matches


@pytest.mark.parametrize(
    ("mine", "taken"),
    [
        ({"hostPort": 80}, True),
        ({"hostPort": 80, "hostIP": "192.0.2.7"}, True),
        ({"hostPort": 81}, False),
        ({"hostPort": 80, "protocol": "UDP"}, False),
        ({"containerPort": 80}, False),
    ],
)
def test_host_ports(mine: dict[str, Any], taken: bool) -> None:  # noqa: FBT001
    reason, _ = refusal(pod_with(ports=[mine]), pod_with(ports=[{"hostPort": 80}]))
    assert reason == ("NodePorts" if taken else "")


def test_memory_pressure_refuses_only_who_reserved_nothing() -> None:
    node = dataclasses.replace(NODE, pressures=(Pressure(resource="memory", threshold_bytes=2, available_bytes=1),))
    found = admit(pod_with(), node=node, neighbours=[])
    assert found.verdict is not None
    assert (found.verdict.reason, found.verdict.message) == ("Evicted", "The node had condition: [MemoryPressure]. ")
    assert admit(pod_with({"memory": "1Mi"}), node=node, neighbours=[]) is ADMITTED
    tolerant = pod_with(tolerations=[{"operator": "Exists"}])
    assert admit(tolerant, node=node, neighbours=[]) is ADMITTED


def test_an_unsupported_volume_fails_a_job_and_holds_a_replicaset() -> None:
    volumes = FakeVolumes()
    volumes.refuse = VolumeRefusedError("nfs")
    pod = pod_with()
    pod["metadata"]["ownerReferences"] = [{"kind": "Job", "controller": True}]
    found = never(pod, volumes=volumes)
    assert found.verdict is not None
    assert (found.verdict.reason, found.verdict.message) == ("UnsupportedVolume", "nfs")
    pod["metadata"]["ownerReferences"] = [{"kind": "ReplicaSet", "controller": True}]
    found = never(pod, volumes=volumes)
    assert found.verdict is None
    assert found.hold is not None


def test_windows_is_refused() -> None:
    found = never(pod_with(os={"name": "windows"}), volumes=FakeVolumes())
    assert found.verdict is not None
    assert found.verdict.reason == "PodOSNotSupported"
    assert never(pod_with(os={"name": "linux"}), volumes=FakeVolumes()) is admission.ADMITTED


# ---- eviction


def usage(name: str, memory: int, *, requests: str = "0", priority: int = 0) -> eviction.Usage:
    pod = pod_with({"memory": requests}, priority=priority)
    pod["metadata"]["name"] = name
    return eviction.Usage(pod=pod, by_container={"c": memory})


def test_who_exceeds_a_request_goes_before_who_does_not_then_by_priority_then_by_excess() -> None:
    ranked = eviction.rank(
        [
            usage("modest", 50 * 2**20, requests="64Mi"),
            usage("important", 90 * 2**20, priority=10),
            usage("small", 2 * 2**20),
            usage("large", 40 * 2**20),
            usage("idle", 0),
            usage("critical", 2**30, priority=2_000_000_000),
        ],
        "memory",
    )
    assert [each.pod["metadata"]["name"] for each in ranked] == ["large", "small", "important", "modest"]


def test_who_made_most_files_goes_first_when_inodes_run_short() -> None:
    used = {"few": 1001, "many": 50_000, "none": 999}
    usages = [eviction.Usage(pod=usage(name, 0).pod, by_container={}, elsewhere=n) for name, n in used.items()]
    ranked = eviction.rank(usages, eviction.INODES)
    assert [each.elsewhere for each in ranked] == [50_000, 1001]
    pressure = Pressure(resource="inodes", threshold_bytes=50_000, available_bytes=0)
    assert eviction.verdict(ranked[0], pressure).message == (
        "The node was low on resource: inodes. Threshold quantity: 50000, available: 0. "
    )
