"""The options of ``wasilet-node`` and their help; what the values mean is in ``wasilet_node.commandline``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

DEFAULT_BOOTSTRAP_FILE = Path("/etc/kubernetes/bootstrap-kubelet.conf")
"""kubelet's and Krustlet's."""

LOG_LEVELS = ("debug", "info", "warning", "error")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")

_DESCRIPTION = "A Kubernetes node that runs WebAssembly: joins a cluster, and runs the pods that are bound to it."

_EPILOG = """\
examples:
  join a cluster with a bootstrap token (the file is a kubeconfig):
    wasilet-node --bootstrap-file bootstrap.conf --node-name wasm-1
  keep pods away that were not made for wasm, as Krustlet did:
    wasilet-node --bootstrap-file bootstrap.conf \\
      --taint kubernetes.io/arch=wasm32-wasi:NoSchedule --taint kubernetes.io/arch=wasm32-wasi:NoExecute
  stop the agent and all its containers:
    wasilet-node shutdown
  build what runs components that serve HTTP, once:
    wasilet-node component-host

SIGTERM (or Ctrl-C) ends the agent only: containers run on, and the next agent with the same --data-dir finds them.
The bootstrap file is needed until the node holds a client certificate; that one renews itself. The serving
certificate, which 'kubectl logs' and 'exec' go by, has to be approved: kubectl get csr; kubectl certificate approve.

Each option can be set in the environment: the name in brackets, then Krustlet's. A flag wins.
Exit codes: 0 ended by a signal; 1 failed, see the last line of the log; 2 wrong usage.
"""


class UsageError(Exception):
    """A value that cannot be used; the message is one line that names the option."""


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is answered by one line, not by the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse's own, which takes a full disk for success."""
        if message:
            (file or sys.stderr).write(message)


def make_parser(version: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wasilet-node",
        usage="%(prog)s [options]\n       %(prog)s shutdown [--data-dir DIR] [--timeout SECONDS]\n"
        "       %(prog)s component-host [--check]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version)
    common = _Parser(add_help=False, allow_abbrev=False)
    for target, default in ((parser, None), (common, argparse.SUPPRESS)):
        _add_everywhere(target, default)
    _add_joining(parser)
    _add_node(parser)
    _add_serving(parser)
    _add_outbound(parser)
    _add_network(parser)
    _add_images(parser)
    _add_commands(parser, common)
    return parser


def _add_everywhere(target: argparse.ArgumentParser, default: str | None) -> None:
    target.add_argument(
        "--data-dir", metavar="DIR", default=default,
        help="where certificates, images, logs and pods are kept; one agent a folder "
        "(default: ~/.local/share/wasilet/node) [WASILET_NODE_DATA_DIR, KRUSTLET_DATA_DIR]",
    )  # fmt: skip
    target.add_argument(
        "--log-level", metavar="LEVEL", default=default,
        help=f"{', '.join(LOG_LEVELS)} (default: info) [WASILET_NODE_LOG_LEVEL]",
    )  # fmt: skip


def _add_joining(parser: argparse.ArgumentParser) -> None:
    joining = parser.add_argument_group("joining")
    joining.add_argument(
        "--bootstrap-file", metavar="FILE",
        help=f"kubeconfig with a bootstrap token (default: {DEFAULT_BOOTSTRAP_FILE} where it exists) "
        "[WASILET_NODE_BOOTSTRAP_FILE, KRUSTLET_BOOTSTRAP_FILE]",
    )  # fmt: skip
    joining.add_argument(
        "--kubeconfig", metavar="FILE",
        help="also write the node's own kubeconfig here once it has joined; a file that is not a node's is left "
        "alone [KUBECONFIG]",
    )  # fmt: skip


def _add_node(parser: argparse.ArgumentParser) -> None:
    node = parser.add_argument_group("the Node")
    node.add_argument(
        "--node-name", metavar="NAME",
        help="its name (default: the host name) [WASILET_NODE_NAME, KRUSTLET_NODE_NAME]",
    )  # fmt: skip
    node.add_argument(
        "-n", "--node-ip", metavar="IP",
        help="its address (default: found, and followed when it changes) [WASILET_NODE_IP, KRUSTLET_NODE_IP]",
    )  # fmt: skip
    node.add_argument(
        "--hostname", metavar="NAME",
        help="its host name (default: the node's name, else the machine's) [WASILET_NODE_HOSTNAME, KRUSTLET_HOSTNAME]",
    )  # fmt: skip
    node.add_argument(
        "--node-labels", metavar="KEY=VALUE,...", action="append",
        help="labels, repeatable [WASILET_NODE_LABELS, NODE_LABELS]",
    )  # fmt: skip
    node.add_argument(
        "--taint", metavar="KEY[=VALUE]:EFFECT", action="append",
        help=f"a taint ({', '.join(EFFECTS)}), repeatable; given to a new Node only, since a node may not change "
        "its own [WASILET_NODE_TAINTS]",
    )  # fmt: skip
    node.add_argument(
        "--max-pods", metavar="N", help="how many pods it takes (default: 110) [WASILET_NODE_MAX_PODS, MAX_PODS]"
    )
    node.add_argument("--provider-id", metavar="ID", help="spec.providerID [WASILET_NODE_PROVIDER_ID]")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    serving = parser.add_argument_group("its HTTPS server, for logs, exec and metrics")
    serving.add_argument(
        "-a", "--bind-address", "--addr", metavar="IP", dest="bind_address",
        help="address to listen on (default: the Node's) [WASILET_NODE_BIND_ADDRESS, KRUSTLET_ADDRESS]",
    )  # fmt: skip
    serving.add_argument(
        "-p", "--port", metavar="PORT",
        help="port to listen on; 0: any free one (default: 10250) [WASILET_NODE_PORT, KRUSTLET_PORT]",
    )  # fmt: skip


def _add_outbound(parser: argparse.ArgumentParser) -> None:
    outbound = parser.add_argument_group("outbound HTTP of modules")
    outbound.add_argument(
        "--allow-local-origins", metavar="ORIGIN,...", action="append",
        help="origins such as http://127.0.0.1:8090 that pods may call although they are on the node itself, "
        "link-local, the API server or a kubelet, repeatable; a pod's annotation must list them as well "
        "[WASILET_NODE_ALLOW_LOCAL_ORIGINS]",
    )  # fmt: skip
    outbound.add_argument(
        "--outbound-policy", metavar="FILE",
        help='which namespace may call what, above what annotations list: YAML as "team-a: [https://api.example]"; "*" '
        "is every other namespace, or every origin; read again as pods start [WASILET_NODE_OUTBOUND_POLICY]",
    )  # fmt: skip


def _add_network(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("the pod network; without --cluster-cidr pods share the machine's network")
    for flag, metavar, text in (
        ("--cluster-cidr", "CIDR", "of all pods of the cluster [WASILET_NODE_CLUSTER_CIDR]"),
        ("--service-cidr", "CIDR", "of all Services [WASILET_NODE_SERVICE_CIDR]"),
        (
            "--uplink", "IP/PREFIX",
            "the node's end of its link to this machine, whose end is the address below [WASILET_NODE_UPLINK]",
        ),
        (
            "--uplink-bridge", "NAME",
            (
                "a bridge of this machine that the link is a port of, as kind's is: --uplink is an address there, and "
                "--node-ip the same [WASILET_NODE_UPLINK_BRIDGE]"
            ),
        ),
        ("--uplink-gateway", "IP", "this machine's address on that bridge [WASILET_NODE_UPLINK_GATEWAY]"),
        (
            "--network-keeper", "SOCKET",
            "without root: of what keeps the user namespace that all of it is in [WASILET_NODE_NETWORK_KEEPER]",
        ),
        (
            "--cluster-dns", "IP,...",
            "name servers of pods with dnsPolicy ClusterFirst, repeatable [WASILET_NODE_CLUSTER_DNS]",
        ),
        ("--cluster-domain", "NAME", "(default: cluster.local) [WASILET_NODE_CLUSTER_DOMAIN]"),
        ("--kube-proxy", "FILE", "the kube-proxy that makes Services work [WASILET_NODE_KUBE_PROXY]"),
        (
            "--kube-proxy-kubeconfig", "FILE",
            "its credential, with an address that is reached by the uplink [WASILET_NODE_KUBE_PROXY_KUBECONFIG]",
        ),
        (
            "--network-policies-kubeconfig", "FILE",
            "credential of what keeps NetworkPolicies, likewise [WASILET_NODE_NETWORK_POLICIES_KUBECONFIG]",
        ),
        (
            "--pod-network-absent", "TEXT",
            "why there is none, for the Node's condition NetworkUnavailable [WASILET_NODE_POD_NETWORK_ABSENT]",
        ),
    ):  # fmt: skip
        network.add_argument(flag, metavar=metavar, help=text)


def _add_images(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images")
    images.add_argument(
        "--insecure-registries", metavar="HOST[:PORT],...", action="append",
        help="registries spoken to in plain HTTP, repeatable; loopback always may be "
        "[WASILET_NODE_INSECURE_REGISTRIES, KRUSTLET_INSECURE_REGISTRIES]",
    )  # fmt: skip
    images.add_argument(
        "--registry-config", metavar="FILE",
        help="a docker config.json with logins that serve every pod, after the pod's own pull secrets "
        "(default: none) [WASILET_NODE_REGISTRY_CONFIG]",
    )  # fmt: skip


def _add_commands(parser: argparse.ArgumentParser, common: _Parser) -> None:
    commands = parser.add_subparsers(
        dest="command", metavar="shutdown|component-host", title="commands", parser_class=_Parser
    )
    shutdown = commands.add_parser(
        "shutdown",
        parents=[common],
        allow_abbrev=False,
        help="stop the agent, its containers and its supervisor",
        description="Stop the agent of a data folder, then all containers, then the supervisors.",
    )
    shutdown.add_argument("--timeout", metavar="SECONDS", help="how long it may take in all (default: 10)")
    host = commands.add_parser(
        "component-host",
        parents=[common],
        allow_abbrev=False,
        help="find or build the library that runs components which serve HTTP, open sockets or use WASI 0.3",
        description="Print where the component host is; build it with this machine's Rust when there is none.",
    )
    host.add_argument("--check", action="store_true", help="only look, build nothing")
