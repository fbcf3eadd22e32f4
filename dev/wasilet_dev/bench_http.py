"""``invoke bench http``, second part: pods that serve, from their creation to the first answer, and their cost."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
from wasilet.apps.samples import find_app
from wasilet.build.application import build
from wasilet.build.component_host import ensure_component_host
from wasilet.errors import WaitTimeoutError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.providers.base import Cluster
from wasilet.settings import Settings
from wasilet.steps import Reporter
from wasilet.storage import read_json
from wasilet.testing.http import NoAnswerError, ask
from wasilet_node.runtime.zygote import SANDBOX_NAME

from wasilet_dev.bench import (
    LATENCY_RUNS,
    NAMESPACE,
    Figure,
    Watched,
    bench_cluster,
    make_namespace,
    push_guest,
    quantile,
    remove_cluster,
)

PODS = 20
"""That serve at the same time."""

PORT = 8080
_ANSWER_SECONDS = 120.0
"""18 MB are compiled first."""
_ASK_SECONDS = 5.0
_PAUSE_SECONDS = 0.001
_RUST = Path(__file__).resolve().parents[2] / "tests" / "guests" / "http_p2.wasm"
_TARGETS_MS = {"Rust": 60.0, "Python": 150.0, "JavaScript": 150.0}
_RUST_MEBIBYTES = 6.0

Say = Callable[[str], None]


def bench_servers(settings: Settings, *, pods: int, reporter: Reporter, say: Say) -> list[Figure]:
    """Create to the first 200 in Rust, Python and JavaScript; ``pods`` that serve at once; private memory per pod.

    Raises HarnessError when the cluster does not come up, WaitTimeoutError when pods do not come where they should."""
    from wasilet.cluster.opening import open_cluster
    from wasilet.cluster.up import up

    ensure_component_host(say=say, environ=settings.environ)
    components = {
        "Rust": _RUST,
        "Python": build(find_app("http-python"), say=say, environ=settings.environ).module,
        "JavaScript": build(find_app("http-js"), say=say, environ=settings.environ).module,
    }
    with bench_cluster(replace(settings, max_pods=pods + 50)) as bench:
        try:
            up(bench, reporter=reporter).raise_for_failure()
            with open_cluster(bench) as cluster:
                images = {language: push_guest(cluster, module) for language, module in components.items()}
                return _Servers(cluster, images, say).measure(pods)
        finally:
            remove_cluster(bench)


class _Servers:
    def __init__(self, cluster: Cluster, images: dict[str, str], say: Say) -> None:
        self.cluster = cluster
        self.kube = cluster.admin()
        self.images = images
        self.say = say

    def measure(self, pods: int) -> list[Figure]:
        make_namespace(self.kube)
        found: list[Figure] = []
        with Watched(Kube(self.cluster.admin_credentials())) as watched:
            for language in self.images:
                found += self._first_answers(watched, language)
            found += self._many(watched, pods)
        return found

    def _first_answers(self, watched: Watched, language: str) -> list[Figure]:
        """One pod at a time; the first compiles, and is not counted."""
        self.say(f"{LATENCY_RUNS} pods in {language}, one at a time")
        running, answered, sizes = [], [], []
        for number in range(LATENCY_RUNS + 1):
            name = f"{language.lower()}-{number}"
            began = time.monotonic()
            self._create(name, language)
            watched.wait({name: "address"}, "given an address")
            at = self._first_answer(watched.addresses[name], "/hello" if language == "Rust" else "/healthz")
            watched.wait({name: "Running"}, "Running")
            if number:
                answered.append((at - began) * 1000)
                running.append((watched.at[name, "Running"] - began) * 1000)
                sizes += self._private_mebibytes()
            self._delete(watched, [name])
        return [
            Figure(
                name=f"{language}: create to first 200, p50",
                value=statistics.median(answered),
                unit="ms",
                target=_TARGETS_MS[language],
                detail=f"p90 {quantile(answered, 0.9):.1f}; create to Running {statistics.median(running):.1f}",
            ),
            Figure(name=f"{language}: private memory, one pod", value=statistics.median(sizes), unit="MiB"),
        ]

    def _many(self, watched: Watched, pods: int) -> list[Figure]:
        self.say(f"{pods} pods in Rust at once")
        names = [f"many-{number}" for number in range(pods)]
        began = time.monotonic()
        for name in names:
            self._create(name, "Rust")
        watched.wait(dict.fromkeys(names, "Ready"), "Ready")
        ready = max(watched.at[name, "Ready"] for name in names) - began
        for name in names:
            self._first_answer(watched.addresses[name], "/hello")
        sizes = self._private_mebibytes()
        began = time.monotonic()
        self._delete(watched, names)
        gone = time.monotonic() - began
        return [
            Figure(
                name=f"{pods} pods that serve, all Ready",
                value=ready,
                unit="s",
                detail=f"{pods / ready:.1f} pods/s; each answered; all gone after {gone:.1f} s",
            ),
            Figure(
                name=f"{pods} pods that serve, private memory of each",
                value=statistics.median(sizes),
                unit="MiB",
                target=_RUST_MEBIBYTES,
                detail=f"{len(sizes)} sandboxes, {min(sizes):.1f} to {max(sizes):.1f}, {sum(sizes):.0f} together",
            ),
        ]

    def _first_answer(self, address: str, path: str) -> float:
        """When it came. Raises WaitTimeoutError."""
        host = f"[{address}]" if ":" in address else address
        deadline = time.monotonic() + _ANSWER_SECONDS
        why = "it was not asked"
        while time.monotonic() < deadline:
            try:
                answer = ask(f"http://{host}:{PORT}{path}", timeout_seconds=_ASK_SECONDS)
            except NoAnswerError as error:
                why = str(error)
            else:
                if answer.status == 200:
                    return time.monotonic()
                why = f"{answer.status} {answer.text[:100]}"
            time.sleep(_PAUSE_SECONDS)
        raise WaitTimeoutError(f"{address} did not answer within {_ANSWER_SECONDS:g} s: {why}")

    def _private_mebibytes(self) -> list[float]:
        """Of each sandbox that has a container: what no other process shares."""
        node = self.cluster.node_names()[0]
        supervisor = int(read_json(self.cluster.state.node(node) / "supervisor.json")["pid"])
        sizes = []
        for found in psutil.Process(supervisor).children():
            with contextlib.suppress(psutil.Error, OSError):
                if found.name() == SANDBOX_NAME:
                    sizes.append(_private_mebibytes(found.pid))
        return sizes

    def _create(self, name: str, language: str) -> None:
        container: KubeObject = {
            "name": "main",
            "image": self.images[language],
            "imagePullPolicy": "IfNotPresent",
            "ports": [{"containerPort": PORT}],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        }
        pod: KubeObject = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {
                "containers": [container],
                "volumes": [{"name": "data", "emptyDir": {}}],
                "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": False,
            },
        }
        self.kube.create(api_path("pods", namespace=NAMESPACE), pod)

    def _delete(self, watched: Watched, names: Sequence[str]) -> None:
        for name in names:
            self.kube.delete(api_path("pods", name, namespace=NAMESPACE))
        watched.wait(dict.fromkeys(names, "gone"), "gone")


def _private_mebibytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
