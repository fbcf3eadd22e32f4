"""How long a user's own tests take: ``python -P tests/bench/plugin.py`` brings a cluster up and prints the figures.

One file with one app and three asserts, and a hundred such tests with two workers, each by a pytest of its own as a
user starts it. The processor time beside each (of pytest and its workers, and of the whole cluster) says how much of it
was waiting for other programs of the machine.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.clusters import TestCluster, whole_cluster  # noqa: E402

ONE_LIMIT_SECONDS = 5.0
HUNDRED_LIMIT_SECONDS = 60.0
TEST = """
import pytest

@pytest.mark.parametrize("n", range({count}))
def test_app(n, wasm_app, run_pod, assert_logs):
    pod = run_pod(wasm_app("hello-wasm"))
    assert_logs(pod, contains="Hello, World!")
    assert_logs(pod, matches=r"^Hello, W\\w+!$", absent="panic")
    assert pod.wait_finished() == 0
"""


def measure(cluster: TestCluster, folder: Path, count: int, words: list[str]) -> tuple[float, float, float]:
    """Seconds of the run, processor seconds of pytest, and of the cluster."""
    (folder / "test_app.py").write_text(TEST.format(count=count))
    own, theirs = _own_seconds(), _cluster_seconds(cluster)
    began = time.monotonic()
    argv = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *words]
    done = subprocess.run(
        argv,
        cwd=folder,
        env={**cluster.settings.environ, "WASILET_NAME": cluster.settings.name},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return seconds, _own_seconds() - own, _cluster_seconds(cluster) - theirs


def _own_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def _cluster_seconds(cluster: TestCluster) -> float:
    total = 0.0
    for record in cluster.cluster.state.stray_processes():
        try:
            times = psutil.Process(record.pid).cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def main() -> int:
    """0 when both figures are within their limits."""
    good = True
    with whole_cluster("bench") as cluster, tempfile.TemporaryDirectory() as folder:
        measure(cluster, Path(folder), 1, [])  # builds and pushes the app
        for title, limit, count, words in (
            ("one app, three asserts", ONE_LIMIT_SECONDS, 1, []),
            ("a hundred tests, -n 2", HUNDRED_LIMIT_SECONDS, 100, ["-n", "2"]),
        ):
            seconds, own, theirs = measure(cluster, Path(folder), count, words)
            good &= seconds <= limit
            cost = f"processor: pytest {own:.1f} s, cluster {theirs:.1f} s"
            print(f"{title:<24} {seconds:6.1f} s (limit {limit:g} s)   {cost}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
