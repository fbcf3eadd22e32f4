"""Processes of the node's network namespace: its own kube-proxy, what keeps NetworkPolicies, and the way outward.

The first two hold rules, each with its own credential. Each process ends with the agent, and the next agent starts
another: rules stay in the namespace meanwhile, so no connection of theirs notices, unlike those to other machines. An
executable may come later than the node (the harness builds it when nothing more urgent is to be done), so that is
waited for.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from wasilet_common.child import ending_with_parent
from wasilet_common.keeper import Restarts

from wasilet_node.settings import NetworkSettings

logger = logging.getLogger(__name__)

LOG_KEEP_BYTES = 10 * 1024 * 1024
LOOK_AGAIN_SECONDS = 2.0
"""Between looks for an executable."""

Spawn = Callable[[Callable[[], "subprocess.Popen[bytes]"]], Awaitable["subprocess.Popen[bytes]"]]
"""Runs something in a thread that stays in the node's namespace for as long as the agent lives."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One of them."""

    name: str
    argv: tuple[str, ...]
    descriptors: tuple[int, ...] = ()
    """Of the agent's, which it inherits."""


def kube_proxy(settings: NetworkSettings, node_name: str) -> Program:
    """Services. What it would set for the whole machine (conntrack's sizes) is left alone."""
    return Program(
        name="kube-proxy",
        argv=(
            str(settings.kube_proxy),
            f"--kubeconfig={settings.kube_proxy_kubeconfig}",
            f"--hostname-override={node_name}",
            "--proxy-mode=nftables",
            f"--cluster-cidr={settings.cluster_cidr}",
            f"--nodeport-addresses={settings.uplink.network}",
            "--healthz-bind-address=127.0.0.1:10256",
            "--metrics-bind-address=127.0.0.1:10249",
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0s",
            "--conntrack-tcp-timeout-close-wait=0s",
        ),
    )


def network_policies(settings: NetworkSettings, pod_cidr: ipaddress.IPv4Network, agent: Path) -> Program:
    """NetworkPolicies, for the pods of ``pod_cidr``; with a bridge the routes to other nodes' pods, too, and the
    cluster's DNS is a pod like any other. ``agent``: the socket of its ``PolicyGate``."""
    if settings.bridge is None:
        words = [f"--dns={address}" for address in settings.cluster_dns]
    else:
        words = [f"--cluster-cidr={settings.cluster_cidr}", f"--uplink={settings.uplink}"]
    return Program(
        name="network-policies",
        argv=(
            *(sys.executable, "-P", "-m", "wasilet_node.network.policy_agent"),
            f"--kubeconfig={settings.network_policies_kubeconfig}",
            f"--pod-cidr={pod_cidr}",
            f"--machine-address={settings.machine_address}",
            f"--agent={agent}",
            *words,
        ),
    )


def outward(pod_cidr: ipaddress.IPv4Network, node_namespace: int) -> Program:
    """What pods send to other machines; it runs in the machine's network. ``node_namespace``: a descriptor."""
    return Program(
        name="outward",
        argv=(
            *(sys.executable, "-P", "-m", "wasilet_node.network.outward"),
            f"--pod-cidr={pod_cidr}",
            f"--node-namespace={node_namespace}",
        ),
        descriptors=(node_namespace,),
    )


class Kept:
    """``run`` for ever; cancel it to end the process."""

    def __init__(
        self,
        program: Program,
        *,
        folder: Path,
        spawn: Spawn,
        restarts: Restarts | None = None,
        look_again_seconds: float = LOOK_AGAIN_SECONDS,
    ) -> None:
        self._restarts = restarts or Restarts()
        self._look_again_seconds = look_again_seconds
        self._program = program
        self._log = folder / f"{program.name}.log"
        self._spawn = spawn
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """As in the log."""
        return self._program.name

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Start it whenever it does not run."""
        executable = self._program.argv[0]
        loop = asyncio.get_running_loop()
        while True:
            if not os.access(executable, os.X_OK):
                await asyncio.sleep(self._look_again_seconds)
                continue
            begun = loop.time()
            await self._once()
            await asyncio.sleep(self._restarts.delay_seconds(ran_seconds=loop.time() - begun))

    async def _once(self) -> None:
        starting = asyncio.ensure_future(self._spawn(self._start))
        try:
            process = self._process = await asyncio.shield(starting)
        except OSError as error:
            logger.warning("%s does not start: %s", self._program.name, error)
            return
        except asyncio.CancelledError:
            starting.add_done_callback(_end_it)
            raise
        logger.info("%s runs, pid %d; its log is %s", self._program.name, process.pid, self._log)
        try:
            await _ended(process)
            logger.warning("%s ended with %s; see %s", self._program.name, process.returncode, self._log)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._log.exists() and self._log.stat().st_size > LOG_KEEP_BYTES:
            self._log.replace(self._log.with_suffix(".log.1"))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                ending_with_parent(self._program.argv),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                env=_environment(),
                pass_fds=self._program.descriptors,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)


def _end_it(started: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    """A process that came when no one waited for it any longer."""
    if not started.cancelled() and started.exception() is None:
        process = started.result()
        process.kill()
        process.wait()


async def _ended(process: subprocess.Popen[bytes]) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
        process.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _environment() -> dict[str, str]:
    """Where ``nft`` is, and the harness' mark by which it finds what it started."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin"
    marks = {name: os.environ[name] for name in ("WASILET_RUN_ID", "HOME", "PYTHONPATH") if name in os.environ}
    return {"PATH": path, **marks}
