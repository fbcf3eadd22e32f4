"""A real etcd and kube-apiserver with one Node object, to call the kubelet API the way a cluster does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.server_rig import Authority, Pair, client_context

START_TIMEOUT_SECONDS = 60.0


def binary(name: str) -> str:
    """A control-plane binary: KUBEBUILDER_ASSETS first, then PATH. Skips the test when there is none."""
    path = shutil.which(name, path=os.pathsep.join([os.environ.get("KUBEBUILDER_ASSETS", ""), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} is neither in KUBEBUILDER_ASSETS nor on PATH")
    return path


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class ControlPlane:
    """Where the API server is and how to speak to it."""

    folder: Path
    authority: Authority
    url: str
    admin: Pair
    node: Pair

    def call(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json") -> Any:
        """A request as admin."""
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Content-Type": content_type},
        )
        context = client_context(self.authority.pem, self.admin)
        with urllib.request.urlopen(request, context=context, timeout=10) as response:
            return json.loads(response.read() or b"{}")

    def kubectl(self, *arguments: str) -> list[str]:
        """argv of a kubectl command as admin."""
        return [binary("kubectl"), "--kubeconfig", str(self.folder / "admin.conf"), *arguments]

    def place_node(self, port: int) -> None:
        """The Node object, whose kubelet listens on this port of loopback."""
        with contextlib.suppress(urllib.error.HTTPError):
            self.call("POST", "/api/v1/nodes", {"metadata": {"name": "wasm-1"}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }
        merge = "application/merge-patch+json"
        self.call("PATCH", "/api/v1/nodes/wasm-1/status", {"status": status}, content_type=merge)

    def place_pod(self, pod: dict[str, Any]) -> dict[str, Any]:
        """Create a pod bound to the node, and give back what the API server made of it."""
        spec = {**pod["spec"], "nodeName": "wasm-1", "automountServiceAccountToken": False}
        body = {"metadata": {"name": pod["metadata"]["name"]}, "spec": spec}
        made: dict[str, Any] = self.call("POST", "/api/v1/namespaces/default/pods", body)
        made["status"] = pod["status"]
        return made


@contextlib.contextmanager
def control_plane(folder: Path) -> Iterator[ControlPlane]:
    """Start etcd and the API server; end them, whatever happens."""
    etcd, apiserver = binary("etcd"), binary("kube-apiserver")
    authority = Authority()
    files: dict[str, Path] = {}
    pairs = {
        "server": authority.issue("kube-apiserver", addresses=["127.0.0.1"], server=True),
        "kubelet-client": authority.issue("kube-apiserver-kubelet-client", organizations=["system:masters"]),
        "admin": authority.issue("admin", organizations=["system:masters"]),
        "node": authority.issue("system:node:wasm-1", organizations=["system:nodes"]),
    }
    contents = {"ca.crt": authority.pem, "sa.key": authority.key_pem}
    for name, pair in pairs.items():
        contents |= {f"{name}.crt": pair.certificate, f"{name}.key": pair.key}
    for name, content in contents.items():
        files[name] = folder / name
        files[name].touch(mode=0o600)
        files[name].write_bytes(content)
    client_port, peer_port, api_port = free_port(), free_port(), free_port()
    url = f"https://127.0.0.1:{api_port}"
    user = {"client-certificate": str(files["admin.crt"]), "client-key": str(files["admin.key"])}
    admin_conf = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url, "certificate-authority": str(files["ca.crt"])}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "admin.conf").write_text(yaml.safe_dump(admin_conf))
    commands = {
        "etcd": [
            etcd,
            f"--data-dir={folder / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls=http://127.0.0.1:{client_port}",
            f"--advertise-client-urls=http://127.0.0.1:{client_port}",
            f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}",
            f"--initial-cluster=default=http://127.0.0.1:{peer_port}",
        ],
        "kube-apiserver": [
            apiserver,
            f"--etcd-servers=http://127.0.0.1:{client_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--secure-port={api_port}",
            f"--cert-dir={folder}",
            f"--tls-cert-file={files['server.crt']}",
            f"--tls-private-key-file={files['server.key']}",
            f"--client-ca-file={files['ca.crt']}",
            "--authorization-mode=Node,RBAC",
            "--anonymous-auth=false",
            "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={files['sa.key']}",
            f"--service-account-signing-key-file={files['sa.key']}",
            f"--kubelet-client-certificate={files['kubelet-client.crt']}",
            f"--kubelet-client-key={files['kubelet-client.key']}",
            f"--kubelet-certificate-authority={files['ca.crt']}",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-cluster-ip-range=10.96.0.0/16",
        ],
    }
    plane = ControlPlane(folder=folder, authority=authority, url=url, admin=pairs["admin"], node=pairs["node"])
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
            stack.callback(_end, process)
        _wait_ready(plane, process)
        yield plane


def _wait_ready(plane: ControlPlane, apiserver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    context = client_context(plane.authority.pem, plane.admin)
    while True:
        try:
            with urllib.request.urlopen(plane.url + "/readyz", context=context, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline or apiserver.poll() is not None:
                last = (plane.folder / "kube-apiserver.log").read_text()[-2000:]
                raise TimeoutError(f"the API server is not ready within {START_TIMEOUT_SECONDS:g} s: {last}") from error
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
