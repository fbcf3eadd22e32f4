"""The Lease in ``kube-node-lease``: the node's heartbeat.

40 s long and renewed every 10 s, as kubelet's. It is what the node lifecycle controller looks at, so it has a task of
its own that nothing else can hold up, and calls that give up after 5 s. It is owned by the Node (one owner reference),
so that it goes with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from wasilet_common.time_format import rfc3339_micro

from wasilet_node.kube.base import ApiStatusError, ConflictError, Kube, KubeError, KubeObject, NotFoundError

logger = logging.getLogger(__name__)

_PATH = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_TIMEOUT_SECONDS = 5.0
_SAY_AGAIN_SECONDS = 60.0


class LeaseKeeper:
    """Renews the lease while ``run`` runs."""

    def __init__(
        self,
        *,
        kube: Kube,
        node_name: str,
        node_uid: Callable[[], str | None],
        duration_seconds: int,
        renew_interval_seconds: float,
        on_unauthorized: Callable[[], None],
        retry_seconds: float = 1.0,
    ) -> None:
        """``node_uid``: None while there is no Node; the lease is then renewed without an owner. ``retry_seconds``:
        between attempts while it cannot be renewed."""
        self._kube = kube
        self._node_name = node_name
        self._node_uid = node_uid
        self._duration_seconds = duration_seconds
        self._renew_interval_seconds = renew_interval_seconds
        self._on_unauthorized = on_unauthorized
        self._retry_seconds = retry_seconds

    async def run(self) -> None:
        """Renew until cancelled. An API server that is away is survived."""
        failing_since: float | None = None
        said_at = 0.0
        while True:
            began = time.monotonic()
            try:
                await self.renew()
            except KubeError as error:
                if isinstance(error, ApiStatusError) and error.code == 401:
                    self._on_unauthorized()
                now = time.monotonic()
                failing_since = failing_since or now
                if now - said_at >= _SAY_AGAIN_SECONDS:
                    said_at = now
                    logger.warning("the node's lease was not renewed: %s", error)
                await asyncio.sleep(self._retry_seconds)
                continue
            if failing_since is not None:
                logger.info("the node's lease is renewed again, after %.0f s", time.monotonic() - failing_since)
                failing_since, said_at = None, 0.0
            await asyncio.sleep(max(0.0, self._renew_interval_seconds - (time.monotonic() - began)))

    async def renew(self) -> None:
        """Renew once; makes the lease when it is missing. Raises KubeError."""
        lease = self._lease()
        try:
            await self._kube.patch(
                f"{_PATH}/{self._node_name}",
                lease,
                content_type="application/merge-patch+json",
                timeout_seconds=_TIMEOUT_SECONDS,
            )
            return
        except NotFoundError:
            pass
        try:
            await self._kube.create(_PATH, lease, timeout_seconds=_TIMEOUT_SECONDS)
        except ConflictError:
            logger.debug("the lease was made meanwhile")

    def _lease(self) -> KubeObject:
        uid = self._node_uid()
        metadata: KubeObject = {"name": self._node_name}
        if uid is not None:
            metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Node", "name": self._node_name, "uid": uid}]
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": self._node_name,
                "leaseDurationSeconds": self._duration_seconds,
                "renewTime": rfc3339_micro(time.time_ns()),
            },
        }
