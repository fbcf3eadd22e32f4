"""Fixtures of all tests: the real clusters, made once a session and only when a test asks for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import TestCluster, control_plane, whole_cluster


@pytest.fixture(scope="session")
def control_plane_cluster() -> Iterator[TestCluster]:
    """A real API server with controller-manager and scheduler, shared by the session: use names of your own in it."""
    with control_plane() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[TestCluster]:
    """A whole cluster with a Ready wasm node, of the provider that WASILET_PROVIDER names, shared by the session."""
    with whole_cluster(provider=os.environ.get("WASILET_PROVIDER", "host")) as made:
        yield made


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A private folder whose path is short enough for Unix sockets; pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="w", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
