"""Which Kubernetes version the node names beside which API server."""

from __future__ import annotations

from typing import Any

import pytest
from wasilet_node.contract import KEPT, Contract
from wasilet_node.kube.base import ApiUnavailableError

pytestmark = pytest.mark.unit

NEWEST, OLDEST = KEPT[max(KEPT)], KEPT[min(KEPT)]


class Server:
    """Tells its version, or is away."""

    def __init__(self, told: Any) -> None:
        self.told = told
        self.asked = 0

    async def get(self, path: str, *, timeout_seconds: float = 10.0) -> Any:
        assert path == "/version"
        self.asked += 1
        if self.told is None:
            raise ApiUnavailableError("away")
        return self.told


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"major": "1", "minor": "34"}, "v1.34.4"),
        ({"major": "1", "minor": "35+"}, "v1.35.4"),
        ({"major": "1", "minor": "36", "gitVersion": "v1.36.9"}, "v1.36.3"),
        ({"major": "1", "minor": "37"}, "v1.37.2"),
        ({"major": "1", "minor": "40"}, NEWEST),
        ({"major": "2", "minor": "0"}, NEWEST),
        ({"major": "1", "minor": "33"}, OLDEST),
        ({"major": "", "minor": "x"}, OLDEST),
        ([], OLDEST),
    ],
)
async def test_the_node_is_never_newer_than_its_api_server(told: Any, named: str) -> None:
    assert await Contract(Server(told)).version() == named  # type: ignore[arg-type]


async def test_before_the_server_has_said_anything_nothing_is_claimed() -> None:
    with pytest.raises(ApiUnavailableError):
        await Contract(Server(None)).version()  # type: ignore[arg-type]


async def test_an_upgrade_of_the_server_is_seen_and_a_server_that_is_away_changes_nothing() -> None:
    server, now = Server({"major": "1", "minor": "35"}), [0.0]
    contract = Contract(server, clock=lambda: now[0])  # type: ignore[arg-type]
    assert await contract.version() == "v1.35.4"
    server.told = {"major": "1", "minor": "36"}
    assert await contract.version() == "v1.35.4"
    assert server.asked == 1
    now[0] = 31.0
    assert await contract.version() == "v1.36.3"
    now[0], server.told = 700.0, None
    assert await contract.version() == "v1.36.3"
