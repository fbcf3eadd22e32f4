"""What is read of a cluster that was found, through its API alone, and remembered in ``cluster.json``."""

from __future__ import annotations

from typing import Any

from wasilet_common.time_format import parse_rfc3339

from wasilet.cluster_record import ExternalRecord
from wasilet.errors import ApiError, WaitTimeoutError
from wasilet.kube.client import Kube, api_path
from wasilet.process import check_cancelled
from wasilet.providers.base import Cluster
from wasilet.settings import Settings
from wasilet.steps import Progress

REFUSAL_SECONDS = 10.0
"""An API server that has just been started knows no roles yet, and refuses its administrator for a second or two."""

AUTHENTICATION = api_path("configmaps", "extension-apiserver-authentication", namespace="kube-system")


def facts(cluster: Cluster) -> ExternalRecord:
    """What is remembered of the cluster; empty before it was found."""
    return cluster.state.cluster.external


def update_facts(cluster: Cluster, **values: Any) -> None:
    """Merge values into the facts: fields of ``ExternalRecord``, as JSON has them."""
    cluster.state.update(external=cluster.state.read().get("external", {}) | values)


def made_since(created: str, since: str) -> bool:
    """Whether an instant that Docker reports (nanoseconds, UTC) is not before another one, give or take a second."""
    begun, at = parse_rfc3339(since), parse_rfc3339(created)
    return begun is not None and at is not None and at >= begun - 1.0


def wait_for_answer(kube: Kube, settings: Settings, say: Progress, *, hint: str = "") -> str:
    """The uid of kube-system, once the API server answers. Raises WaitTimeoutError with ``hint``, and ApiError when it
    refuses."""
    import time

    deadline = time.monotonic() + settings.timeouts.ready_seconds
    refused = None
    while True:
        try:
            return cluster_uid(kube)
        except ApiError as error:
            if error.code in {401, 403}:
                refused = refused or time.monotonic()
                if time.monotonic() >= refused + REFUSAL_SECONDS:
                    raise
            if time.monotonic() >= deadline:
                words = f"{error.message}, for {settings.timeouts.ready_seconds:g} s"
                raise WaitTimeoutError(words, hint=hint) from error
        say("waiting for the API server")
        check_cancelled()
        time.sleep(settings.timeouts.poll_seconds)


def cluster_uid(kube: Kube) -> str:
    return str(kube.get(api_path("namespaces", "kube-system"))["metadata"]["uid"])


def client_ca(kube: Kube) -> bytes | None:
    """What signs clients of the API server, the API server itself included when it calls nodes. Every kube-apiserver
    publishes it there (pkg/controlplane/controller/clusterauthenticationtrust); nodes may not read it."""
    data = (kube.find(AUTHENTICATION) or {}).get("data") or {}
    return str(data["client-ca-file"]).encode() if data.get("client-ca-file") else None


def root_ca(kube: Kube) -> bytes | None:
    """What pods trust: for a kubeconfig that trusts the system's authorities, or none."""
    found = kube.find(api_path("configmaps", "kube-root-ca.crt", namespace="kube-system")) or {}
    pem = (found.get("data") or {}).get("ca.crt")
    return str(pem).encode() if pem else None
