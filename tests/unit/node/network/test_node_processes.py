"""What is kept running in the node's namespace: started when it can be, again when it ended, gone with the agent."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from wasilet_common.keeper import Restarts
from wasilet_node.network.node_processes import Kept, Program, kube_proxy, network_policies
from wasilet_node.settings import NetworkSettings

from tests.unit.node.runtime.guests import eventually

pytestmark = pytest.mark.unit


async def here(work: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    return work()


def script(folder: Path, body: str) -> Path:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


async def until(condition: Callable[[], object]) -> None:
    async def probe() -> bool | None:
        return True if condition() else None

    await eventually(probe, timeout_seconds=30)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


async def test_it_waits_for_its_executable_and_is_started_again_when_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "program"
    program = Program(name="program", argv=(str(path), "word"))
    kept = Kept(program, folder=tmp_path / "logs", spawn=here, restarts=Restarts(0.02), look_again_seconds=0.02)
    task = asyncio.create_task(kept.run())
    await asyncio.sleep(0.1)
    assert kept.pid is None
    script(tmp_path, 'echo "$1"')
    log = tmp_path / "logs" / "program.log"
    await until(lambda: len(lines(log)) >= 3)
    assert set(lines(log)) == {"word"}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    path = script(tmp_path, "echo ready; exec sleep 600")
    kept = Kept(Program(name="program", argv=(str(path),)), folder=tmp_path, spawn=here)
    task = asyncio.create_task(kept.run())
    await until(lambda: lines(tmp_path / "program.log"))
    pid = kept.pid
    assert pid is not None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_one_that_was_just_being_started_ends_with_its_owner_as_well(tmp_path: Path) -> None:
    path = script(tmp_path, "exec sleep 600")
    asked, go_on = asyncio.Event(), asyncio.Event()
    made: list[subprocess.Popen[bytes]] = []

    async def slowly(work: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        asked.set()
        await go_on.wait()
        made.append(work())
        return made[0]

    task = asyncio.create_task(Kept(Program(name="program", argv=(str(path),)), folder=tmp_path, spawn=slowly).run())
    await asked.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    go_on.set()
    await until(lambda: made and made[0].returncode is not None)


def test_command_lines_name_the_nodes_own_ranges() -> None:
    settings = NetworkSettings(
        cluster_cidr=ipaddress.IPv4Network("10.9.0.0/16"),
        service_cidr=ipaddress.IPv4Network("10.10.0.0/16"),
        uplink=ipaddress.IPv4Interface("10.9.255.6/30"),
        cluster_dns=("10.10.0.10",),
        kube_proxy=Path("/bin/kube-proxy"),
        kube_proxy_kubeconfig=Path("/etc/p.conf"),
        network_policies_kubeconfig=Path("/etc/n.conf"),
    )
    proxy = kube_proxy(settings, "n1").argv
    assert proxy[0] == "/bin/kube-proxy"
    assert {"--hostname-override=n1", "--cluster-cidr=10.9.0.0/16", "--nodeport-addresses=10.9.255.4/30"} <= {*proxy}
    policies = network_policies(settings, ipaddress.IPv4Network("10.9.4.0/22"), Path("/d/p.sock")).argv
    assert {*("--pod-cidr=10.9.4.0/22", "--machine-address=10.9.255.5", "--dns=10.10.0.10", "--agent=/d/p.sock")} <= {
        *policies
    }
