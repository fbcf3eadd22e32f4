"""The kubelet API behind a real API server: reviews, ``kubectl logs``, and what a cluster's own tools ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from wasilet.kube.client import api_path
from wasilet_node.contract import DECLARED_FEATURES
from wasilet_node.kube.client import KubeClient
from wasilet_node.kube.kubeconfig import Cluster, Credentials
from wasilet_node.runtime.protocol import StartError
from wasilet_node.server.app import KubeletServer

from tests.clusters import TestCluster
from tests.component.plane import ControlPlane
from tests.unit.node.server.rig import (
    FakePods,
    FakeRuntime,
    client_context,
    log_folder,
    make_pod,
    make_settings,
    make_status,
)

pytestmark = pytest.mark.component

NODE = "server-1"
LINE = b"2025-01-01T00:00:0%d.000000000Z stdout F %s\n"


@pytest.fixture(scope="module")
def plane(control_plane_cluster: TestCluster) -> ControlPlane:
    return ControlPlane(control_plane_cluster, NODE)


class Kubelet:
    """A server that the API server finds through the Node object."""

    def __init__(self, plane: ControlPlane, folder: Path, kube: KubeClient) -> None:
        self.plane = plane
        self.log_root = folder
        self.pods = FakePods()
        self.runtime = FakeRuntime()
        self.placed: list[str] = []
        self.server = KubeletServer(
            settings=make_settings(folder, node_name=NODE),
            kube=kube,
            pods=self.pods,
            runtime=self.runtime,
            log_root=folder,
            client_ca_pem=plane.authority.pem,
        )

    async def kubectl(
        self, *arguments: str, typed: bytes = b"", timeout: float = 20.0, env: Mapping[str, str] | None = None
    ) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *self.plane.kubectl(*arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(typed), timeout)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode or 0, out.decode(), err.decode()

    async def get(self, path: str, token: str) -> tuple[int, str]:
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
            session.get(
                f"https://127.0.0.1:{self.server.port}{path}", ssl=client_context(self.plane.authority.pem)
            ) as response,
        ):
            return response.status, await response.text()

    def add(self, pod: dict[str, Any]) -> dict[str, Any]:
        placed = self.pods.add(self.plane.place_pod(pod))
        self.placed.append(str(pod["metadata"]["name"]))
        metadata = placed["metadata"]
        self.runtime.statuses.append(make_status(pod=metadata["name"], uid=metadata["uid"]))
        return placed


@pytest.fixture
async def kubelet(request: pytest.FixtureRequest, plane: ControlPlane, tmp_path: Path) -> AsyncIterator[Kubelet]:
    """To a node that declares it WebSockets come as clients speak them; else the API server makes SPDY of them."""
    kube = KubeClient(
        Cluster(server=plane.url, ca_data=plane.authority.pem.decode()),
        Credentials(certificate=plane.node.certificate.decode(), key=plane.node.key.decode()),
        user_agent="wasilet-test",
    )
    kubelet = Kubelet(plane, tmp_path, kube)
    serving = plane.authority.issue(f"system:node:{NODE}", addresses=["127.0.0.1"], server=True)
    kubelet.server.set_certificate(serving.certificate, serving.key)
    task = asyncio.create_task(kubelet.server.run())
    try:
        async with asyncio.timeout(5):
            await kubelet.server.wait_listening()
        features = () if getattr(request, "param", "") == "translated" else DECLARED_FEATURES
        await asyncio.to_thread(plane.place_node, kubelet.server.port or 0, features=features)
        yield kubelet
    finally:
        for name in kubelet.placed:
            path = api_path("pods", name, namespace="default")
            await asyncio.to_thread(plane.kube.delete, path, gracePeriodSeconds="0")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await kube.close()


async def test_kubectl_logs_reads_tails_and_follows(kubelet: Kubelet) -> None:
    pod = kubelet.add(make_pod("logs"))
    path = log_folder(kubelet.log_root, pod) / "0.log"
    path.write_bytes(LINE % (1, b"one") + LINE % (2, b"two"))
    assert await kubelet.kubectl("logs", "logs") == (0, "one\ntwo\n", "")
    assert await kubelet.kubectl("logs", "logs", "--tail=1", "--timestamps") == (
        0,
        "2025-01-01T00:00:02.000000000Z two\n",
        "",
    )
    following = asyncio.create_task(kubelet.kubectl("logs", "-f", "logs"))
    async with asyncio.timeout(20):
        while not kubelet.server._watcher._waiters:  # noqa: ASYNC110 - kubectl takes its time on a busy machine
            await asyncio.sleep(0.05)
    with path.open("ab") as file:
        file.write(LINE % (3, b"three"))
    pod["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 0}}
    assert await following == (0, "one\ntwo\nthree\n", "")


async def test_kubectl_shows_why_there_is_no_log(kubelet: Kubelet) -> None:
    kubelet.add(make_pod("waits", state={"waiting": {"reason": "ImagePullBackOff"}}))
    code, _, err = await kubelet.kubectl("logs", "waits")
    assert code == 1
    expected = 'container "main" in pod "waits" is waiting to start: trying and failing to pull image'
    assert err == f"Error from server (BadRequest): {expected}\n"
    kubelet.add(make_pod("once"))
    code, _, err = await kubelet.kubectl("logs", "--previous", "once")
    assert code == 1
    assert err == 'Error from server (BadRequest): previous terminated container "main" in pod "once" not found\n'


async def test_a_service_account_token_is_reviewed_and_its_rights_are_looked_up(kubelet: Kubelet) -> None:
    kube = kubelet.plane.kube
    accounts = api_path("serviceaccounts", namespace="default")
    kube.create(accounts, {"metadata": {"name": "scraper"}})
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
    token = kube.create(f"{accounts}/scraper/token", request)["status"]["token"]
    name = "system:serviceaccount:default:scraper"
    assert await kubelet.get("/pods", token) == (
        403,
        f"Forbidden (user={name}, verb=get, resource=nodes, subresource(s)=[pods proxy])\n",
    )
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    rules = [{"apiGroups": [""], "resources": ["nodes/healthz"], "verbs": ["get"]}]
    kube.create(f"{rbac}/clusterroles", {"metadata": {"name": "server-prober"}, "rules": rules})
    binding = {
        "metadata": {"name": "server-prober"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "server-prober"},
        "subjects": [{"kind": "ServiceAccount", "name": "scraper", "namespace": "default"}],
    }
    kube.create(f"{rbac}/clusterrolebindings", binding)
    assert await kubelet.get("/healthz", token) == (200, "ok")
    assert (await kubelet.get("/healthz", token[:-4] + "aaaa"))[0] == 401


async def test_the_pod_list_is_a_pod_list(kubelet: Kubelet) -> None:
    kubelet.add(make_pod("listed"))
    token_holder = kubelet.plane.authority.issue("admin", organizations=["system:masters"])
    async with (
        aiohttp.ClientSession() as session,
        session.get(
            f"https://127.0.0.1:{kubelet.server.port}/pods",
            ssl=client_context(kubelet.plane.authority.pem, token_holder),
        ) as response,
    ):
        text = await response.text()
        assert response.status == 200, text
    body = json.loads(text)
    assert body["kind"] == "PodList"
    assert [pod["metadata"]["name"] for pod in body["items"]] == ["listed"]


TRANSPORTS = pytest.mark.parametrize(
    ("kubelet", "websockets"), [("direct", "true"), ("translated", "true"), ("direct", "false")], indirect=["kubelet"]
)


@TRANSPORTS
async def test_kubectl_exec_carries_output_input_and_exit_code(kubelet: Kubelet, websockets: str) -> None:
    name = f"exec-{websockets}"
    kubelet.add(make_pod(name))
    env = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": websockets}
    assert await kubelet.kubectl("exec", name, "--", "echo", "a b", "c", env=env) == (0, "a b c\n", "done\n")
    assert kubelet.runtime.guest is not None
    assert kubelet.runtime.guest.argv == ("echo", "a b", "c")
    code, _, err = await kubelet.kubectl("exec", name, "--", "fail", "42", env=env)
    assert (code, err) == (42, "command terminated with exit code 42\n")
    code, out, err = await kubelet.kubectl("exec", "-i", name, "--", "cat", typed=b"hello", env=env)
    assert (code, out, err) == (0, "[hello]eof after 5\n", "")
    code, out, _ = await kubelet.kubectl("exec", name, "--", "big", "8", env=env)
    assert (code, len(out)) == (0, 8 * 1024 * 1024)


@TRANSPORTS
async def test_kubectl_exec_shows_traps_and_failed_starts(kubelet: Kubelet, websockets: str) -> None:
    name = f"trap-{websockets}"
    kubelet.add(make_pod(name))
    env = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": websockets}
    code, _, err = await kubelet.kubectl("exec", name, "--", "trap", env=env)
    assert (code, err) == (134, "wasm trap: unreachable\ncommand terminated with exit code 134\n")
    kubelet.runtime.start_error = StartError("no memory")
    code, _, err = await kubelet.kubectl("exec", name, "--", "echo", env=env)
    assert code == 1
    # the API server's translation of WebSockets puts its own "Internal error occurred" before ours
    assert err.startswith("error: Internal error occurred: ")
    assert err.endswith("Internal error occurred: error executing command in container: no memory\n")


@TRANSPORTS
async def test_an_exec_ends_when_kubectl_is_gone(kubelet: Kubelet, websockets: str) -> None:
    name = f"hang-{websockets}"
    kubelet.add(make_pod(name))
    with pytest.raises(TimeoutError):
        await kubelet.kubectl(
            "exec", name, "--", "hang", timeout=2.0, env={"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": websockets}
        )
    assert kubelet.runtime.guest is not None
    async with asyncio.timeout(5):
        await kubelet.runtime.guest.closed.wait()


@TRANSPORTS
async def test_kubectl_exec_with_a_terminal_behaves_like_one(kubelet: Kubelet, websockets: str) -> None:
    name = f"tty-{websockets}"
    kubelet.add(make_pod(name))
    master, terminal = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            *kubelet.plane.kubectl("exec", "-it", name, "--", "cat"),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "KUBECTL_REMOTE_COMMAND_WEBSOCKETS": websockets, "TERM": "xterm"},
        )
        try:
            async with asyncio.timeout(15):
                while kubelet.runtime.guest is None:  # noqa: ASYNC110 - nothing announces a guest
                    await asyncio.sleep(0.05)
                os.write(master, b"hj\x7fi\r")
                await asyncio.sleep(0.5)
                os.write(master, b"\x04")
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        os.set_blocking(master, False)
        screen = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                screen += os.read(master, 65536)
    finally:
        os.close(master)
        os.close(terminal)
    assert screen == b"hj\b \bi\r\n[hi\r\n]eof after 3\r\n"


@TRANSPORTS
async def test_kubectl_attach_shows_output_from_now_on(kubelet: Kubelet, websockets: str) -> None:
    name = f"attach-{websockets}"
    kubelet.add(make_pod(name))
    code, out, _ = await kubelet.kubectl("attach", name, env={"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": websockets})
    assert (code, out) == (0, "from now on\n")


@TRANSPORTS
async def test_kubectl_port_forward_is_told_why_it_cannot(kubelet: Kubelet, websockets: str) -> None:
    name = f"forward-{websockets}"
    kubelet.add(make_pod(name))
    path = api_path("pods", name, namespace="default")
    kubelet.plane.kube.patch(f"{path}/status", {"status": {"phase": "Running"}})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        *kubelet.plane.kubectl("port-forward", "--address=127.0.0.1", name, f"{port}:8080"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "KUBECTL_PORT_FORWARD_WEBSOCKETS": websockets},
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.timeout(15):
            assert b"Forwarding from" in await process.stdout.readline()
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            told = b""
            while b"no network of its own" not in told:
                line = await process.stderr.readline()
                assert line, told
                told += line
            writer.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
