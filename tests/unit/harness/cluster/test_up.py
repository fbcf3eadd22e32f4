"""What `up` decides about a new cluster, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.up import _preparation_step
from wasilet.controlplane import pod_network
from wasilet.settings import load

pytestmark = pytest.mark.unit

DECIDED = {"pod_cidr": "10.1.0.0/16", "service_cidr": "10.2.0.0/16"}


@pytest.mark.parametrize("known", ["nothing", "run id", "ports"])
def test_the_pod_network_is_decided_for_new_clusters_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str
) -> None:
    """The pytest plugin makes the run id before anything else; a cluster that has ports was up before."""
    monkeypatch.setattr(pod_network, "reserve", lambda _, state, **__: state.update(pod_network=DECIDED))
    settings = load(environ={"HOME": str(tmp_path), "WASILET_STATE_HOME": str(tmp_path / "state")})
    with open_cluster(settings) as cluster:
        if known == "run id":
            cluster.state.run_id()
        if known == "ports":
            cluster.state.allocate_ports({"apiserver": 0})
        _preparation_step(cluster).change(lambda _: None)
        assert (cluster.state.read().get("pod_network") == DECIDED) is (known != "ports")
