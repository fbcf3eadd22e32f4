"""How a test gets at a pod: directly where this machine has a way to its address, else by ``kubectl port-forward``.

A way is a route other than the default one. By the default route a test would leave the machine, and whatever has
that address out there is no pod (pods of kind, minikube and of nodes without root have such addresses).
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

from wasilet_common.child import ending_with_parent

from wasilet.controlplane.pod_network import machine_networks, plan_of
from wasilet.errors import HarnessError, UsageError
from wasilet.state import State
from wasilet.testing.cluster import WasmCluster
from wasilet.testing.http import NoAnswerError
from wasilet.testing.kubectl import kubectl_path

CONNECT_SECONDS = 0.5
FORWARD_SECONDS = 20.0
LOOPBACK = "127.0.0.1"
_END_SECONDS = 5.0
_POLL_SECONDS = 0.02
_FORWARDING = re.compile(rb"^Forwarding from 127\.0\.0\.1:(\d+) -> ", re.MULTILINE)
_SHOWN_CHARACTERS = 300
_READ_BYTES = 4096


def is_routed(address: str) -> bool:
    """Whether this machine has a way to an address that is not the default route. IPv6 beyond loopback: no."""
    found = ipaddress.ip_address(address)
    if found.is_loopback:
        return True
    return isinstance(found, ipaddress.IPv4Address) and any(found in network for network in machine_networks())


def connects(address: str, port: int) -> bool:
    """Whether something answers there, be it that no one listens."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


class PodId(NamedTuple):
    """Names are used again, and a forward leads to one pod."""

    name: str
    uid: str


class Reach:
    """The ways to the pods of one namespace; forwards are ended by :meth:`close`."""

    def __init__(self, cluster: WasmCluster, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._lock = threading.Lock()
        self._direct: set[tuple[str, int]] = set()
        self._forwards: dict[tuple[PodId, int], _Forward] = {}

    def is_direct(self, address: str, port: int) -> bool:
        """Whether a pod with this address is asked there."""
        if not is_routed(address):
            return False
        if ipaddress.ip_address(address).is_loopback:
            return True
        is_own = self._cluster.provider == "host"
        plan = plan_of(State.of(self._cluster.settings)) if is_own else None
        if plan is not None and ipaddress.ip_address(address) in plan.pods:
            return not plan.rootless
        # A VPN's route may hold the pods' addresses as well.
        if (address, port) not in self._direct and not connects(address, port):
            return False
        self._direct.add((address, port))
        return True

    def way(self, pod: PodId, address: str, port: int) -> tuple[str, int]:
        """Where a pod's port is asked. Raises NoAnswerError when there is no forward yet, and UsageError without
        kubectl."""
        return (address, port) if self.is_direct(address, port) else (LOOPBACK, self._forwarded(pod, port))

    def close(self) -> None:
        """End the forwards."""
        with self._lock:
            for forward in self._forwards.values():
                forward.end()
            self._forwards.clear()

    def _forwarded(self, pod: PodId, port: int) -> int:
        with self._lock:
            known = self._forwards.get((pod, port))
            if known is None or not known.runs:
                if known is not None:
                    known.end()
                known = self._forwards[pod, port] = self._begin(pod.name, port)
            return known.port

    def _begin(self, pod: str, port: int) -> _Forward:
        try:
            words = [kubectl_path(self._cluster), "--kubeconfig", str(self._cluster.kubeconfig)]
        except HarnessError as error:
            raise UsageError(
                f"this machine has no way to the address of pod/{pod}, and there is no kubectl to forward by: {error}"
            ) from error
        words += ["--namespace", self._namespace, "port-forward", "--address", LOOPBACK, f"pod/{pod}", f":{port}"]
        forward = _Forward(words, self._cluster.settings.environ)
        try:
            forward.wait()
        except BaseException:
            forward.end()
            raise
        return forward


class _Forward:
    """A running ``kubectl port-forward``; it ends with this process at the latest."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]) -> None:
        # A file, since kubectl writes a line per connection, and a pipe that no one reads stops it.
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._pod = words[-2]
        self.port = 0
        try:
            self._process = subprocess.Popen(
                ending_with_parent(words),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env=dict(environ),
            )
        except OSError:
            self._output.close()
            raise

    @property
    def runs(self) -> bool:
        """It ends when its pod does."""
        return self._process.poll() is None

    def wait(self, within_seconds: float = FORWARD_SECONDS) -> None:
        """Until it listens. Raises NoAnswerError with what kubectl printed."""
        deadline = time.monotonic() + within_seconds
        while (found := _FORWARDING.search(self._said())) is None:
            if not self.runs or time.monotonic() > deadline:
                ended = "ended" if not self.runs else f"was not ready within {within_seconds:g} s"
                said = self._said().decode(errors="replace").strip()[:_SHOWN_CHARACTERS]
                raise NoAnswerError(f"the forward to {self._pod} {ended}: {said or 'kubectl printed nothing'}")
            time.sleep(_POLL_SECONDS)
        self.port = int(found[1])

    def end(self) -> None:
        """Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _said(self) -> bytes:
        # The child writes at the offset that both share: read without moving it.
        return os.pread(self._output.fileno(), _READ_BYTES, 0)
