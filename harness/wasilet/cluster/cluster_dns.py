"""The cluster's DNS: the real CoreDNS as a process of this machine, behind the usual Service ``kube-dns``.

``python -P -m wasilet.cluster.cluster_dns ...`` installs what Services and names need (CoreDNS, and kube-proxy for the
nodes) and kubectl, waits for the address at which pods reach this machine, and becomes CoreDNS. A keeper starts it
again when it ended. Where they have to be built, that takes minutes, at the lowest priority: it begins when nothing
that the user waits for is left to do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from wasilet_common.keeper import kept

from wasilet.controlplane.acquire import Found, acquire, locate
from wasilet.controlplane.binaries import LATER
from wasilet.controlplane.components import Component
from wasilet.controlplane.health import LOOPBACK, Probe
from wasilet.controlplane.pod_network import NetworkPlan
from wasilet.errors import HarnessError
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.storage import write_file

COMPONENT = "coredns"
DNS_PORT, READY_PORT = "dns", "dns_ready"
"""Names of the ports: for queries at the machine's end of the nodes' links, for health on loopback."""

_NICE = 19
_POLL_SECONDS = 0.2
_RETRY_SECONDS = 60.0


def has_binaries(settings: Settings) -> bool:
    """Whether nothing has to be installed first."""
    version = State.of(settings).cluster.kubernetes
    return all(locate(name, cache=settings.cache, environ=settings.environ, kubernetes=version) for name in LATER)


def corefile(plan: NetworkPlan, *, port: int, ready_port: int, kubeconfig: Path, resolv_conf: Path | None) -> str:
    """CoreDNS' configuration: names of the cluster, and everything else as this machine resolves it."""
    forward = (
        f"    forward . {resolv_conf} {{\n        max_concurrent 1000\n    }}\n" if resolv_conf is not None else ""
    )
    return (
        f".:{port} {{\n"
        f"    bind {_address(plan)}\n"
        "    errors\n"
        f"    ready 127.0.0.1:{ready_port}\n"
        # Linux takes packets for any of its addresses on any interface: a neighbour with a route here is no pod.
        "    acl {\n"
        f"        allow net {_clients(plan)}\n"
        "        drop\n"
        "    }\n"
        "    kubernetes cluster.local in-addr.arpa ip6.arpa {\n"
        f"        kubeconfig {kubeconfig}\n"
        "        pods insecure\n"
        "        fallthrough in-addr.arpa ip6.arpa\n"
        "        ttl 5\n"
        "    }\n"
        f"{forward}"
        "    cache 30 {\n"
        "        disable success cluster.local\n"
        "        disable denial cluster.local\n"
        "    }\n"
        "    loadbalance\n"
        "}\n"
    )


def _address(plan: NetworkPlan) -> str:
    """Without root pods come by way of the network's keeper."""
    return LOOPBACK if plan.rootless else plan.machine_address


def _clients(plan: NetworkPlan) -> str:
    return f"{LOOPBACK}/32" if plan.rootless else str(plan.pods)


def component(plan: NetworkPlan, settings: Settings, state: State) -> Component:
    """The process."""
    folder, ports = state.etc, state.cluster.ports
    port, ready_port = ports[DNS_PORT], ports[READY_PORT]
    path = folder / "Corefile"
    resolv_conf = Path("/etc/resolv.conf")
    text = corefile(
        plan,
        port=port,
        ready_port=ready_port,
        kubeconfig=folder / "coredns.conf",
        resolv_conf=resolv_conf if _has_servers(resolv_conf) else None,
    )
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_file(path, text.encode())
    argv = [
        *(sys.executable, "-P", "-m", "wasilet.cluster.cluster_dns"),
        *("--cache", str(settings.cache), "--corefile", str(path), "--address", _address(plan)),
    ]
    if version := state.cluster.kubernetes:
        argv += ["--kubernetes", version]
    if settings.mirror:
        argv += ["--mirror", settings.mirror]
    if not settings.download:
        argv += ["--no-download"]
    return Component(
        name=COMPONENT,
        argv=kept(COMPONENT, argv),
        inputs=(path, folder / "coredns.conf"),
        clients=True,
        addresses=(),
        ready=Probe(port=ready_port, path="/ready"),
    )


def _has_servers(resolv_conf: Path) -> bool:
    try:
        lines = resolv_conf.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.split()[:1] == ["nameserver"] and len(line.split()) > 1 for line in lines)


# --- the process -----------------------------------------------------------------------------------------------------


def _log_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - its log


def _install(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Found]:
    """Have them, whatever it takes."""
    environ = dict(os.environ)
    version = options.kubernetes
    if not all(locate(name, cache=options.cache, environ=environ, kubernetes=version) for name in names):
        os.nice(_NICE)
    while True:
        try:
            return acquire(
                names,
                cache=options.cache,
                environ=environ,
                progress=_log_line,
                mirror=options.mirror,
                allow_download=not options.no_download,
                kubernetes=version,
            )
        except HarnessError as error:
            _log_line(f"error: {error}; trying again in {_RETRY_SECONDS:g} s")
            time.sleep(_RETRY_SECONDS)


def _wait_for(address: str) -> None:
    """Until this machine has an address, which the first node brings."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                time.sleep(_POLL_SECONDS)
            else:
                return


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line; becomes CoreDNS, unless it is ended before."""
    parser = argparse.ArgumentParser(prog="wasilet.cluster.cluster_dns", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--corefile", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--mirror", default="")
    parser.add_argument("--kubernetes", default="")
    parser.add_argument("--no-download", action="store_true")
    options = parser.parse_args(argv)
    niceness = os.nice(0)
    path = _install(options, LATER)[COMPONENT].path
    with contextlib.suppress(OSError):  # what was lowered to install, only root raises
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    _wait_for(options.address)
    os.execv(path, [str(path), "-conf", str(options.corefile)])  # noqa: S606 - no shell is what is wanted


if __name__ == "__main__":
    main()
