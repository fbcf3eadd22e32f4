"""ClusterTrustBundles: certificates of signers, for all pods of the cluster (KEP-3257).

They are few and small and belong to the cluster, so all of them are read at once, and pods that ask meanwhile or within
the allowed age share that read. A node has the right to list them wherever the API server serves them: v1 from 1.37 on,
v1beta1 before, behind a feature gate.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wasilet_node.kube.base import Kube, KubeError, KubeObject, NotFoundError
from wasilet_node.kube.pem import certificates, encoded

_PATHS = tuple(f"/apis/certificates.k8s.io/{version}/clustertrustbundles" for version in ("v1", "v1beta1"))


class TrustBundlesError(KubeError):
    """They cannot be had, or none was selected; the message is for the pod's event."""


class TrustBundles:
    """One object per node."""

    def __init__(self, kube: Kube, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._clock = clock
        self._reading: asyncio.Task[Sequence[KubeObject]] | None = None
        self._known: Sequence[KubeObject] = ()
        self._read_at = float("-inf")

    async def by_name(self, name: str, *, optional: bool, max_age_seconds: float) -> str:
        """The certificates of one bundle, as PEM; of one that is missing none, if that is allowed. Raises KubeError."""
        for bundle in await self._all(max_age_seconds):
            if bundle["metadata"].get("name") == name:
                return _certificates([bundle])
        if optional:
            return ""
        raise TrustBundlesError(f'clustertrustbundle "{name}" not found')

    async def by_signer(
        self, signer: str, selector: Mapping[str, Any] | None, *, optional: bool, max_age_seconds: float
    ) -> str:
        """The certificates of all bundles of a signer that the label selector matches: without a selector none, with an
        empty one all. Raises KubeError."""
        found = [
            bundle
            for bundle in await self._all(max_age_seconds)
            if (bundle.get("spec") or {}).get("signerName") == signer
            and selector is not None
            and _matches(selector, bundle["metadata"].get("labels") or {})
        ]
        if found or optional:
            return _certificates(found)
        raise TrustBundlesError("combination of signerName and labelSelector matched zero ClusterTrustBundles")

    async def _all(self, max_age_seconds: float) -> Sequence[KubeObject]:
        if self._clock() - self._read_at < max_age_seconds:
            return self._known
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name="read cluster trust bundles")
            self._reading.add_done_callback(self._read_out)
        return await asyncio.shield(self._reading)

    def _read_out(self, task: asyncio.Task[Sequence[KubeObject]]) -> None:
        self._reading = None
        # The caller may have gone: a failure that no one awaits is not an event-loop error.
        if not task.cancelled():
            task.exception()

    async def _read(self) -> Sequence[KubeObject]:
        begun = self._clock()
        for path in _PATHS:
            try:
                listed = await self._kube.list(path)
            except NotFoundError:
                continue
            self._known, self._read_at = list(listed.get("items") or ()), begun
            return self._known
        raise TrustBundlesError("the API server serves no ClusterTrustBundles")

    async def close(self) -> None:
        """End what is being read."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})


def _certificates(bundles: Sequence[KubeObject]) -> str:
    """Each certificate once, in a stable order, without what stands between them."""
    found = {
        der for bundle in bundles for der in certificates(str((bundle.get("spec") or {}).get("trustBundle") or ""))
    }
    return "".join(encoded(der) for der in sorted(found))


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A ``metav1.LabelSelector``."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(each, labels) for each in selector.get("matchExpressions") or ())


def _holds(requirement: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, values = requirement.get("key", ""), requirement.get("values") or ()
    match requirement.get("operator"):
        case "In":
            return key in labels and labels[key] in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    return False
