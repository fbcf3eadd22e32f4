"""Load on a real node, by command: ``python -P -m tests.bench.load --list``.

Each scenario runs in a namespace of its own on one cluster, made for this and taken down again, prints one line of JSON
with its figures, and fails when a pod was lost, ran twice, went backwards or left something behind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet.cluster.opening import open_cluster
from wasilet.errors import ApiError
from wasilet.kube.client import Hangup, Kube, api_path
from wasilet.kube.credentials import Credentials
from wasilet.settings import load

from tests.clusters import TestCluster, whole_cluster
from tests.e2e.churn import Creator, counting_pod, run_counts
from tests.e2e.footprint import Footprint, footprint
from tests.e2e.guests import Guests, build_toolbox
from tests.e2e.history import History, Life
from tests.e2e.stage import SERVICE_ACCOUNT_SECONDS, namespace_object

GONE_SECONDS = 120.0
MAX_PODS = 1200
FOREVER = "say up; forever"


@dataclass
class Bench:
    """What a scenario works with."""

    cluster: TestCluster
    image: str
    node: str
    runs: Path
    bound: bool
    """Pods are bound to the node by their creator, which leaves the scheduler's share out."""

    def credentials(self) -> Credentials:
        return self.cluster.cluster.admin_credentials()

    def footprint(self) -> Footprint:
        return footprint(self.cluster.status()["nodes"][0])

    def pods(self, prefix: str, count: int, script: str, **spec: Any) -> list[dict[str, Any]]:
        node = self.node if self.bound else ""
        return [
            counting_pod(f"{prefix}-{i}", self.image, self.runs, script, node=node, spec=spec) for i in range(count)
        ]

    @contextmanager
    def namespace(self, name: str) -> Iterator[tuple[Kube, Creator, History]]:
        """A namespace with its history; judged, and gone without a trace, at the end."""
        kube = Kube(self.credentials())
        # Each pod counts its runs in a folder of this machine.
        kube.create("/api/v1/namespaces", namespace_object(name, pod_security="privileged"))
        deadline = time.monotonic() + SERVICE_ACCOUNT_SECONDS
        while kube.find(api_path("serviceaccounts", "default", namespace=name)) is None:
            assert time.monotonic() < deadline, "the namespace got no ServiceAccount"
            time.sleep(0.05)
        history, creator = History(self.credentials(), name), Creator(self.credentials(), name)
        try:
            yield kube, creator, history
            kube.delete(api_path("namespaces", name))
            history.wait(lambda h: h.present() == 0, within=GONE_SECONDS, what="all pods gone")
            assert not history.violations, history.violations[:20]
            twice = [uid for uid, count in run_counts(self.runs).items() if count > 1]
            assert not twice, f"{len(twice)} pods ran more than once"
        finally:
            kube.delete(api_path("namespaces", name))
            creator.close()
            history.close()
            kube.close()

    def settled(self) -> Footprint:
        """The node's footprint once nothing of any pod is left."""
        deadline = time.monotonic() + 30
        while any((found := self.footprint()).remains().values()):
            assert time.monotonic() < deadline, f"left behind: {found.remains()}"
            time.sleep(0.2)
        return found


def quantile(values: list[float], share: float) -> float:
    """Of sorted or unsorted values."""
    ordered = sorted(values)
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000, 1) if ordered else 0.0


def _until(life: Life, phase: str, since: float) -> float:
    moment = life.at(phase)
    return (moment if moment is not None else since) - since


# --- scenarios ------------------------------------------------------------------------------------------------------


def latency(bench: Bench, count: int) -> Mapping[str, Any]:
    """Pods one after another: create to Running, and delete to gone, in milliseconds."""
    up, down = [], []
    with bench.namespace("latency") as (_, creator, history):
        for pod in bench.pods("one", count, FOREVER):
            began = time.monotonic()
            uid = creator.create([pod])[0]
            history.wait(lambda h: uid in h.lives and h.lives[uid].phase == "Running", within=20, what="Running")  # noqa: B023
            up.append(_until(history.lives[uid], "Running", began))
            began = time.monotonic()
            creator.delete([pod["metadata"]["name"]])
            history.wait(lambda h: h.lives[uid].deleted_at is not None, within=20, what="gone")  # noqa: B023
            down.append((history.lives[uid].deleted_at or began) - began)
    return {
        "running_p50_ms": quantile(up, 0.5), "running_p90_ms": quantile(up, 0.9),
        "gone_p50_ms": quantile(down, 0.5), "gone_p90_ms": quantile(down, 0.9),
    }  # fmt: skip


def burst(bench: Bench, count: int) -> Mapping[str, Any]:
    """Pods at once, until all run; then their namespace is deleted, until all are gone."""
    with bench.namespace("burst") as (kube, creator, history):
        began = time.monotonic()
        creator.create(bench.pods("burst", count, FOREVER))
        created = time.monotonic() - began
        history.wait(lambda h: h.ready() == count, within=60 + count, what="all Ready")
        running = time.monotonic() - began
        full = bench.footprint()
        began = time.monotonic()
        kube.delete(api_path("namespaces", "burst"))
        gone = history.wait(lambda h: h.present() == 0, within=GONE_SECONDS, what="all gone")
        assert len(history.lives) == count
    return {
        "created_s": round(created, 2), "running_s": round(running, 2), "pods_per_s": round(count / running, 1),
        "gone_s": round(gone, 2), "full": full.lines(),
    }  # fmt: skip


def short(bench: Bench, count: int) -> Mapping[str, Any]:
    """Pods that end by themselves, as many as the API server takes, deleted once they have Succeeded."""
    flat: list[Footprint] = []
    with bench.namespace("short") as (_, creator, history):
        began = time.monotonic()
        for start in range(0, count, 100):
            batch = bench.pods(f"s{start}", min(100, count - start), "say done")
            uids = creator.create(batch)
            history.wait(
                lambda h: all(uid in h.lives and h.lives[uid].phase == "Succeeded" for uid in uids),  # noqa: B023
                within=120,
                what="all Succeeded",
            )
            creator.delete(pod["metadata"]["name"] for pod in batch)
            history.wait(lambda h: h.present() == 0, within=60, what="all gone")
            if start % 200 == 0:
                flat.append(bench.footprint())
        seconds = time.monotonic() - began
        counts = run_counts(bench.runs)
        assert all(counts.get(uid) == 1 for uid in history.lives), "a pod that Succeeded never ran"
    return {"pods_per_s": round(count / seconds, 1), "agent_mib": [f.agent_mib for f in flat],
            "supervisor_mib": [f.supervisor_mib for f in flat],
            "descriptors": [(f.agent_descriptors, f.supervisor_descriptors) for f in flat]}  # fmt: skip


def scale(bench: Bench, count: int) -> Mapping[str, Any]:
    """A Deployment from none to ``count`` and back, five times."""
    up, down = [], []
    template = bench.pods("scaled", 1, FOREVER, restartPolicy="Always")[0]
    body = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "scaled"},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": {"app": "churn"}},
            "template": {"metadata": {"labels": {"app": "churn"}}, "spec": template["spec"]},
        },
    }
    with bench.namespace("scale") as (kube, _, history):
        path = "/apis/apps/v1/namespaces/scale/deployments"
        kube.create(path, body)
        for _ in range(5):
            kube.patch(f"{path}/scaled", {"spec": {"replicas": count}})
            up.append(round(history.wait(lambda h: h.ready() == count, within=120, what="scaled up"), 2))
            kube.patch(f"{path}/scaled", {"spec": {"replicas": 0}})
            down.append(round(history.wait(lambda h: h.present() == 0, within=120, what="scaled down"), 2))
        assert len(history.lives) == 5 * count, f"{len(history.lives)} pods were made"
    return {"up_s": up, "down_s": down}


def logs(bench: Bench, count: int) -> Mapping[str, Any]:
    """Pods that write 10 lines a second, a quarter of them followed: every line comes, once and in order."""
    followers, lines_wanted = count // 4, 100
    hangup, wrong = Hangup(), []
    with bench.namespace("logs") as (_, creator, history):
        creator.create(bench.pods("log", count, "tick 0.1"))
        history.wait(lambda h: h.ready() == count, within=120, what="all Ready")
        before = bench.footprint()
        began = time.monotonic()

        def follow(number: int) -> None:
            kube = Kube(bench.credentials())
            path = f"{api_path('pods', f'log-{number}', namespace='logs')}/log"
            try:
                with kube.stream(path, hangup, follow="true") as lines:
                    for expected, line in zip(range(lines_wanted), lines, strict=False):
                        if line != f"tick {expected}":
                            wrong.append(f"log-{number}: {line!r} in place of tick {expected}")
                            return
            except ApiError as error:
                wrong.append(f"log-{number}: {error}")

        threads = [threading.Thread(target=follow, args=(number,)) for number in range(followers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        hangup.end()
        seconds = time.monotonic() - began
        full = bench.footprint()
        assert not wrong, wrong[:5]
        assert not any(thread.is_alive() for thread in threads), "a follower hangs"
    return {"followers": followers, "seconds": round(seconds, 1), "agent_mib": (before.agent_mib, full.agent_mib)}


SCENARIOS: Mapping[str, tuple[Callable[[Bench, int], Mapping[str, Any]], int]] = {
    "latency": (latency, 30),
    "burst": (burst, 100),
    "short": (short, 1000),
    "scale": (scale, 100),
    "logs": (logs, 200),
}


@contextmanager
def standing_cluster(name: str) -> Iterator[TestCluster]:
    """One that `up` made, as it is."""
    settings = load(environ=os.environ, name=name)
    with open_cluster(settings) as cluster:
        yield TestCluster(settings, cluster)


def run(bench: Bench, names: list[str], count: int | None) -> None:
    """Run scenarios and print their figures. Raises AssertionError."""
    for name in names:
        function, default = SCENARIOS[name]
        number = count or default
        before = bench.settled()
        began = time.monotonic()
        figures = function(bench, number)
        after = bench.settled()
        line = {"scenario": name, "pods": number, "seconds": round(time.monotonic() - began, 1), **figures}
        line |= {"agent_mib_before_after": (before.agent_mib, after.agent_mib)}
        line |= {"supervisor_mib_before_after": (before.supervisor_mib, after.supervisor_mib)}
        line |= {"descriptors_after": (after.agent_descriptors, after.supervisor_descriptors)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -P -m tests.bench.load", description=__doc__)
    parser.add_argument("scenario", nargs="*", choices=[*SCENARIOS, []], help="default: all of them")
    parser.add_argument("--count", type=int, help="how many pods (default: each scenario's own)")
    parser.add_argument("--bound", action="store_true", help="name the node in the pods: leaves the scheduler out")
    parser.add_argument("--cluster", help="the name of one that runs (default: one is made, and taken down again)")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args(arguments)
    if options.list:
        for name, (function, default) in SCENARIOS.items():
            sys.stdout.write(f"{name:10} {default:5} pods  {(function.__doc__ or '').splitlines()[0]}\n")
        return 0
    parts = standing_cluster(options.cluster) if options.cluster else whole_cluster("load", max_pods=MAX_PODS)
    with parts as cluster, tempfile.TemporaryDirectory(prefix="runs") as runs:
        status = cluster.status()
        image = Guests(status["registry"], cluster.settings.environ).add_bytes("toolbox", build_toolbox())
        node = status["nodes"][0]["name"]
        bench = Bench(cluster=cluster, image=image, node=node, runs=Path(runs), bound=options.bound)
        run(bench, options.scenario or list(SCENARIOS), options.count)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
