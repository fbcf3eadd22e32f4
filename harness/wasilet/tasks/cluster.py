"""The tasks for clusters and their nodes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from invoke.context import Context
from invoke.tasks import task

from wasilet.settings import invocation_path
from wasilet.tasks.help_texts import NAME_HELP, OUTPUT_HELP
from wasilet.terminal.cli import (
    checked_output,
    command,
    emit,
    emit_json,
    exec_program,
    finish,
    remainder,
    reporter,
    settings_of,
)


@task(
    iterable=["taint"],
    auto_shortflags=False,
    help={
        "name": NAME_HELP,
        "provider": "host (default), kind, k3d, minikube, or existing: any cluster that a kubeconfig names",
        "nodes": "how many wasm nodes join (default: 1, or as many as there are)",
        "taint": "key=value:Effect that new nodes register; repeatable",
        "node-ip": "the address that nodes advertise (default: found)",
        "pod-cidr": "range of the pods' addresses of a new cluster (host; default: one this machine has no route to)",
        "service-cidr": "range of the Services' addresses of a new cluster (host)",
        "pod-security": "what namespaces without PodSecurity labels allow their pods (host): privileged, baseline "
        "(default of a new cluster) or restricted",
        "image": "the node image of a new cluster (kind, k3d)",
        "kubernetes-version": "of the cluster, as 1.37.2; host: one of the three newest minors, as 1.36",
        "config": "the provider's own file: cluster configuration (kind, k3d), or the kubeconfig to read (existing)",
        "context": "existing: which context of that kubeconfig; must be named, the current one is never guessed",
        "yes": "existing: it may be changed; without, what is missing is only reported",
        "kubeconfig": "write the context to this file and leave ~/.kube/config alone",
        "check": "change nothing, report what would be changed",
        "diff": "show what changes",
        "output": OUTPUT_HELP,
    },
)
@command
def up(
    c: Context,
    name: str = "",
    provider: str = "",
    nodes: int = 0,
    taint: list[str] | None = None,
    node_ip: str = "",
    pod_cidr: str = "",
    service_cidr: str = "",
    pod_security: str = "",
    image: str = "",
    kubernetes_version: str = "",
    config: str = "",
    context: str = "",
    yes: bool = False,
    kubeconfig: str = "",
    check: bool = False,
    diff: bool = False,
    output: str = "text",
) -> None:
    """Create a cluster with a wasm node, or repair it.

    A cluster of that name that runs already (kind, k3d, minikube) is adopted: only what is missing is added, and
    `down` takes back just that.

    Examples:
      invoke up                               a cluster on this machine, then: kubectl get nodes
      invoke up --name two --kubeconfig ./kc  another one beside it, kept out of ~/.kube/config
      invoke up --check --diff                what would be changed?
      invoke up --nodes 3                     three wasm nodes
      invoke up --provider kind               a wasm node beside kind's own
      invoke up --provider existing --context my-cluster --yes
    """
    from wasilet.cluster.up import up as bring_up

    checked_output(output)
    settings = settings_of(
        c,
        name=name,
        provider=provider,
        nodes=nodes or None,
        taints=taint or None,
        node_ip=node_ip,
        pod_cidr=pod_cidr,
        service_cidr=service_cidr,
        pod_security=pod_security,
        image=image,
        kubernetes_version=kubernetes_version,
        config=config,
        context=context,
        yes=yes or None,
        kubeconfig=kubeconfig,
    )
    finish(bring_up(settings, reporter=reporter(diff=diff), check=check), output=output)


@task(
    help={
        "name": NAME_HELP,
        "purge": "remove what the cluster kept as well: objects, images, logs, certificates",
        "check": "change nothing, report what would be changed",
        "output": OUTPUT_HELP,
    }
)
@command
def down(c: Context, name: str = "", purge: bool = False, check: bool = False, output: str = "text") -> None:
    """End a cluster; what it kept stays, for the next `up`.

    Ends its nodes with their containers, its processes, and takes its entry out of the kubeconfig.

    Examples:
      invoke down                        end it; `invoke up` brings it back with its objects
      invoke down --purge                end it and remove everything of it
      invoke down --name two             only that one; others are left alone
    """
    from wasilet.cluster.down import down as take_down

    checked_output(output)
    settings = settings_of(c, name=name)
    finish(take_down(settings, reporter=reporter(), purge=purge, check=check), output=output)


@task(help={"name": NAME_HELP, "output": "text or json (fields: docs/harness.md)"})
@command
def status(c: Context, name: str = "", output: str = "text") -> None:
    """Show what runs, and whether it is well.

    Examples:
      invoke status
      invoke status --output json | jq -r .registry
    """
    from wasilet.cluster.status import status as read_status
    from wasilet.cluster.status import status_lines

    checked_output(output)
    data = read_status(settings_of(c, name=name))
    if output == "json":
        emit_json(data)
        return
    for line in status_lines(data):
        emit(line)


@task(
    help={
        "component": "etcd, kube-apiserver, ..., approver, registry, or a node's name",
        "name": NAME_HELP,
        "follow": "go on printing as lines come",
        "lines": "how many of the last lines (0: all)",
    },
)
@command
def logs(c: Context, component: str, name: str = "", follow: bool = False, lines: int = 100) -> None:
    """Print a component's log.

    Examples:
      invoke logs kube-apiserver      (`invoke logs x` names those there are)
      invoke logs wasilet-1 -f        the node agent's, as it comes
    """
    from wasilet.cluster.status import log_file, log_lines

    settings = settings_of(c, name=name)
    for line in log_lines(log_file(settings, component), tail=lines, follow=follow):
        emit(line)


@task(help={"name": NAME_HELP})
@command
def kubeconfig(c: Context, name: str = "") -> None:
    """Print the path of the cluster's kubeconfig.

    Example:
      export KUBECONFIG=$(invoke kubeconfig)
    """
    from wasilet.cluster.status import kubeconfig_path

    emit(str(kubeconfig_path(settings_of(c, name=name))))


@task(help={"name": NAME_HELP})
@command
def kubectl(c: Context, name: str = "") -> None:
    """Run kubectl against the cluster.

    With the administrator's rights, whatever the current context is; what follows -- is kubectl's.

    Examples:
      invoke kubectl -- get pods -A
      ./run kubectl get nodes         (run puts the -- in by itself)
    """
    from wasilet.cluster.status import kubectl_command

    argv, env = kubectl_command(settings_of(c, name=name), remainder(), say=reporter().notice)
    exec_program(argv, env=env, cwd=os.environ.get("WASILET_INVOCATION_DIR"))


@task(
    help={
        "request": "the certificate signing request to approve; none: list what is pending",
        "all": "approve every one that is right",
        "name": NAME_HELP,
        "output": OUTPUT_HELP,
    },
)
@command
def approve(c: Context, request: str = "", all: bool = False, name: str = "", output: str = "text") -> None:  # noqa: A002
    """List or approve nodes' serving certificates by hand.

    The approver does it by itself; this shows the step.

    Examples:
      invoke approve                  what is pending, and would it be approved?
      invoke approve --request csr-x7k2p
      invoke approve --all
    """
    from wasilet.cluster.approval import approve_once, pending
    from wasilet.cluster.approver_facts import policy_file
    from wasilet.cluster.opening import open_cluster

    checked_output(output)
    with open_cluster(settings_of(c, name=name)) as cluster:
        kube, policy = cluster.admin(), policy_file(cluster.state)
        requests = approve_once(kube, request, policy) if request or all else pending(kube, policy)
    if output == "json":
        emit_json([vars(entry) for entry in requests])
        return
    verb = "approved" if request or all else "pending "
    for entry in requests:
        emit(f"{verb} {entry.name}  {entry.node}  {'' if entry.right else 'would be left alone: '}{entry.why}")
    if not requests:
        sys.stderr.write("nothing is pending\n")


@task(
    auto_shortflags=False,
    help={
        "action": "create, list or delete",
        "id": "which one to delete",
        "ttl": "how long a new token lives, in seconds",
        "file": "write a bootstrap.conf with the new token there, instead of printing the token",
        "node": "the node of this machine that will join with it, so that the approver knows it",
        "name": NAME_HELP,
        "output": OUTPUT_HELP,
    },
)
@command
def token(
    c: Context,
    action: str,
    id: str = "",  # noqa: A002
    ttl: int = 3600,
    file: str = "",
    node: str = "",
    name: str = "",
    output: str = "text",
) -> None:
    """Create, list or delete tokens for nodes to join with.

    A node of this machine shares its address with the cluster's own nodes; the approver lets it if --node names it.

    Examples:
      invoke token create --node wasm-2 --file bootstrap.conf   for `wasilet-node --node-name wasm-2 ...`
      invoke token list
      invoke token delete --id abc123
    """
    from wasilet.cluster.token import run_action

    settings = settings_of(c, name=name, token_ttl_seconds=ttl)
    checked_output(output)
    answer = run_action(settings, action, token_id=id, file=file, node=node)
    if output == "json":
        emit_json(answer)
        return
    for entry in answer:
        if login := entry.pop("registry_login", ""):
            reporter().notice(f"the cluster's registry wants a login: start the node with --registry-config {login}")
        emit("  ".join(str(value) for value in entry.values() if value))


@task(
    auto_shortflags=False,
    help={
        "node": "the new node's name",
        "file": "where to write the bootstrap file (default: ./bootstrap.conf)",
        "address": "of this machine, as the other one reaches it (default: that of the default route)",
        "registry": "let the other machine pull from the local registry too, by a login that can only read",
        "ttl": "how long the token lives, in seconds",
        "name": NAME_HELP,
        "output": OUTPUT_HELP,
    },
)
@command
def bootstrap(
    c: Context,
    node: str,
    file: str = "bootstrap.conf",
    address: str = "",
    registry: bool = False,
    ttl: int = 3600,
    name: str = "",
    output: str = "text",
) -> None:
    """Let a node of another machine join.

    Writes a bootstrap file, and prints what to type there.

    A cluster that listens on loopback gets a proxy on --address, which `status` lists and `down` closes.

    Examples:
      invoke bootstrap --node wasm-2
      invoke bootstrap --node wasm-2 --address 192.0.2.10 --registry
    """

    from wasilet.cluster import join
    from wasilet.cluster.opening import open_cluster

    checked_output(output)
    with open_cluster(settings_of(c, name=name, token_ttl_seconds=ttl)) as cluster:
        target = Path(invocation_path(file))
        made = join.bootstrap(
            cluster, node=node, file=target, address=address, registry=registry, say=reporter().notice
        )
    if output == "json":
        login = str(made.registry_login) if made.registry_login else None
        emit_json({**vars(made), "file": str(made.file), "registry_login": login})
        return
    for line in join.joining_lines(made):
        emit(line)


@task(
    auto_shortflags=False,
    help={
        "node": "the node's name",
        "systemd": "print a systemd unit in place of the command line",
        "file": "write the unit to this file",
        "data-dir": "where the node keeps what it has (default: /var/lib/wasilet/NODE)",
        "bootstrap-file": "default: /etc/wasilet/bootstrap.conf",
        "user": "whom the node runs as (default: you, also by sudo); root can limit cpu and memory everywhere",
    },
)
@command
def node(
    c: Context,
    node: str,
    systemd: bool = False,
    file: str = "",
    data_dir: str = "",
    bootstrap_file: str = "/etc/wasilet/bootstrap.conf",
    user: str = "",
) -> None:
    """Print how a node of this machine is run for good.

    As a command line, or as a systemd unit. What follows -- are further options of the node; `wasilet-node --help`
    names them.

    Examples:
      invoke node --node wasm-1 --systemd --file /etc/systemd/system/wasilet-node.service
      invoke node --node wasm-1 --systemd -- --max-pods 500
    """
    import shlex

    from wasilet.cluster import join

    data = data_dir or f"/var/lib/wasilet/{node}"
    if not systemd:
        emit(
            shlex.join(
                join.node_command(node=node, data_dir=data, bootstrap_file=bootstrap_file, arguments=remainder())
            )
        )
        return
    user = user or join.unit_user(os.environ)
    unit = join.systemd_unit(node=node, data_dir=data, bootstrap_file=bootstrap_file, user=user, arguments=remainder())
    if file:
        join.write_unit(Path(invocation_path(file)), unit)
        return
    emit(unit.rstrip())


@task(help={"name": NAME_HELP, "namespace": "only pods of this namespace"})
@command
def diagnose(c: Context, name: str = "", namespace: str = "") -> None:
    """Print what to read when something went wrong.

    Processes that are gone, nodes, pods with reasons and events, the ends of logs.

    Examples:
      invoke diagnose
      invoke diagnose --namespace default
    """
    from wasilet.cluster.diagnostics import examine

    for line in examine(settings_of(c, name=name), namespace=namespace):
        emit(line)
