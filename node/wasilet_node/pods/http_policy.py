"""Krustlet's annotations for wasi-experimental-http: which origins a pod's modules may call, and how many at once.

Without the annotation there is no outbound HTTP at all. What cannot be read fails the container with the parser's
message, rather than running it with another policy than its author wrote. So does an origin that leads to the node
itself, to the cluster's API server or to another place that ``wasilet_common.addresses`` refuses, unless the node's
operator allows it, and one that the operator's own rule keeps from the pod's namespace. Names are judged again by the
sandbox, at each resolution.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from wasilet_common import addresses
from wasilet_common.pod_fields import Pod

from wasilet_node.pods import origins, outbound_policy
from wasilet_node.pods.outbound_policy import OutboundPolicyError
from wasilet_node.runtime.protocol import HttpPolicy
from wasilet_node.volumes.base import ContainerConfigError

logger = logging.getLogger(__name__)

ALLOWED_DOMAINS = "alpha.wasi.krustlet.dev/allowed-domains"
MAX_CONCURRENT_REQUESTS = "alpha.wasi.krustlet.dev/max-concurrent-requests"
_MAX_REQUESTS = 2**32 - 1
_MAX_DIGITS = 20
_RESOLVE_AGAIN_SECONDS = 60.0
_RESOLVE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class OutboundRules:
    """The node's side of every pod's policy; the first four fields are those of ``HttpPolicy``."""

    local_origins: tuple[str, ...] = ()
    own_addresses: tuple[str, ...] = ()
    api_servers: tuple[tuple[str, int], ...] = ()
    kubelet_ports: tuple[int, ...] = ()
    by_namespace: outbound_policy.Policy | None = None
    """The operator's rule; None: there is none."""


@dataclass(kw_only=True)
class Outbound:
    """Keeps the rules up to date: addresses come and go while the agent runs."""

    local_origins: tuple[str, ...] = ()
    own_addresses: Callable[[], Sequence[str]] = tuple
    api_server: str = ""
    """The URL by which the node reaches it."""

    kubelet_port: Callable[[], int] = lambda: 0
    policy_file: Path | None = None
    """The operator's rule, see ``outbound_policy``."""

    _resolved: tuple[float, tuple[str, ...]] = field(default=(-1e9, ()), init=False)

    async def policy(self, pod: Pod) -> HttpPolicy | None:
        """``http_policy`` with the rules as of now, which a pod without the annotation does not need."""
        asked = ALLOWED_DOMAINS in (pod["metadata"].get("annotations") or {})
        try:
            return http_policy(pod, await self.rules() if asked else None)
        except OutboundPolicyError as error:
            # Nobody knows what it would allow, so nothing is. Its path is the operator's business, not the pod's.
            logger.error("the rule of outbound HTTP: %s", error)  # noqa: TRY400
            raise ContainerConfigError("the node's rule of outbound HTTP cannot be read; see the node's log") from error

    async def rules(self) -> OutboundRules:
        """As of now. The API server's name is looked up at most once a minute. Raises OutboundPolicyError."""
        parts = urlsplit(self.api_server)
        host, port = parts.hostname or "", parts.port or 443
        hosts = (host, *await self._addresses(host, port)) if host else ()
        return OutboundRules(
            local_origins=self.local_origins,
            own_addresses=tuple(self.own_addresses()),
            api_servers=tuple(dict.fromkeys((name, port) for name in hosts)),
            kubelet_ports=tuple(port for port in (self.kubelet_port(),) if port),
            by_namespace=outbound_policy.read(self.policy_file) if self.policy_file is not None else None,
        )

    async def _addresses(self, host: str, port: int) -> tuple[str, ...]:
        if addresses.literal(host) is not None:
            return ()
        asked_at, known = self._resolved
        if time.monotonic() - asked_at >= _RESOLVE_AGAIN_SECONDS:
            try:
                async with asyncio.timeout(_RESOLVE_SECONDS):
                    found = await asyncio.get_running_loop().getaddrinfo(host, port)
                known = tuple(sorted({str(entry[4][0]) for entry in found}))
            except OSError:  # TimeoutError is one
                pass
            self._resolved = (time.monotonic(), known)
        return known


def http_policy(pod: Pod, rules: OutboundRules | None = None) -> HttpPolicy | None:
    """The pod's policy; None: no outbound HTTP. Raises ContainerConfigError naming the annotation."""
    rules = rules or OutboundRules()
    annotations = pod["metadata"].get("annotations") or {}
    limit = _limit(annotations.get(MAX_CONCURRENT_REQUESTS))
    text = annotations.get(ALLOWED_DOMAINS)
    if text is None:
        return None
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ContainerConfigError(f"annotation {ALLOWED_DOMAINS} is not a JSON array of origins: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise ContainerConfigError(f"annotation {ALLOWED_DOMAINS} is not a JSON array of strings: {text[:200]!r}")
    asked = tuple(_origin(item) for item in listed)
    _judge(asked, rules)
    _judge_by_namespace(asked, str(pod["metadata"].get("namespace") or "default"), rules)
    return HttpPolicy(
        allowed_origins=asked,
        max_concurrent_requests=limit,
        local_origins=rules.local_origins,
        own_addresses=rules.own_addresses,
        api_servers=rules.api_servers,
        kubelet_ports=rules.kubelet_ports,
    )


def _judge(asked: Sequence[str], rules: OutboundRules) -> None:
    guard = addresses.guard(own=rules.own_addresses, endpoints=rules.api_servers, ports=rules.kubelet_ports)
    local = {origins.key(origin) for origin in rules.local_origins}
    for origin in asked:
        scheme, host, port = origins.key(origin)
        refusal = "" if (scheme, host, port) in local else guard.refusal(host, port)
        if refusal:
            raise ContainerConfigError(
                f"annotation {ALLOWED_DOMAINS}: {origin} is refused, since it is {refusal}; "
                f"the node's operator can allow it: --allow-local-origins {origin}"
            )


def _judge_by_namespace(asked: Sequence[str], namespace: str, rules: OutboundRules) -> None:
    for origin in asked:
        if rules.by_namespace is not None and not outbound_policy.allows(
            rules.by_namespace, namespace, origins.key(origin)
        ):
            raise ContainerConfigError(
                f"annotation {ALLOWED_DOMAINS}: {origin} is refused: the node's operator does not let pods of "
                f"namespace {namespace} call it (--outbound-policy)"
            )


def _origin(text: str) -> str:
    try:
        return origins.checked(text)
    except origins.OriginError as error:
        raise ContainerConfigError(f"annotation {ALLOWED_DOMAINS}: {text[:200]!r} {error}") from error


def _limit(text: str | None) -> int | None:
    if text is None:
        return None
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or len(digits) > _MAX_DIGITS or int(digits) > _MAX_REQUESTS:
        raise ContainerConfigError(f"annotation {MAX_CONCURRENT_REQUESTS} is not a whole number: {text[:200]!r}")
    return int(digits)
