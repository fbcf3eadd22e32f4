from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from wasilet_node.agent import Agent
from wasilet_node.agent_process import log_failure
from wasilet_node.certificates import JoinError
from wasilet_node.kube.events import KubeEventRecorder
from wasilet_node.kube.kubeconfig import Cluster, is_node_kubeconfig, render_node_kubeconfig
from wasilet_node.runtime.protocol import RuntimeUnavailableError
from wasilet_node.settings import NodePaths, NodeSettings

from tests.unit.node.rig import NodeKube

pytestmark = pytest.mark.unit


def agent(data: Path, kubeconfig_copy: Path | None = None) -> Agent:
    settings = NodeSettings(node_name="n1", paths=NodePaths(data=data))
    return Agent(settings, kubeconfig_copy, "0.1.0")


class Part:
    """A part of the agent that notes its end."""

    def __init__(self) -> None:
        self.ended = False

    async def run(self) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            self.ended = True


async def test_a_record_that_cannot_be_written_does_not_end_the_agent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = cast("Any", SimpleNamespace(address="192.0.2.1", port=1))
    lost = agent(tmp_path / "gone")
    assert lost._write_record(place, place) is False
    assert "agent.json cannot be written: No such file or directory" in caplog.text
    assert agent(tmp_path)._write_record(place, place) is True


async def fails() -> None:
    await asyncio.sleep(0.01)
    raise OSError(28, "No space left on device")


async def ends() -> None:
    await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [(fails, OSError, "No space left"), (ends, RuntimeError, "'b' ended, which it never should")],
)
async def test_one_part_that_ends_takes_all_others_down(
    tmp_path: Path, part: Any, error: type[Exception], message: str
) -> None:
    others = [Part(), Part()]
    parts: dict[str, Coroutine[Any, Any, None]] = {"a": others[0].run(), "b": part(), "c": others[1].run()}
    async with asyncio.timeout(5):
        with pytest.raises(error, match=message):
            await agent(tmp_path)._supervise(KubeEventRecorder(NodeKube(), host="n1"), parts)
    assert all(other.ended for other in others)


async def test_a_stop_ends_all_parts_and_writes_the_last_events(tmp_path: Path) -> None:
    store = NodeKube()
    events = KubeEventRecorder(store, host="n1")
    part = Part()
    task = asyncio.create_task(agent(tmp_path)._supervise(events, {"a": part.run()}))
    await asyncio.sleep(0.01)
    events.event({"kind": "Pod", "metadata": {"name": "p", "namespace": "d"}}, "Normal", "Killing", "x")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert part.ended
    assert store.count("POST", "/api/v1/namespaces/d/events") == 1


def test_what_a_person_can_repair_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log_failure(BaseExceptionGroup("parts", [ExceptionGroup("inner", [JoinError("no token")])]))
    assert [record.getMessage() for record in caplog.records] == ["no token"]
    assert caplog.records[0].exc_info is None


def test_a_defect_comes_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    log_failure(ValueError("bug"))
    assert caplog.records[0].exc_info is not None


def kubeconfig(data: Path, server: str = "https://192.0.2.10:6443") -> bytes:
    return render_node_kubeconfig(Cluster(server=server), node_name="n1", pair_path=data / "client.pem")


def test_the_nodes_kubeconfig_is_copied_to_where_krustlets_users_expect_it(tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_bytes(kubeconfig(tmp_path))
    target = tmp_path / "krustlet" / "config" / "kubeconfig"
    agent(tmp_path, target)._copy_kubeconfig()
    assert target.read_bytes() == kubeconfig(tmp_path)
    assert target.stat().st_mode & 0o777 == 0o600

    (tmp_path / "kubeconfig").write_bytes(kubeconfig(tmp_path, "https://192.0.2.11:6443"))
    agent(tmp_path, target)._copy_kubeconfig()
    assert target.read_bytes() == kubeconfig(tmp_path, "https://192.0.2.11:6443")


@pytest.mark.parametrize("content", ["apiVersion: v1\nkind: Config\n", json.dumps({"users": [{"name": "admin"}]}), ""])
def test_somebody_elses_kubeconfig_is_never_written_over(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "kubeconfig").write_bytes(kubeconfig(tmp_path))
    target = tmp_path / "config"
    target.write_text(content)
    agent(tmp_path, target)._copy_kubeconfig()
    assert target.read_text() == content
    assert "left alone" in caplog.text


def test_a_place_that_cannot_be_written_is_said_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kubeconfig").write_bytes(kubeconfig(tmp_path))
    (tmp_path / "file").write_text("")
    agent(tmp_path, tmp_path / "file" / "kubeconfig")._copy_kubeconfig()
    assert "was not copied" in caplog.text


def test_a_nodes_kubeconfig_is_told_from_others(tmp_path: Path) -> None:
    assert is_node_kubeconfig(kubeconfig(tmp_path))
    assert not is_node_kubeconfig(b"{}")
    assert not is_node_kubeconfig(b"kind: Config")


async def test_a_runtime_that_does_not_answer_makes_the_node_not_ready_until_it_does(tmp_path: Path) -> None:
    answers: list[Exception | None] = [
        None,
        RuntimeUnavailableError("it hangs"),
        RuntimeUnavailableError("it hangs"),
        None,
    ]
    problems: list[str | None] = []
    one = agent(tmp_path)
    asked_all = asyncio.Event()

    async def ping() -> None:
        if not answers:
            asked_all.set()
            await asyncio.sleep(3600)
        elif (error := answers.pop(0)) is not None:
            raise error

    checking = asyncio.create_task(
        one._check_runtime(
            cast("Any", SimpleNamespace(ping=ping)),
            cast("Any", SimpleNamespace(wake=lambda: problems.append(one._problem))),
            every_seconds=0.01,
        )
    )
    await asked_all.wait()
    checking.cancel()
    assert problems == ["container runtime is down: it hangs", None]
