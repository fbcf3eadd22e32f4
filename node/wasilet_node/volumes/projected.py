"""projected volumes: tokens, configMaps, secrets, the downward API and cluster trust bundles in one folder.

Every pod has one of these, for its service account, and waits for it: so the sources are read at the same time. In
memory, as it holds a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from wasilet_node.kube.base import KubeError
from wasilet_node.volumes.atomic import FileProjection, Payload
from wasilet_node.volumes.base import Pod, VolumeError
from wasilet_node.volumes.config_map import ConfigMaps
from wasilet_node.volumes.downward_api import DownwardApi, aggregate
from wasilet_node.volumes.kinds import Shared, Source, default_mode
from wasilet_node.volumes.secret import Secrets

_SOURCES = frozenset(
    {"serviceAccountToken", "configMap", "secret", "downwardAPI", "clusterTrustBundle", "podCertificate"}
)
_OWNER_BITS = 0o700


class Projected:
    """Several sources in one folder; where two give the same path, the later one stays."""

    in_memory = True

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._config_maps = ConfigMaps(shared)
        self._secrets = Secrets(shared)
        self._downward_api = DownwardApi(shared)

    def check(self, source: Source) -> str:
        """Kinds that came later are refused by name."""
        for entry in source.get("sources") or []:
            for kind in entry:
                if kind not in _SOURCES:
                    return f"projected source {kind} is not supported by this node"
        return ""

    async def payload(
        self, pod: Pod, source: Source, *, max_age_seconds: float, published: Callable[[str], bytes | None]
    ) -> Payload:
        """See ``Projecting``."""
        entries = source.get("sources") or []
        results = await asyncio.gather(
            *(self._read(pod, entry, default_mode(source), max_age_seconds, published) for entry in entries),
            return_exceptions=True,
        )
        files: dict[str, FileProjection] = {}
        errors: list[str] = []
        for result in results:
            if isinstance(result, (KubeError, VolumeError)):
                errors.append(str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                files |= result
        if errors:
            raise VolumeError(aggregate(errors))
        return files

    async def _read(
        self,
        pod: Pod,
        entry: Source,
        mode: int,
        max_age_seconds: float,
        published: Callable[[str], bytes | None],
    ) -> dict[str, FileProjection]:
        if one := entry.get("secret"):
            return await self._secrets.read(pod, one, max_age_seconds=max_age_seconds, mode=mode)
        if one := entry.get("configMap"):
            return await self._config_maps.read(pod, one, max_age_seconds=max_age_seconds, mode=mode)
        if one := entry.get("downwardAPI"):
            return self._downward_api.read(pod, one, mode=mode)
        if one := entry.get("serviceAccountToken"):
            token = await self._shared.tokens.token(
                pod,
                audience=str(one.get("audience") or ""),
                expiration_seconds=one.get("expirationSeconds"),
                published=published(one["path"]),
            )
            return {one["path"]: FileProjection(token, mode & _OWNER_BITS)}
        if one := entry.get("podCertificate"):
            return await self._pod_certificate(pod, one, mode)
        if one := entry.get("clusterTrustBundle"):
            return {one["path"]: FileProjection(await self._trust_bundle(one, max_age_seconds), mode)}
        return {}

    async def _pod_certificate(self, pod: Pod, source: Source, mode: int) -> dict[str, FileProjection]:
        found = await self._shared.references.pod_certificates.credentials(pod, source)
        files = {
            "credentialBundlePath": found.key + found.chain,
            "keyPath": found.key,
            "certificateChainPath": found.chain,
        }
        return {str(source[field]): FileProjection(data, mode) for field, data in files.items() if source.get(field)}

    async def _trust_bundle(self, source: Source, max_age_seconds: float) -> bytes:
        bundles = self._shared.references.trust_bundles
        optional = bool(source.get("optional"))
        if name := source.get("name"):
            pem = await bundles.by_name(str(name), optional=optional, max_age_seconds=max_age_seconds)
        elif signer := source.get("signerName"):
            selector = source.get("labelSelector")
            pem = await bundles.by_signer(str(signer), selector, optional=optional, max_age_seconds=max_age_seconds)
        else:
            raise VolumeError("ClusterTrustBundle projection requires either name or signerName to be set")
        return pem.encode()
