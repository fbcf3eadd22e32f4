"""Who is calling the kubelet API, and whether they may: delegated to the API server, as kubelet delegates it.

Authentication is by client certificate (the TLS layer has verified it against the cluster's client CA) and by bearer
token through TokenReview, in that order; there is no anonymous user. Authorization is a SubjectAccessReview on
``nodes/<subresource>`` of this node. Sources: pkg/kubelet/server/auth.go, KEP-2862 (fine-grained kubelet API
authorization) and the delegating authenticators of k8s.io/apiserver.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.x509.oid import NameOID
from wasilet_common.singleflight import SingleFlight, TooManyCallsError

from wasilet_node.kube.base import Kube, KubeError
from wasilet_node.server.caches import ExpiringCache

logger = logging.getLogger(__name__)

AUTHENTICATION_TTL_SECONDS = 120.0
ALLOW_TTL_SECONDS = 300.0
DENY_TTL_SECONDS = 30.0
REVIEW_TIMEOUT_SECONDS = 5.0
"""Of one review: a caller gets its 401 or 500 after this time when the API server is away."""

MAX_TOKEN_BYTES = 16 * 1024
MAX_ENTRIES = 4096
MAX_RUNNING_REVIEWS = 16
MAX_WAITING_REVIEWS = 256

_AUTHENTICATED_GROUP = "system:authenticated"
_WEBSOCKET_TOKEN_PREFIX = "base64url.bearer.authorization.k8s.io."  # noqa: S105 - the name of a protocol
_VERBS = {"POST": "create", "GET": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class AuthenticationError(Exception):
    """A caller could not be identified because the API server could not be asked: 401."""


class AuthorizationError(Exception):
    """A caller's rights could not be looked up: 500, with this message."""


@dataclass(frozen=True, kw_only=True)
class User:
    """authentication.k8s.io/v1 UserInfo."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The answer to a request: the kubelet tries several subresources, from the finest to the coarsest."""

    allowed: bool
    user: User
    verb: str
    subresources: tuple[str, ...]

    def message(self) -> str:
        """kubelet's own text of the 403."""
        return (
            f"Forbidden (user={self.user.name}, verb={self.verb}, resource=nodes, "
            f"subresource(s)=[{' '.join(self.subresources)}])\n"
        )


def verb(method: str) -> str:
    """The API verb of an HTTP method; empty for those that have none, which RBAC then grants only by ``*``."""
    return _VERBS.get(method, "")


def subresources(path: str) -> tuple[str, ...]:
    """The subresources of ``nodes`` that grant a path, tried in this order. Source: GetRequestAttributes."""
    fine = {"/pods": "pods", "/healthz": "healthz", "/configz": "configz", "/runningpods/": "pods"}
    coarse = {"/stats/": "stats", "/metrics": "metrics", "/logs/": "log", "/checkpoint/": "checkpoint"}
    first = [name for prefix, name in fine.items() if _is_subpath(path, prefix)][:1]
    last = next((name for prefix, name in coarse.items() if _is_subpath(path, prefix)), "proxy")
    return (*first, last)


def bearer_token(authorization: str, websocket_protocols: str = "") -> str | None:
    """The token of a request: the Authorization header, or the WebSocket subprotocol that browsers must use."""
    parts = authorization.strip(" ").split(" ", 2)
    if len(parts) >= 2 and parts[0].lower() == "bearer" and parts[1]:
        return parts[1]
    for offered in websocket_protocols.split(","):
        protocol = offered.strip()
        if protocol.startswith(_WEBSOCKET_TOKEN_PREFIX):
            encoded = protocol.removeprefix(_WEBSOCKET_TOKEN_PREFIX)
            try:
                token = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode()
            except ValueError:  # no base64, or no UTF-8 inside; letters beyond ASCII are a plain ValueError
                return None
            return token or None
    return None


def certificate_user(der: bytes, *, now: datetime) -> User | None:
    """The user a verified client certificate names: CN and O. None: it names no one, or is no longer valid.

    The handshake verified it once; a connection may live longer than the certificate, so the time is looked at again.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        organizations = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        valid = certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc
    except ValueError:
        logger.debug("a client certificate cannot be parsed", exc_info=True)
        return None
    if not valid or not names or not names[-1].value:
        return None
    return User(
        name=_text(names[-1].value),
        groups=_with_authenticated(tuple(_text(organization.value) for organization in organizations)),
        extra={"authentication.kubernetes.io/credential-id": (f"X509SHA256={hashlib.sha256(der).hexdigest()}",)},
    )


class Authenticator:
    """Finds the user of a request. Tokens are kept only as a keyed hash, whose key dies with the process."""

    def __init__(self, kube: Kube, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._kube = kube
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._known: ExpiringCache[bytes, User] = ExpiringCache(max_entries=MAX_ENTRIES)
        self._rejected: ExpiringCache[bytes, bool] = ExpiringCache(max_entries=MAX_ENTRIES)
        self._flights: SingleFlight[bytes, User | None] = SingleFlight(
            max_running=MAX_RUNNING_REVIEWS, max_waiting=MAX_WAITING_REVIEWS, finish=True
        )

    async def authenticate(
        self, *, tls: ssl.SSLObject | None, authorization: str, websocket_protocols: str = ""
    ) -> User | None:
        """The user, or None: 401. Raises AuthenticationError when the API server could not be asked."""
        der = tls.getpeercert(binary_form=True) if tls is not None else None
        if der is not None and (user := certificate_user(der, now=self._clock())) is not None:
            return user
        token = bearer_token(authorization, websocket_protocols)
        if token is None or len(token) > MAX_TOKEN_BYTES or not token.isascii():
            return None
        return await self._review(token)

    async def close(self) -> None:
        """Cancel reviews in flight."""
        await self._flights.close()

    async def _review(self, token: str) -> User | None:
        digest = hmac.digest(self._key, token.encode(), "sha256")
        if (user := self._known.get(digest)) is not None:
            return user
        if self._rejected.get(digest):
            return None

        async def ask() -> User | None:
            review = await self._kube.create(
                "/apis/authentication.k8s.io/v1/tokenreviews",
                {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}},
                timeout_seconds=REVIEW_TIMEOUT_SECONDS,
            )
            found = _reviewed_user(review.get("status") or {})
            if found is None:
                self._rejected.put(digest, value=True, ttl_seconds=AUTHENTICATION_TTL_SECONDS)
            else:
                self._known.put(digest, found, ttl_seconds=AUTHENTICATION_TTL_SECONDS)
            return found

        try:
            return await self._flights.do(digest, ask)
        except (KubeError, TooManyCallsError) as error:
            raise AuthenticationError(f"token review: {error or type(error).__name__}") from error


class Authorizer:
    """Asks whether a user may act on a subresource of this node."""

    def __init__(self, kube: Kube, *, node_name: str) -> None:
        self._kube = kube
        self._node_name = node_name
        self._decisions: ExpiringCache[bytes, bool] = ExpiringCache(max_entries=MAX_ENTRIES)
        self._flights: SingleFlight[bytes, bool] = SingleFlight(
            max_running=MAX_RUNNING_REVIEWS, max_waiting=MAX_WAITING_REVIEWS, finish=True
        )

    async def authorize(self, user: User, *, method: str, path: str) -> Decision:
        """The decision on the first subresource that allows, or on all of them. Raises AuthorizationError."""
        wanted, asked = verb(method), subresources(path)
        for subresource in asked:
            if await self._allowed(user, wanted, subresource):
                return Decision(allowed=True, user=user, verb=wanted, subresources=asked)
        return Decision(allowed=False, user=user, verb=wanted, subresources=asked)

    async def close(self) -> None:
        """Cancel reviews in flight."""
        await self._flights.close()

    async def _allowed(self, user: User, wanted: str, subresource: str) -> bool:
        spec: dict[str, Any] = {
            "user": user.name,
            "groups": list(user.groups),
            "resourceAttributes": {
                "verb": wanted,
                "version": "v1",
                "resource": "nodes",
                "subresource": subresource,
                "name": self._node_name,
            },
        }
        if user.uid:
            spec["uid"] = user.uid
        if user.extra:
            spec["extra"] = {key: list(values) for key, values in user.extra.items()}
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).digest()
        if (decision := self._decisions.get(digest)) is not None:
            return decision

        async def ask() -> bool:
            review = await self._kube.create(
                "/apis/authorization.k8s.io/v1/subjectaccessreviews",
                {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec},
                timeout_seconds=REVIEW_TIMEOUT_SECONDS,
            )
            status = review.get("status") or {}
            allowed = status.get("allowed") is True and status.get("denied") is not True
            ttl = ALLOW_TTL_SECONDS if allowed else DENY_TTL_SECONDS
            if allowed or not status.get("evaluationError"):
                self._decisions.put(digest, allowed, ttl_seconds=ttl)
            return allowed

        try:
            return await self._flights.do(digest, ask)
        except (KubeError, TooManyCallsError) as error:
            raise AuthorizationError(
                f"Authorization error (user={user.name}, verb={wanted}, resource=nodes, subresource={subresource})"
            ) from error


def _reviewed_user(status: Mapping[str, Any]) -> User | None:
    if status.get("authenticated") is not True:
        return None
    user = status.get("user") or {}
    return User(
        name=str(user.get("username", "")),
        uid=str(user.get("uid", "")),
        groups=_with_authenticated(tuple(map(str, user.get("groups") or ()))),
        extra={str(key): tuple(map(str, values or ())) for key, values in (user.get("extra") or {}).items()},
    )


def _with_authenticated(groups: Sequence[str]) -> tuple[str, ...]:
    return tuple(groups) if _AUTHENTICATED_GROUP in groups else (*groups, _AUTHENTICATED_GROUP)


def _is_subpath(path: str, prefix: str) -> bool:
    prefix = prefix.removesuffix("/")
    return path == prefix or path.startswith(prefix + "/")


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")
