"""A second cluster for tests that need hundreds of pods, or that end parts of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from wasilet.kube.client import Kube

from tests.clusters import TestCluster, whole_cluster
from tests.e2e.guests import Guests, build_toolbox
from tests.e2e.stage import Stage

ROOMY_PODS = 320


@dataclass(frozen=True, kw_only=True)
class Roomy:
    """A cluster of one node with room for many pods, watched, with the toolbox in its registry."""

    cluster: TestCluster
    stage: Stage
    kube: Kube
    image: str

    @property
    def node(self) -> str:
        """The node's name."""
        return self.cluster.cluster.node_names()[0]


@pytest.fixture(scope="session")
def roomy() -> Iterator[Roomy]:
    with whole_cluster("roomy", max_pods=ROOMY_PODS) as cluster:
        guests = Guests(str(cluster.status()["registry"]), cluster.settings.environ)
        image = guests.add_bytes("toolbox", build_toolbox())
        stage = Stage(cluster.cluster.admin_credentials())
        try:
            with stage.kube() as kube:
                yield Roomy(cluster=cluster, stage=stage, kube=kube, image=image)
        finally:
            stage.close()
