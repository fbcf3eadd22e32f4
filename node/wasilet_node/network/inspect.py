"""What is in a node's network namespace: ``diagnose`` runs this as a program (``--data-dir DIR``).

Interfaces, routes, which pod has which address, and the packet filter's rules; it changes nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from wasilet_node.network import nft
from wasilet_node.network.addresses import PodRecords
from wasilet_node.network.channel import NamespaceChannel
from wasilet_node.network.errors import NetworkError
from wasilet_node.network.netlink import Netlink
from wasilet_node.network.pod_networks import NODE_KEY
from wasilet_node.runtime import linux, netns, rootless, supervisor_registry
from wasilet_node.settings import NodePaths


def lines(paths: NodePaths) -> Iterator[str]:
    """Moves the calling thread into the namespace. Raises NetworkError, OSError."""
    pointer = supervisor_registry.current(paths.data)
    if pointer is None:
        raise NetworkError("no supervisor runs")
    channel = NamespaceChannel(pointer)
    try:
        kept = channel.kept()
        if NODE_KEY not in kept:
            raise NetworkError("the node has no network of its own")
        descriptor = channel.get(NODE_KEY)
    finally:
        channel.close()
    try:
        if os.geteuid() != 0:
            rootless.join(descriptor)
            linux.pass_on_capabilities()
        netns.setns(descriptor)
    finally:
        os.close(descriptor)
    yield f"namespaces kept: {len(kept)}"
    for record in PodRecords(paths.network / "pods").load():
        there = "" if record.key in kept or not record.key else ", whose namespace is gone"
        by = f" by {record.interface}" if record.interface else ", without a namespace: nothing in it has a socket"
        yield f"pod {record.uid}: {record.address}{by}{there}"
    with Netlink() as netlink:
        names = dict(netlink.links())
        yield f"interfaces: {', '.join(names.values())}"
        for route in netlink.routes():
            via = f" via {route.gateway}" if route.gateway is not None else ""
            yield f"route {route.destination}{via} dev {names.get(route.interface_index, '?')}"
    done = subprocess.run(
        [nft.find(), "list", "ruleset"], capture_output=True, text=True, timeout=nft.TIMEOUT_SECONDS, check=False
    )
    yield from (done.stdout or done.stderr).splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="wasilet_node.network.inspect")
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        for line in lines(NodePaths(data=options.data_dir)):
            sys.stdout.write(f"{line}\n")
    except (NetworkError, OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
