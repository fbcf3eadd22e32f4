"""kubectl against the cluster of the tests, whatever the user's own context is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from wasilet.errors import UsageError
from wasilet.process import run
from wasilet.testing.cluster import WasmCluster

_ELSEWHERE = ("-n", "--namespace", "-A", "--all-namespaces")


def run_kubectl(
    cluster: WasmCluster,
    namespace: str,
    words: Sequence[str],
    *,
    input: str | None = None,  # noqa: A002  (subprocess's own name for it)
    timeout_seconds: float = 60.0,
    check: bool = True,
) -> str:
    """Its stdout (with ``check=False`` its stderr too). Raises CommandError; UsageError: no kubectl."""
    elsewhere = any(word in _ELSEWHERE or word.startswith(("-n=", "--namespace=")) for word in words)
    where = () if elsewhere else ("--namespace", namespace)
    done = run(
        [_binary(cluster), "--kubeconfig", cluster.kubeconfig, *where, *words],
        timeout_seconds=timeout_seconds,
        env=cluster.settings.environ,
        input=input,
        check=check,
    )
    return done.stdout if check else done.stdout + done.stderr


def _binary(cluster: WasmCluster) -> str:
    from wasilet.controlplane.acquire import locate
    from wasilet.controlplane.versions import minor_of, versions
    from wasilet.state import State

    environ = cluster.settings.environ
    version = State.of(cluster.settings).cluster.kubernetes
    known = version if minor_of(version) in versions().kubernetes else ""
    found = locate("kubectl", cache=cluster.settings.cache, environ=environ, kubernetes=known)
    path = str(found.path) if found is not None else shutil.which("kubectl", path=environ.get("PATH"))
    if path is None:
        raise UsageError("there is no kubectl on this machine", hint="`invoke up` brings one")
    return path
