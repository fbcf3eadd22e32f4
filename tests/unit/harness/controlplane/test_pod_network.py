"""Which ranges a new cluster's pod network has, and what keeps it from having one."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from wasilet.controlplane import pod_network
from wasilet.controlplane.pod_network import NetworkPlan
from wasilet.errors import UsageError
from wasilet.settings import Settings, load
from wasilet.state import State

from tests.ordinary_user import ordinary_user

pytestmark = pytest.mark.unit
Network = ipaddress.IPv4Network


def settings(root: Path, **options: str) -> Settings:
    return load(options, environ={"WASILET_STATE_HOME": str(root)})


def reserve(made: Settings, name: str) -> NetworkPlan:
    state = State(made.state_root, name)
    pod_network.reserve(made, state, say=lambda _: None)
    plan = pod_network.plan_of(state)
    assert plan is not None
    return plan


@pytest.fixture
def possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that can have a pod network, with one route."""
    monkeypatch.setattr(pod_network, "obstacle", lambda *_, **__: "")
    monkeypatch.setattr(pod_network, "machine_networks", lambda: [Network("172.17.0.0/16")])


@pytest.mark.usefixtures("possible")
def test_clusters_that_are_made_at_the_same_moment_share_no_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = settings(tmp_path)
    together = threading.Barrier(2)

    def look() -> list[Network]:
        # Both would be here at once, and neither have written anything down, if they did not take turns.
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.5)
        return []

    monkeypatch.setattr(pod_network, "machine_networks", look)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda name: reserve(made, name), ("one", "two"))
    ranges = [one.pods, one.services, two.pods, two.services]
    for number, first in enumerate(ranges):
        assert not any(first.overlaps(second) for second in ranges[number + 1 :]), ranges


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"pod_cidr": "172.17.64.0/18"}, r"--pod-cidr 172\.17\.64\.0/18 overlaps 172\.17\.0\.0/16"),
        ({"service_cidr": "172.16.0.0/12"}, r"--service-cidr 172\.16\.0\.0/12 overlaps 172\.17\.0\.0/16"),
        ({"pod_cidr": "10.3.0.0/16", "service_cidr": "10.3.128.0/20"}, r"--service-cidr .* overlaps 10\.3\.0\.0/16"),
        ({"pod_cidr": "10.3.0.0/24"}, "too small"),
        ({"pod_cidr": "10.3.0.1/16"}, "--pod-cidr"),
    ],
)
def test_a_range_that_cannot_be_had_is_refused_by_name_and_nothing_is_recorded(
    tmp_path: Path, asked: dict[str, str], words: str
) -> None:
    made = settings(tmp_path, **asked)
    with pytest.raises(UsageError, match=words):
        reserve(made, "c")
    assert pod_network.plan_of(State(made.state_root, "c")) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="without root that is the reason")
def test_a_machine_without_nft_has_none_and_says_which_package_brings_it(tmp_path: Path) -> None:
    assert (
        pod_network.obstacle(settings(tmp_path), find_nft=lambda _: None) == "nft is not installed (package nftables)"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is made by root")
def test_an_ordinary_user_has_one_where_user_namespaces_are_allowed_and_else_the_sysctl_is_the_reason() -> None:
    """The limit is one of a user namespace of that user's own."""
    program = "from wasilet.controlplane.pod_network import obstacle; from wasilet.settings import Settings\n"
    program += "print(obstacle(Settings(), find_nft=lambda _: '/nft'))"
    command = (sys.executable, "-P", "-c", program)
    limited = ("unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c")
    limit = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    with ordinary_user() as user:
        assert user.run(*command) == "\n"
        assert user.run(*limited, limit, "sh", *command) == (
            "user namespaces are switched off (user.max_user_namespaces is 0)\n"
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="its own user namespace is made by root")
def test_where_user_namespaces_are_forbidden_there_is_none_and_the_reason_is_the_sysctl() -> None:
    """The limit is one of the test's own user namespace."""
    program = "from wasilet.controlplane.pod_network import obstacle; from wasilet.settings import Settings\n"
    program += "print(obstacle(Settings()))"
    script = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c '{program}'"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "user namespaces are switched off (user.max_user_namespaces is 0)", done.stderr


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("pods", "prefix"), [(0, 22), (1000, 22), (1001, 21), (3000, 20), (4072, 20), (4073, 19)])
def test_a_nodes_share_holds_the_pods_that_it_is_made_for(tmp_path: Path, pods: int, prefix: int) -> None:
    assert reserve(settings(tmp_path, max_pods=str(pods)), "c").node_prefix == prefix


@pytest.mark.usefixtures("possible")
def test_a_range_that_holds_no_two_nodes_is_refused_before_the_cluster_is_made(tmp_path: Path) -> None:
    made = settings(tmp_path, max_pods="3000", pod_cidr="10.44.0.0/20")
    with pytest.raises(UsageError, match="too small for nodes of 3000 pods, which take a /20 each"):
        reserve(made, "c")


def test_a_cluster_of_an_earlier_release_keeps_the_shares_that_its_nodes_have(tmp_path: Path) -> None:
    made = settings(tmp_path)
    state = State(made.state_root, "c")
    state.update(pod_network={"pod_cidr": "10.44.0.0/16", "service_cidr": "10.45.0.0/16"})
    plan = pod_network.plan_of(state)
    assert plan is not None
    assert plan.node_prefix == 22
