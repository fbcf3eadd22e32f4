"""The flags of the control plane's processes, where they depend on something."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasilet.controlplane.control_plane import ControlPlane
from wasilet.controlplane.health import Probe
from wasilet.state import State

pytestmark = pytest.mark.unit

PORTS = {"etcd": 1, "etcd_peer": 2, "apiserver": 3, "controller_manager": 4, "scheduler": 5}


@pytest.mark.parametrize(
    ("kubernetes", "refused"),
    [("1.37.2", True), ("1.36.3", True), ("2.0.0", True), ("1.35.4", False), ("1.34.4", False), ("", False)],
)
def test_the_validator_that_takes_resizes_from_wasm_nodes_is_disabled_where_it_exists(
    tmp_path: Path, kubernetes: str, *, refused: bool
) -> None:
    plane = ControlPlane(
        binaries={"kube-apiserver": "kube-apiserver"},
        ports=PORTS,
        state=State(tmp_path, "one"),
        advertise_address="192.0.2.1",
        kubernetes=kubernetes,
    )
    assert ("--disable-admission-plugins=PodResizeValidator" in plane.apiserver().argv) is refused


def test_the_controller_manager_starts_when_the_default_roles_are_there(tmp_path: Path) -> None:
    """It ends 10 s after its start if they are not, however long the API server takes."""
    plane = ControlPlane(
        binaries={"kube-controller-manager": "kube-controller-manager"},
        ports=PORTS,
        state=State(tmp_path, "one"),
        advertise_address="192.0.2.1",
    )
    gate = plane.controller_manager().gate
    assert isinstance(gate, Probe)
    assert (gate.port, gate.path) == (PORTS["apiserver"], "/readyz")
