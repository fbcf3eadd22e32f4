"""Whose kubelet's contract the node keeps, and therefore names as ``kubeletVersion``.

A kubelet may be older than its API server by three minors and never newer (Kubernetes' version skew policy), and tools
read the version to know what they may count on. So the node names the newest contract that it keeps and that is not
newer than its API server. What it does is the same under each name: an older API server drops the fields that it does
not know, and ``status.declaredFeatures`` says the rest.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from wasilet_node.kube.base import ForbiddenError, Kube, KubeError, NotFoundError

logger = logging.getLogger(__name__)

KEPT = {(1, 34): "v1.34.4", (1, 35): "v1.35.4", (1, 36): "v1.36.3", (1, 37): "v1.37.2"}
"""By minor, the kubelet whose sources and release notes the node was compared with."""

DECLARED_FEATURES = (
    "ExtendWebSocketsToKubelet",
    "InPlacePodLevelResourcesVerticalScaling",
    "InPlacePodVerticalScalingInitContainers",
    "RestartAllContainersOnContainerExits",
)
"""What the scheduler and the API server may count on, in kubelet's names and in order (KEP-5328, from 1.36 on; older
servers drop the field). Those of resizes say that the node decides on one; what its machine cannot do is Infeasible all
the same. ExtendWebSocketsToKubelet: exec, attach and port-forward come as the WebSockets that clients speak; without it
the API server translates them to SPDY."""

_ASK_AGAIN_SECONDS = 30.0
_NUMBER = re.compile(r"\d+")


def version_for(server: tuple[int, int] | None) -> str:
    """The contract beside an API server of this major and minor; None: not known, so that the oldest is the safest."""
    fitting = [minor for minor in KEPT if server is not None and minor <= server]
    return KEPT[max(fitting)] if fitting else KEPT[min(KEPT)]


class Contract:
    """Asks the API server for its version, at first and every half minute, since it may be upgraded."""

    def __init__(self, kube: Kube, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._clock = clock
        self._server: tuple[int, int] | None = None
        self._asked_at = float("-inf")

    async def version(self) -> str:
        """While the API server is away, its last answer counts. Raises KubeError before there is one."""
        if self._clock() - self._asked_at >= _ASK_AGAIN_SECONDS:
            try:
                self._learn(await self._kube.get("/version"))
            except (ForbiddenError, NotFoundError):
                self._learn({})  # someone keeps it from nodes, which are to join all the same
            except KubeError:
                if self._asked_at == float("-inf"):
                    raise
        return version_for(self._server)

    def _learn(self, told: object) -> None:
        self._asked_at = self._clock()
        fields = told if isinstance(told, dict) else {}
        # Some distributions write "34+".
        major, minor = (_NUMBER.match(str(fields.get(name, ""))) for name in ("major", "minor"))
        if major is None or minor is None:
            return
        server = (int(major[0]), int(minor[0]))
        if server != self._server and server < min(KEPT):
            logger.warning(
                "the API server is of Kubernetes %d.%d; this node was made for %s and later, and may be refused",
                *server,
                KEPT[min(KEPT)],
            )
        self._server = server
