"""What ``bench network`` measures with: one Rust source, as a component in pods and as a native program beside them.

The native program runs in the network namespaces of pods, so that its packets take the same veths, bridge and rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from wasilet import process
from wasilet.apps.samples import find_app
from wasilet.build.application import build
from wasilet.build.toolchain import ensure_rust
from wasilet.errors import HarnessError, WaitTimeoutError
from wasilet.providers.base import Cluster
from wasilet.storage import read_json
from wasilet_node.runtime.zygote import SANDBOX_NAME

CONNECTS = 300
SECONDS = 2
"""Of echoes, per run."""

PORT = 7777
_SOURCE = Path(__file__).resolve().parents[2] / "tests" / "guests" / "echo_load"
_COMPILE_SECONDS = 300.0
_RUN_SECONDS = 300.0
_LISTEN_SECONDS = 20.0
_OWN_ADDRESS = re.compile(r"\|-- (\d+\.\d+\.\d+\.\d+)\n\s+/32 host LOCAL")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The two forms of the source."""

    component: Path
    native: Path


def programs(folder: Path, environ: Mapping[str, str], say: Say) -> Programs:
    """Build both, the native one into ``folder``. Raises HarnessError."""
    component = build(find_app(str(_SOURCE)), say=say, environ=environ).module
    native = folder / "echo-load"
    rustc = ensure_rust(say=say, env=environ).rustc
    argv = (rustc, "-O", "--edition", "2021", _SOURCE / "src" / "main.rs", "-o", native)
    process.run([str(word) for word in argv], timeout_seconds=_COMPILE_SECONDS, env=environ)
    return Programs(component=component, native=native)


@dataclass(frozen=True, kw_only=True)
class Load:
    """One run of ``echo-load load``."""

    first_byte_ms: tuple[float, ...]
    per_second: float


def read_load(text: str) -> Load:
    """What it printed. Raises HarnessError where that is something else, such as why it failed."""
    try:
        found = json.loads(text)
        first = tuple(int(each) / 1000 for each in found["first_byte_us"])
        return Load(first_byte_ms=first, per_second=int(found["requests"]) / float(found["seconds"]))
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise HarnessError(f"echo-load printed what is not understood: {text.strip()[:300]}") from error


def load_words(address: str, port: int) -> list[str]:
    """Arguments of the client."""
    return ["load", address, str(port), str(CONNECTS), str(SECONDS)]


def own_addresses(fib_trie: str) -> set[str]:
    """Addresses that a network namespace has, by ``/proc/<pid>/net/fib_trie``."""
    return set(_OWN_ADDRESS.findall(fib_trie))


def namespace_of(cluster: Cluster, address: str) -> Path:
    """Of a running pod. Raises HarnessError where no sandbox has that address."""
    node = cluster.node_names()[0]
    supervisor = int(read_json(cluster.state.node(node) / "supervisor.json")["pid"])
    for found in psutil.Process(supervisor).children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if found.name() == SANDBOX_NAME and address in own_addresses(
                Path(f"/proc/{found.pid}/net/fib_trie").read_text()
            ):
                return Path(f"/proc/{found.pid}/ns/net")
    raise HarnessError(f"no sandbox on {node} has the address {address}")


def node_namespace(cluster: Cluster) -> Path:
    """Of the first node: that of its kube-proxy. Raises HarnessError."""
    record = next(each for each in cluster.state.records() if each.name.startswith("node-"))
    for found in psutil.Process(record.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if found.name() == "kube-proxy":
                return Path(f"/proc/{found.pid}/ns/net")
    raise HarnessError("the node runs no kube-proxy")


@dataclass(frozen=True, kw_only=True)
class Native:
    """The native program in the namespace of a pod."""

    program: Path
    namespace: Path

    def load(self, address: str, port: int) -> Load:
        """Raises CommandError."""
        return read_load(self._run(load_words(address, port)).stdout)

    def reached(self, addresses: Sequence[str], port: int) -> int:
        """How many of them echo. Raises CommandError."""
        done = self._run(["reach", str(port), *addresses])
        found: dict[str, Any] = json.loads(done.stdout)
        return int(found["reached"])

    @contextlib.contextmanager
    def serving(self, port: int) -> Iterator[None]:
        """Raises WaitTimeoutError."""
        with subprocess.Popen(
            self._argv(["serve", str(port)]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as running:
            try:
                deadline = time.monotonic() + _LISTEN_SECONDS
                while not self.reached(["127.0.0.1"], port):
                    if time.monotonic() > deadline:
                        raise WaitTimeoutError(f"the native server did not listen within {_LISTEN_SECONDS:g} s")
                    time.sleep(0.1)
                yield
            finally:
                running.kill()

    def _argv(self, words: Iterable[str]) -> list[str | os.PathLike[str]]:
        return ["nsenter", f"--net={self.namespace}", self.program, *words]

    def _run(self, words: Iterable[str]) -> process.Completed:
        return process.run(self._argv(words), timeout_seconds=_RUN_SECONDS)
