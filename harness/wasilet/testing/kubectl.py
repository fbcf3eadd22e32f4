"""kubectl against the cluster of the tests, whatever the user's own context is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from wasilet.errors import HarnessError
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
    """Its stdout (with ``check=False`` its stderr too). Raises CommandError; AcquireError: no kubectl can be had."""
    elsewhere = any(word in _ELSEWHERE or word.startswith(("-n=", "--namespace=")) for word in words)
    where = () if elsewhere else ("--namespace", namespace)
    done = run(
        [kubectl_path(cluster), "--kubeconfig", cluster.kubeconfig, *where, *words],
        timeout_seconds=timeout_seconds,
        env=cluster.settings.environ,
        input=input,
        check=check,
    )
    return done.stdout if check else done.stdout + done.stderr


def kubectl_path(cluster: WasmCluster) -> str:
    """Of one that fits the cluster, brought where there is none. Raises AcquireError."""
    from wasilet.controlplane.kubectl import ensure_kubectl

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201 - pytest keeps it with the test

    try:
        return str(ensure_kubectl(cluster.settings, say=say))
    except HarnessError:
        # Any will do for most of what tests ask it.
        if path := shutil.which("kubectl", path=cluster.settings.environ.get("PATH")):
            return path
        raise
