"""A pod that asks for the user 0 and for not being root does not start, as with kubelet."""

from __future__ import annotations

from typing import Any

import pytest
from wasilet_node.pods.security_context import refuse_root
from wasilet_node.volumes.base import ContainerConfigError

from tests.unit.node.pods.fakes import make_pod

pytestmark = pytest.mark.unit


def pod(of_pod: dict[str, Any] | None, of_container: dict[str, Any] | None) -> dict[str, Any]:
    made = make_pod()
    made["spec"]["securityContext"] = of_pod
    made["spec"]["containers"][0]["securityContext"] = of_container
    return made


@pytest.mark.parametrize(
    ("of_pod", "of_container"),
    [
        (None, {"runAsNonRoot": True, "runAsUser": 0}),
        ({"runAsNonRoot": True, "runAsUser": 0}, None),
        ({"runAsNonRoot": True}, {"runAsUser": 0}),
        ({"runAsNonRoot": True, "runAsUser": 1000}, {"runAsUser": 0}),
        ({"runAsNonRoot": False, "runAsUser": 0}, {"runAsNonRoot": True}),
    ],
)
def test_root_where_root_is_ruled_out(of_pod: dict[str, Any] | None, of_container: dict[str, Any] | None) -> None:
    made = pod(of_pod, of_container)
    with pytest.raises(ContainerConfigError, match=r"^container's runAsUser breaks non-root policy \(pod: \""):
        refuse_root(made, made["spec"]["containers"][0])


@pytest.mark.parametrize(
    ("of_pod", "of_container"),
    [
        (None, None),
        (None, {"runAsUser": 0}),
        ({"runAsNonRoot": True}, None),
        ({"runAsNonRoot": True}, {"runAsUser": 1000}),
        ({"runAsNonRoot": True, "runAsUser": 0}, {"runAsUser": 1000}),
        ({"runAsNonRoot": True}, {"runAsNonRoot": False, "runAsUser": 0}),
    ],
)
def test_everything_else_starts(of_pod: dict[str, Any] | None, of_container: dict[str, Any] | None) -> None:
    made = pod(of_pod, of_container)
    refuse_root(made, made["spec"]["containers"][0])
