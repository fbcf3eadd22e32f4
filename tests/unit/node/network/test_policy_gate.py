"""What agent and policies' process tell each other of a new pod's address, and who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from wasilet_node.kube.base import WatchEvent
from wasilet_node.network import nft, policy_agent
from wasilet_node.network.errors import NetworkError
from wasilet_node.network.policy_gate import SOCKET_NAME, PolicyGate, PolicyReports
from wasilet_node.runtime import unix_sockets

from tests.unit.node.network.test_policies import NAMESPACES, PLACE, known, policy
from tests.unit.node.runtime.guests import eventually

pytestmark = pytest.mark.unit
LONG_SECONDS = 30.0


@contextlib.asynccontextmanager
async def running(*works: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended


def with_uid(thing: dict[str, Any]) -> dict[str, Any]:
    thing["metadata"]["uid"] = thing["metadata"]["name"]
    return thing


class Cluster:
    """What is watched: lists, then what is put."""

    def __init__(self, policies: list[dict[str, Any]]) -> None:
        new = with_uid(known("new", ""))
        del new["status"]
        self.lists = {"networkpolicies": policies, "pods": [new], "namespaces": NAMESPACES}
        self.more: dict[str, asyncio.Queue[WatchEvent]] = {name: asyncio.Queue() for name in self.lists}

    async def watch(self, path: str) -> AsyncIterator[WatchEvent]:
        kind = path.rpartition("/")[2]
        for each in self.lists[kind]:
            yield WatchEvent(type="SYNC", object=with_uid(each))
        yield WatchEvent(type="SYNCED", object={})
        while True:
            yield await self.more[kind].get()


def keeper(cluster: Cluster) -> policy_agent.Keeper:
    return policy_agent.Keeper(cast("Any", cluster), PLACE)


def is_known(tables: list[str], address: str = "10.9.4.9") -> bool:
    return bool(tables) and f"{address} : jump" in tables[-1]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was handed to nft."""
    applied: list[str] = []
    monkeypatch.setattr(nft, "apply", applied.append)
    return applied


async def until(condition: Any) -> None:
    async def probe() -> bool | None:
        return True if condition() else None

    await eventually(probe)


async def test_a_pod_that_no_status_names_yet_passes_when_the_rules_hold_its_address(
    tmp_path: Path, tables: list[str]
) -> None:
    gate = PolicyGate(tmp_path / SOCKET_NAME, wait_seconds=LONG_SECONDS)
    async with running(gate.run(), keeper(Cluster([policy(policyTypes=["Egress"])])).run(tmp_path / SOCKET_NAME)):
        await until(lambda: gate._judging)
        assert not is_known(tables)
        gate.claim("new", "10.9.4.9")
        assert await gate.passed("new")
        assert is_known(tables)
        gate.release("new")
        await until(lambda: not is_known(tables))


async def test_a_first_policy_makes_pods_wait_and_the_end_of_the_last_lets_them_pass(
    tmp_path: Path, tables: list[str]
) -> None:
    cluster = Cluster([])
    gate = PolicyGate(tmp_path / SOCKET_NAME, wait_seconds=LONG_SECONDS)
    async with running(gate.run(), keeper(cluster).run(tmp_path / SOCKET_NAME)):
        gate.claim("new", "10.9.4.9")
        gate.claim("unseen", "10.9.4.10")
        assert await gate.passed("unseen"), "no policy: no one waits"
        cluster.more["networkpolicies"].put_nowait(
            WatchEvent(type="ADDED", object=with_uid(policy(policyTypes=["Egress"])))
        )
        await until(lambda: is_known(tables))
        await until(lambda: gate._judging)
        assert await gate.passed("new")
        waiting = asyncio.create_task(gate.passed("unseen"))
        await asyncio.sleep(0)
        assert not waiting.done()
        cluster.more["networkpolicies"].put_nowait(WatchEvent(type="DELETED", object=with_uid(policy())))
        assert await waiting


async def test_rules_that_cannot_be_made_hold_a_pod_up_for_its_limit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first table is made, and none after it."""
    made = threading.Event()

    def once(_rules: str) -> None:
        if made.is_set():
            raise NetworkError("nft refused the rules")
        made.set()

    monkeypatch.setattr(nft, "apply", once)
    gate = PolicyGate(tmp_path / SOCKET_NAME, wait_seconds=0.1)
    async with running(gate.run(), keeper(Cluster([policy()])).run(tmp_path / SOCKET_NAME)):
        await until(lambda: gate._judging)
        gate.claim("new", "10.9.4.9")
        assert not await gate.passed("new")


async def test_what_was_known_stays_so_while_the_process_is_replaced_and_the_next_learns_all(tmp_path: Path) -> None:
    path, changed = tmp_path / SOCKET_NAME, asyncio.Event()
    gate = PolicyGate(path, wait_seconds=0.1)
    async with running(gate.run()):
        gate.claim("one", "10.9.4.2")
        first, second = PolicyReports(), PolicyReports()
        async with running(first.follow(path, changed)):
            await until(lambda: first.claims)
            first.applied(["one"], first.claims, judging=True)
            await until(lambda: gate._judging)
            gate.claim("two", "10.9.4.3")
            await until(lambda: len(first.claims) == 2)
        assert await gate.passed("one")
        assert not await gate.passed("two")
        gate.release("one")
        async with running(second.follow(path, changed)):
            await until(lambda: second.claims == {"two": "10.9.4.3"})
            second.applied(["two"], second.claims, judging=True)
            await until(lambda: gate._knows("two"))
            assert await gate.passed("two")
    assert not path.exists()


async def test_a_line_that_is_none_ends_its_connection_alone(tmp_path: Path) -> None:
    path, reports, changed = tmp_path / SOCKET_NAME, PolicyReports(), asyncio.Event()
    gate = PolicyGate(path)
    async with running(gate.run()):
        await until(path.exists)
        bad = unix_sockets.connect(path, timeout_seconds=10)
        with contextlib.closing(bad):
            bad.sendall(b"no json\n")
            async with running(reports.follow(path, changed)):
                await asyncio.wait_for(changed.wait(), LONG_SECONDS)
