"""What probes and lifecycle hooks do: run a command, get a URL, open a TCP connection.

A pod that has its own network is asked at its address. One that shares the machine's network has the node's
address: there a network handler without an explicit ``host`` would reach whatever process of the machine happens to
listen on that port, and report its health as the container's. So it fails, and says why; with ``host`` it does what it
says.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from wasilet_common import pod_fields
from wasilet_common.pod_fields import Container, Pod
from yarl import URL

from wasilet_node.network.attachment import MachineNetwork, Networks
from wasilet_node.runtime.protocol import Runtime, UnknownContainerError

MAX_BODY_BYTES = 10 * 1024
_MAX_REDIRECTS = 10
_NOT_STARTED = 126
_USER_AGENT = "kube-probe/1.34"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a handler found."""

    ok: bool
    output: str = ""
    warning: bool = False
    """It passed, with a remark that is worth an event (kubelet's ProbeWarning)."""


class HandlerError(Exception):
    """The handler could not be carried out at all, so nothing is known of the container."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How a pod is reached."""

    address: str = ""
    """Its own; empty: it has none."""

    networks: Networks = field(default_factory=MachineNetwork)
    unknown: bool = False
    """It has a network, of which the agent, which has just started, does not know yet."""

    @staticmethod
    def of(networks: Networks, pod: Pod) -> Reach:
        """The pod as it is now."""
        own = networks.addresses(pod)
        unknown = own is None and not networks.shares_machine(pod)
        return Reach(address=own[0] if own else "", networks=networks, unknown=unknown)

    def host(self, action: dict[str, Any]) -> str:
        """Whom a handler asks; empty: no one. Raises HandlerError when it is not known yet."""
        if self.unknown and not action.get("host"):
            raise HandlerError("the pod's network is not known yet")
        return str(action.get("host") or self.address)


def no_network(kind: str) -> str:
    """Why a network handler without a host cannot work."""
    return (
        f"the pod has no network of its own, so there is nothing to reach at its address: give {kind} a host, "
        "or use exec"
    )


async def run_command(
    runtime: Runtime, container_id: str, command: Sequence[str], *, timeout_seconds: float
) -> Outcome:
    """Run a fresh instance of the module with ``command``. Raises HandlerError when it could not be run."""
    try:
        result = await runtime.exec(
            container_id, command, timeout_seconds=timeout_seconds, max_output_bytes=MAX_BODY_BYTES
        )
    except UnknownContainerError as error:
        raise HandlerError(str(error)) from error
    output = result.output.decode(errors="replace")
    if result.timed_out:
        return Outcome(ok=False, output=f"command timed out: {_go_list(command)} timed out after {timeout_seconds:g}s")
    if result.error and result.exit_code == _NOT_STARTED:
        raise HandlerError(result.error)
    return Outcome(ok=result.exit_code == 0, output=": ".join(part for part in (output, result.error) if part))


def _go_list(words: Sequence[str]) -> str:
    quoted = " ".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' for word in words)
    return f"[{quoted}]"


async def http_get(
    action: dict[str, Any], container: Container, *, timeout_seconds: float, reach: Reach | None = None
) -> Outcome:
    """GET as kubelet's HTTP probe: no certificate check, no proxy, redirects only within the same host name."""
    host = (reach or Reach()).host(action)
    if not host:
        return Outcome(ok=False, output=no_network("httpGet"))
    try:
        port = pod_fields.resolve_port(action["port"], container)
    except ValueError as error:
        raise HandlerError(str(error)) from error
    scheme = str(action.get("scheme") or "HTTP").lower()
    path = str(action.get("path") or "/")
    authority = f"[{host}]" if ":" in host else host
    url = f"{scheme}://{authority}:{port}{path if path.startswith('/') else '/' + path}"
    headers = [(str(h["name"]), str(h.get("value", ""))) for h in action.get("httpHeaders") or ()]
    given = {header.lower() for header, _ in headers}
    if "user-agent" not in given:
        headers.append(("User-Agent", _USER_AGENT))
    if "accept" not in given:
        headers.append(("Accept", "*/*"))
    try:
        async with asyncio.timeout(timeout_seconds):
            return await _get(url, headers, _networks(action, reach))
    except TimeoutError:
        return Outcome(
            ok=False, output=f'Get "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
        )
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return Outcome(ok=False, output=f'Get "{url}": {_dial_problem(error, host, port)}')


def _dial_problem(error: Exception, host: str, port: int) -> str:
    """A failed connection as Go words it, which is what people search for; anything else by its own text."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, socket.gaierror):
        return f"dial tcp: lookup {host}: no such host"
    if isinstance(cause, OSError) and cause.errno:
        return f"dial tcp {host}:{port}: connect: {os.strerror(cause.errno).lower()}"
    return str(error)


def _networks(action: dict[str, Any], reach: Reach | None) -> Networks:
    """A host that the manifest names is looked for from the machine, unless it is the pod itself."""
    if reach is None or (action.get("host") and action["host"] != reach.address):
        return MachineNetwork()
    return reach.networks


async def _get(url: str, headers: Sequence[tuple[str, str]], networks: Networks) -> Outcome:
    # Without the machine's authorities, which would be read from the disk for each probe and trusted in none.
    insecure = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    insecure.check_hostname = False
    insecure.verify_mode = ssl.CERT_NONE
    connector = aiohttp.TCPConnector(
        force_close=True,
        ssl=insecure,
        limit=1,
        socket_factory=lambda info: networks.make_socket(info[0], info[1], info[2]),
    )
    async with aiohttp.ClientSession(
        connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        origin = urlsplit(url).hostname
        for _ in range(_MAX_REDIRECTS):
            async with session.get(
                url, headers=headers, allow_redirects=False, skip_auto_headers=("Accept-Encoding",)
            ) as response:
                body = (await response.content.read(MAX_BODY_BYTES)).decode(errors="replace")
                if response.status >= 400 or response.status < 200:
                    # The body is not shown: it may hold what only the probed service should say.
                    return Outcome(ok=False, output=f"HTTP probe failed with statuscode: {response.status}")
                if response.status < 300:
                    return Outcome(ok=True, output=body)
                location = response.headers.get("Location")
                if not location:
                    return Outcome(ok=False, output=f'Get "{url}": {response.status} response missing Location header')
                target = str(response.url.join(URL(location)))
            if urlsplit(target).hostname != origin:
                return Outcome(ok=True, warning=True, output=f"Probe terminated redirects, Response body: {body}")
            url = target
    return Outcome(ok=False, output=f'Get "{url}": stopped after 10 redirects')


async def tcp_connect(
    action: dict[str, Any], container: Container, *, timeout_seconds: float, reach: Reach | None = None
) -> Outcome:
    """Open a TCP connection and close it."""
    host = (reach or Reach()).host(action)
    if not host:
        return Outcome(ok=False, output=no_network("tcpSocket"))
    try:
        port = pod_fields.resolve_port(action["port"], container)
    except ValueError as error:
        raise HandlerError(str(error)) from error
    try:
        async with asyncio.timeout(timeout_seconds):
            _, writer = await _networks(action, reach).connect(host, port)
    except TimeoutError:
        return Outcome(ok=False, output=f"dial tcp {host}:{port}: i/o timeout")
    except (OSError, ValueError) as error:
        return Outcome(ok=False, output=_dial_problem(error, host, port))
    writer.close()
    return Outcome(ok=True)
