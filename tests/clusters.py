"""Real clusters for tests, made by the harness itself: a control plane alone, or the whole with nodes.

Each has a state root of its own with a short path (Unix sockets) and a kubeconfig of its own, so that a test run
touches neither the user's clusters nor the user's kubeconfig.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet.cluster.down import down
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.status import status
from wasilet.cluster.up import control_plane_steps, up
from wasilet.console import PlainReporter
from wasilet.kube.client import Kube, api_path
from wasilet.providers.base import Access, Cluster
from wasilet.settings import Settings, cache_root, load
from wasilet.steps import Play, Recap

SERVICE_ACCOUNT_SECONDS = 30.0


@dataclass(frozen=True)
class TestCluster:
    """A running cluster and how to reach it."""

    __test__ = False

    settings: Settings
    cluster: Cluster

    @property
    def kube(self) -> Kube:
        """With the administrator's rights."""
        return self.cluster.admin()

    @property
    def admin_kubeconfig(self) -> Path:
        """The same as a file."""
        return self.cluster.state.admin_kubeconfig

    @property
    def access(self) -> Access:
        """Server, authorities, and this machine's address."""
        return self.cluster.provider.access(self.cluster)

    def status(self) -> dict[str, Any]:
        """What ``status --output json`` prints."""
        return status(self.settings)


@contextlib.contextmanager
def temporary_settings(
    name: str = "wasilet", *, environment: Mapping[str, str] | None = None, **given: Any
) -> Iterator[Settings]:
    """Settings with a state root that exists only in this block; whatever still runs there at its end is ended.
    ``environment``: in place of this process's own."""
    root = Path(tempfile.mkdtemp(prefix="wasilet-t", dir="/tmp"))
    environ: Mapping[str, str] = {
        **{key: value for key, value in (environment or os.environ).items() if not key.startswith("WASILET_")},
        "WASILET_STATE_HOME": str(root / "state"),
        "WASILET_CACHE": str(cache_root()),
        "KUBECONFIG": str(root / "user.conf"),
    }
    settings = load(environ=environ, **{"name": name, "kubeconfig": root / "kubeconfig", **given})
    try:
        yield settings
    finally:
        # Every cluster under the root, whatever the test called it.
        for folder in sorted((root / "state").glob("*/")):
            leftover = load(environ=environ, name=folder.name)
            down(leftover, reporter=PlainReporter(io.StringIO()), purge=True).raise_for_failure()
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def control_plane(name: str = "component") -> Iterator[TestCluster]:
    """etcd, API server, controller-manager and scheduler, with the roles nodes need and ``default``'s ServiceAccount;
    no node, no registry, no approver."""
    with temporary_settings(name) as settings, open_cluster(settings) as cluster:
        run_play(Play(f"control plane {name}", control_plane_steps(cluster)))
        path = api_path("serviceaccounts", "default", namespace="default")
        deadline = time.monotonic() + SERVICE_ACCOUNT_SECONDS
        while cluster.admin().find(path) is None or not cluster.admin().ready():
            assert time.monotonic() < deadline, "the ServiceAccount default did not come"
            time.sleep(0.05)
        yield TestCluster(settings, cluster)


@contextlib.contextmanager
def whole_cluster(name: str = "e2e", **given: Any) -> Iterator[TestCluster]:
    """What ``up`` makes: with registry, approver and a Ready node. ``settings.local_origins`` names one free port of
    this machine that pods may call."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        given.setdefault("local_origins", (f"http://127.0.0.1:{free.getsockname()[1]}",))
    with temporary_settings(name, **given) as settings:
        log = io.StringIO()
        recap = up(settings, reporter=PlainReporter(log))
        assert recap.succeeded, log.getvalue()
        with open_cluster(settings) as cluster:
            yield TestCluster(settings, cluster)


def run_play(play: Play) -> Recap:
    """Run a play; its report is the message when it fails."""
    log = io.StringIO()
    recap = play.run(reporter=PlainReporter(log))
    assert recap.succeeded, log.getvalue()
    return recap
