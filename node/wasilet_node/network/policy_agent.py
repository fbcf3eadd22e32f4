"""Keeps the rules of NetworkPolicies in the network namespace that it is started in, with its own credential, and the
routes to other nodes' pods where they are the node's affair (``--cluster-cidr``).

``python -P -m wasilet_node.network.policy_agent --kubeconfig FILE ...``, started by the agent, as kube-proxy is: a node
may read neither other nodes' pods nor namespaces. Rules stay when it ends, and are made again by the next.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from wasilet_node.kube import kubeconfig
from wasilet_node.kube.client import KubeClient
from wasilet_node.network import nft, policies
from wasilet_node.network.errors import NetworkError
from wasilet_node.network.node_routes import Neighbourhood, RouteKeeper
from wasilet_node.network.policy_gate import PolicyReports

logger = logging.getLogger(__name__)

WATCHED = {
    "policies": "/apis/networking.k8s.io/v1/networkpolicies",
    "pods": "/api/v1/pods",
    "namespaces": "/api/v1/namespaces",
}
SETTLE_SECONDS = 0.05
"""At least between two tables: changes come in bursts. The first of one is made at once: a pod may wait for it."""

RETRY_SECONDS = 1.0


class Keeper:
    """What is in the cluster, and the rules made of it."""

    def __init__(self, kube: KubeClient, place: policies.Place) -> None:
        self._kube = kube
        self._place = place
        self._known: dict[str, dict[str, Any]] = {name: {} for name in WATCHED}
        self._synced: set[str] = set()
        self._changed = asyncio.Event()
        self._applied = ""
        self._reports = PolicyReports()

    async def run(self, agent: Path) -> None:
        """For ever. ``agent``: where the node's agent listens."""
        async with asyncio.TaskGroup() as group:
            for name in WATCHED:
                group.create_task(self._follow(name), name=name)
            group.create_task(self._apply(), name="rules")
            group.create_task(self._reports.follow(agent, self._changed), name="agent")

    async def _follow(self, name: str) -> None:
        fresh: dict[str, Any] = {}
        events = cast("Any", self._kube.watch(WATCHED[name]))
        async with aclosing(events):
            async for event in events:
                known = self._known[name]
                if event.type == "SYNCED":
                    self._known[name], fresh = fresh, {}
                    self._synced.add(name)
                elif event.type == "SYNC":
                    fresh[event.object["metadata"]["uid"]] = event.object
                    continue
                elif event.type == "DELETED":
                    known.pop(event.object["metadata"]["uid"], None)
                else:
                    known[event.object["metadata"]["uid"]] = event.object
                self._changed.set()

    async def _apply(self) -> None:
        loop = asyncio.get_running_loop()
        soonest = loop.time()
        while True:
            await self._changed.wait()
            await asyncio.sleep(max(0.0, soonest - loop.time()))
            self._changed.clear()
            if self._synced != set(WATCHED):
                continue
            try:
                await self._apply_once()
            except NetworkError as error:
                logger.error("the rules of NetworkPolicies: %s", error)  # noqa: TRY400
                await asyncio.sleep(RETRY_SECONDS)
                self._changed.set()
            soonest = loop.time() + SETTLE_SECONDS

    async def _apply_once(self) -> None:
        """Raises NetworkError."""
        claims, known = dict(self._reports.claims), self._known
        judging = bool(known["policies"])
        listed = [uid for uid in claims if uid in known["pods"]]
        wanted = policies.rules(
            known["policies"].values(), known["pods"].values(), known["namespaces"].values(), self._place, claims
        )
        if wanted != self._applied:
            await asyncio.to_thread(nft.apply, wanted)
            self._applied = wanted
        self._reports.applied(listed, claims, judging=judging)


async def _run(options: argparse.Namespace) -> None:
    config = kubeconfig.load(options.kubeconfig)
    kube = KubeClient(config.cluster, config.credentials, user_agent="wasilet network policies")
    place = policies.Place(
        pod_cidr=options.pod_cidr, machine_address=str(options.machine_address), dns_addresses=tuple(options.dns)
    )
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(Keeper(kube, place).run(options.agent), name="policies")
            if options.cluster_cidr is not None:
                here = Neighbourhood(
                    own=options.pod_cidr,
                    pods=options.cluster_cidr,
                    uplink=options.uplink,
                    gateway=options.machine_address,
                )
                group.create_task(RouteKeeper(kube, here).run(), name="routes")
    finally:
        await kube.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; runs until it is killed."""
    parser = argparse.ArgumentParser(prog="wasilet_node.network.policy_agent")
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--pod-cidr", type=ipaddress.IPv4Network, required=True)
    parser.add_argument("--machine-address", type=ipaddress.IPv4Address, required=True)
    parser.add_argument("--dns", action="append", default=[])
    parser.add_argument("--agent", type=Path, required=True, help="the socket that the agent listens at")
    parser.add_argument(
        "--cluster-cidr", type=ipaddress.IPv4Network, help="keep routes to the pods of other Nodes in it"
    )
    parser.add_argument("--uplink", type=ipaddress.IPv4Interface, help="this node's address among theirs")
    options = parser.parse_args(arguments)
    if (options.cluster_cidr is None) != (options.uplink is None):
        parser.error("--cluster-cidr and --uplink go together")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    asyncio.run(_run(options))
    return 1


if __name__ == "__main__":
    sys.exit(main())
