"""Fixtures of tests against a real API server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from wasilet.kube.client import Kube, api_path

from tests.clusters import TestCluster


@pytest.fixture
def kube(control_plane_cluster: TestCluster) -> Kube:
    """The shared API server with the administrator's rights."""
    return control_plane_cluster.kube


@pytest.fixture
def namespace(kube: Kube) -> Iterator[str]:
    """A namespace of this test alone."""
    made = kube.create(api_path("namespaces"), {"metadata": {"generateName": "test-"}})
    name = str(made["metadata"]["name"])
    yield name
    kube.delete(api_path("namespaces", name))
