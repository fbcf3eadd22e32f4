"""Service account tokens of pods: one a (pod, audience, lifetime), renewed in time.

As kubelet's token manager: a token is renewed after 80 % of its life or after 24 hours, whichever comes first, a little
earlier by chance so that 1,000 pods do not ask at once; a renewal that fails leaves the old token in use while it is
valid. Unlike kubelet, an agent that starts again takes the tokens it finds published in the pods' volumes, so a restart
does not ask for all of them again.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wasilet_common.time_format import seconds_of

from wasilet_node.kube.base import KubeError
from wasilet_node.kube.references import References
from wasilet_node.volumes.base import Pod, VolumeError

logger = logging.getLogger(__name__)

_MAX_AGE_SECONDS = 24 * 3600.0
_JITTER_SECONDS = 10.0
_RENEW_AT = 0.8
_DEFAULT_EXPIRATION_SECONDS = 3600


@dataclass(frozen=True)
class _Key:
    pod_uid: str
    audience: str
    expiration_seconds: int


@dataclass(frozen=True)
class _Token:
    text: str
    issued_at: float
    expires_at: float

    def __repr__(self) -> str:
        return f"_Token(expires_at={self.expires_at})"


def _claims(token: bytes) -> dict[str, Any]:
    """The claims of a JWT that this agent itself was given, unverified; empty when it is none."""
    try:
        payload = token.split(b".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
    except (IndexError, ValueError, binascii.Error):
        return {}
    return claims if isinstance(claims, dict) else {}


class Tokens:
    """One object per node."""

    def __init__(
        self,
        references: References,
        *,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._references = references
        self._clock = clock
        self._jitter = jitter
        self._tokens: dict[_Key, _Token] = {}

    async def token(self, pod: Pod, *, audience: str, expiration_seconds: int | None, published: bytes | None) -> bytes:
        """A token that is valid now. ``published`` is the file's content, if any. Raises VolumeError."""
        metadata, spec = pod["metadata"], pod.get("spec", {})
        key = _Key(metadata["uid"], audience, expiration_seconds or _DEFAULT_EXPIRATION_SECONDS)
        current = self._tokens.get(key) or self._adopted(key, published)
        if current is not None and not self._is_due(current):
            self._tokens[key] = current
            return current.text.encode()
        try:
            status = await self._references.service_account_token(
                metadata["namespace"],
                str(spec.get("serviceAccountName") or "default"),
                pod_name=metadata["name"],
                pod_uid=metadata["uid"],
                audiences=[audience] if audience else [],
                expiration_seconds=key.expiration_seconds,
            )
            fresh = self._received(status, key)
        except (KubeError, KeyError, ValueError) as error:
            if current is None:
                raise VolumeError(f"failed to fetch token: {error}") from error
            if self._clock() >= current.expires_at:
                raise VolumeError(f"token of the pod expired and refresh failed: {error}") from error
            logger.warning(
                "a token of pod %s/%s could not be renewed: %s", metadata["namespace"], metadata["name"], error
            )
            return current.text.encode()
        self._tokens[key] = fresh
        return fresh.text.encode()

    def release(self, pod_uid: str) -> None:
        """Forget the pod's tokens. Idempotent."""
        for key in [key for key in self._tokens if key.pod_uid == pod_uid]:
            del self._tokens[key]

    def _received(self, status: dict[str, Any], key: _Key) -> _Token:
        expires_at = seconds_of(status["expirationTimestamp"])
        # The server may grant another lifetime than was asked for; the token itself says when it was issued.
        issued_at = _claims(status["token"].encode()).get("iat", expires_at - key.expiration_seconds)
        return _Token(status["token"], float(issued_at), expires_at)

    def _adopted(self, key: _Key, published: bytes | None) -> _Token | None:
        claims = _claims(published or b"")
        pod = (claims.get("kubernetes.io") or {}).get("pod") or {}
        issued_at, expires_at = claims.get("iat"), claims.get("exp")
        if pod.get("uid") != key.pod_uid or not isinstance(issued_at, int) or not isinstance(expires_at, int):
            return None
        return _Token((published or b"").decode(), float(issued_at), float(expires_at))

    def _is_due(self, token: _Token) -> bool:
        now = self._clock() + self._jitter() * _JITTER_SECONDS
        renew_at = token.issued_at + _RENEW_AT * (token.expires_at - token.issued_at)
        return now >= renew_at or now >= token.issued_at + _MAX_AGE_SECONDS
