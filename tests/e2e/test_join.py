"""A node on another machine: here a network namespace with a cable to this one, which is all that an agent sees of it.

It gets a bootstrap file and nothing else, joins a cluster whose API server listens on loopback, and runs a pod whose
image it pulls from this machine's registry.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from wasilet.cluster import join
from wasilet.cluster.down import down
from wasilet.cluster.up import up
from wasilet.errors import ApiError
from wasilet.kube.client import api_path
from wasilet.kube.resources import node_is_ready
from wasilet.oci.publish import push_app
from wasilet.ports import port_is_free
from wasilet.process import is_alive
from wasilet.steps import SilentReporter, Status

from tests.clusters import TestCluster, whole_cluster

pytestmark = pytest.mark.e2e

HERE, THERE = "198.18.55.1", "198.18.55.2"
"""Of the range that RFC 2544 keeps for tests of network gear."""

WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Machine:
    """Another machine."""

    name: str

    def run(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a network namespace")
    if shutil.which("ip") is None:
        pytest.skip("the program ip (Debian: iproute2) is not installed")
    name, here, there = f"wasilet{os.getpid()}", f"wh{os.getpid()}", f"wt{os.getpid()}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there)
        ip("link", "set", there, "netns", name)
        ip("address", "add", f"{HERE}/30", "dev", here)
        ip("link", "set", here, "up")
        for words in (("address", "add", f"{THERE}/30", "dev", there), ("link", "set", there, "up")):
            ip("-n", name, *words)
        ip("-n", name, "link", "set", "lo", "up")
        yield Machine(name)
    finally:
        subprocess.run(["ip", "link", "delete", here], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def own() -> Iterator[TestCluster]:
    with whole_cluster("joined") as made:
        yield made


@pytest.fixture(scope="module")
def joined(own: TestCluster, machine: Machine) -> Iterator[join.Joining]:
    """The other machine's node, until the module's tests are over."""
    with tempfile.TemporaryDirectory(prefix="wj", dir="/tmp") as folder:
        yield from _joined(own, machine, Path(folder))


def _joined(own: TestCluster, machine: Machine, folder: Path) -> Iterator[join.Joining]:
    data = folder / "data"
    made = join.bootstrap(own.cluster, node="other-1", file=folder / "b.conf", address=HERE, registry=True)
    command = [
        sys.executable,
        "-P",
        "-m",
        "wasilet_node",
        *made.command[1:],
        "--node-ip",
        THERE,
        "--data-dir",
        str(data),
    ]
    command[command.index("b.conf")] = str(made.file)
    assert made.registry_login is not None
    command[command.index(made.registry_login.name)] = str(made.registry_login)
    env = {key: value for key, value in os.environ.items() if key in {"PATH", "HOME"}}
    with (folder / "log").open("wb") as log:
        agent = machine.run(*command, stdout=log, stderr=log, env=env, cwd="/")
    try:
        eventually(lambda: ready(own, "other-1"), "node other-1", (folder / "log").read_text)
        yield made
    finally:
        shutdown = [sys.executable, "-P", "-m", "wasilet_node", "shutdown", "--data-dir", str(data), "--timeout", "10"]
        machine.run(*shutdown, env=env, cwd="/").wait(20)
        agent.wait(20)


def eventually(probe: Callable[[], Any], what: str, scene: Callable[[], str] = lambda: "") -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := probe()):
        assert time.monotonic() < deadline, f"{what} did not come within {WAIT_SECONDS:g} s\n{scene()}"
        time.sleep(0.1)
    return found


def ready(cluster: TestCluster, name: str) -> bool:
    node = cluster.kube.find(api_path("nodes", name))
    return node is not None and node_is_ready(node)


def test_the_other_machine_reaches_nothing_but_the_proxies(machine: Machine, own: TestCluster, joined: Any) -> None:
    ports = own.cluster.ports()
    script = (
        "import socket, sys\nfor port in sys.argv[2:]:\n    print(socket.socket().connect_ex((sys.argv[1], int(port))))"
    )
    names = ["apiserver", "registry", "etcd", "apiserver_door", "registry_door"]
    numbers = [str(ports[name]) for name in names]
    done = machine.run(sys.executable, "-c", script, HERE, *numbers, stdout=subprocess.PIPE)
    out, _ = done.communicate(timeout=20)
    reached = dict(zip(names, [line == "0" for line in out.decode().split()], strict=True))
    assert reached == {
        "apiserver": False, "registry": False, "etcd": False, "apiserver_door": True, "registry_door": True,
    }  # fmt: skip


def test_the_registry_proxy_wants_a_login_which_can_only_read(own: TestCluster, joined: join.Joining) -> None:
    assert joined.registry_login is not None
    assert joined.registry_login.stat().st_mode & 0o077 == 0
    logins = json.loads(joined.registry_login.read_text())["auths"]
    assert {*logins} == {joined.registry}
    basic = {"Authorization": f"Basic {logins[joined.registry]['auth']}"}
    statuses = {}
    for where in (joined.registry, f"127.0.0.1:{own.cluster.ports()['registry']}"):
        for what, headers in (("nothing", {}), ("login", basic)):
            for method, path in (("GET", "/v2/"), ("POST", "/v2/intruder/blobs/uploads/")):
                connection = http.client.HTTPConnection(where, timeout=5)
                connection.request(method, path, headers=headers)
                statuses[where == joined.registry, what, method] = connection.getresponse().status
                connection.close()
    assert statuses == {
        (True, "nothing", "GET"): 401, (True, "nothing", "POST"): 401,
        (True, "login", "GET"): 200, (True, "login", "POST"): 405,
        (False, "nothing", "GET"): 401, (False, "nothing", "POST"): 401,
        (False, "login", "GET"): 401, (False, "login", "POST"): 401,
    }  # fmt: skip


def test_it_runs_a_pod_from_this_machines_registry_and_its_log_comes_back(
    own: TestCluster, joined: join.Joining
) -> None:
    assert push_app("hello-world", own.settings, reporter=SilentReporter())[0].succeeded
    spec = {
        "nodeName": "other-1",
        "containers": [{"name": "main", "image": f"{joined.registry}/hello-world:latest"}],
    }
    path = api_path("pods", namespace="default")
    own.kube.create(path, {"metadata": {"name": "far"}, "spec": spec})

    def said() -> bool:
        try:
            with own.kube.stream(f"{path}/far/log", idle_seconds=10.0) as lines:
                return any("Hello, from WASI" in line for line in lines)
        except ApiError:
            return False

    eventually(said, "the log of pod far", lambda: str(own.kube.get(f"{path}/far")["status"]))
    assert own.kube.get(f"{path}/far")["status"]["hostIP"] == THERE
    own.kube.delete(f"{path}/far")


def test_proxies_are_listed_and_a_dead_one_is_opened_again_by_up(own: TestCluster, joined: Any) -> None:
    names = [component["name"] for component in own.status()["components"]]
    assert {join.API_SERVER_PROXY, join.REGISTRY_PROXY} <= set(names)
    record = own.cluster.state.alive(join.API_SERVER_PROXY)
    assert record is not None
    os.kill(record.process.pid, 9)
    eventually(lambda: not is_alive(record.process), "the end of the door")
    recap = up(own.settings, reporter=SilentReporter())
    assert [o.name for o in recap.outcomes if o.status is Status.CHANGED] == ["apiserver door"]
    eventually(lambda: ready(own, "other-1"), "node other-1 again")


def test_down_closes_the_proxies(own: TestCluster) -> None:
    """The last: after it there is no cluster."""
    ports = own.cluster.ports()
    assert down(own.settings, reporter=SilentReporter(), purge=True).succeeded
    assert port_is_free(ports["apiserver_door"])
    assert port_is_free(ports["registry_door"])
