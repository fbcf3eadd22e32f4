"""``/portForward``: an honest answer to ``kubectl port-forward``.

A WASI preview 1 module cannot listen, and a pod here shares the address of its node: forwarding to that address would
reach a foreign process of the host under the pod's name. So the streams are opened as the protocol wants, and each
connection is told why there is nothing behind it. Source: k8s.io/kubelet/pkg/cri/streaming/portforward.
"""

from __future__ import annotations

import asyncio
import struct

from aiohttp import web

from wasilet_node.server.pods import Pod, PodSource, full_name
from wasilet_node.server.streams import frames
from wasilet_node.server.streams.remotecommand import find_pod
from wasilet_node.server.streams.spdy import SpdyConnection, Stream
from wasilet_node.server.streams.upgrade import (
    TURNS,
    Upgraded,
    negotiate,
    take_over,
    tunnel,
    wants_spdy,
    wants_websocket,
    websocket,
)

PROTOCOL = "portforward.k8s.io"
TUNNEL_PROTOCOL = "SPDY/3.1+portforward.k8s.io"
CHANNEL_PROTOCOLS = ("v4.channel.k8s.io",)
CONNECTION_SECONDS = 4 * 3600.0
MAX_PORTS = 128
MAX_PAIRS = 256
"""Half open, or waiting for their answer: what a client resets is no longer counted as an open stream."""


class PortForwardView:
    """The handler of the route."""

    def __init__(self, *, pods: PodSource) -> None:
        self._pods = pods

    async def port_forward(self, request: web.Request) -> web.StreamResponse:
        """``GET|POST /portForward/{namespace}/{pod}[/{uid}]``."""
        pod = find_pod(self._pods, request)
        if wants_websocket(request):
            return await self._websocket(request, pod)
        if not wants_spdy(request):
            raise web.HTTPBadRequest(text="unable to upgrade: missing upgrade headers in request")
        protocol = negotiate(request, (PROTOCOL,))
        answers = _Answers(pod)
        async with take_over(request, protocol=protocol, accept=answers.accept) as connection:
            await answers.serve(connection)
        return Upgraded()

    async def _websocket(self, request: web.Request, pod: Pod) -> web.StreamResponse:
        offered = [each.strip() for each in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        tunnelled = TUNNEL_PROTOCOL in offered
        ports = [] if tunnelled else _ports(request)
        async with websocket(request, (TUNNEL_PROTOCOL, *CHANNEL_PROTOCOLS)) as socket:
            if tunnelled:
                answers = _Answers(pod)
                async with tunnel(socket, request.app[TURNS], accept=answers.accept) as connection:
                    await answers.serve(connection)
                return Upgraded()
            for index, port in enumerate(ports):
                data, error = bytes([2 * index]), bytes([2 * index + 1])
                for channel in (data, error):
                    await socket.send(channel + struct.pack("<H", port))
                await socket.send(error + refusal(pod, port).encode())
        return Upgraded()


class _Answers:
    """Pairs the data and error streams of each forwarded connection, and answers the pair."""

    def __init__(self, pod: Pod) -> None:
        self._pod = pod
        self._pairs: dict[str, dict[str, Stream]] = {}
        self._complete: asyncio.Queue[tuple[int, Stream, Stream]] = asyncio.Queue()

    def accept(self, stream: Stream) -> str | None:
        kind = stream.headers.get("streamtype", "")
        port = stream.headers.get("port", "")
        if kind not in {"data", "error"} or not _is_port(port):
            return "a stream needs a port and a stream type"
        # clients that give no request id open the error stream first, and number by twos
        key = stream.headers.get("requestid") or str(stream.id - (2 if kind == "data" else 0))
        if key not in self._pairs and len(self._pairs) + self._complete.qsize() >= MAX_PAIRS:
            return "too many streams wait for their other half"
        pair = self._pairs.setdefault(key, {})
        if kind in pair:
            return f"{kind} stream already assigned"
        pair[kind] = stream
        if len(pair) == 2:
            del self._pairs[key]
            self._complete.put_nowait((int(port), pair["data"], pair["error"]))
        return None

    async def serve(self, connection: SpdyConnection) -> None:
        """Until the client goes away."""
        closed = asyncio.create_task(connection.closed.wait())
        answering = asyncio.create_task(self._answer())
        try:
            await asyncio.wait({closed, answering}, return_when=asyncio.FIRST_COMPLETED, timeout=CONNECTION_SECONDS)
        finally:
            for task in (closed, answering):
                task.cancel()
            await asyncio.gather(closed, answering, return_exceptions=True)

    async def _answer(self) -> None:
        while True:
            port, data, error = await self._complete.get()
            await error.write(refusal(self._pod, port).encode())
            error.close()
            data.reset(frames.CANCEL)


def refusal(pod: Pod, port: int) -> str:
    """Why there is nothing to forward to."""
    _, name, uid = full_name(pod)
    return (
        f"error forwarding port {port} to pod {name}, uid {uid}: "
        "a WebAssembly module (WASI preview 1) cannot listen on a port, so there is nothing to forward to"
    )


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65536


def _ports(request: web.Request) -> list[int]:
    ports = []
    for text in (part for value in request.query.getall("port", []) for part in value.split(",")):
        if not _is_port(text):
            raise web.HTTPBadRequest(text=f'unable to parse "{text}" as a port')
        ports.append(int(text))
    if not ports:
        raise web.HTTPBadRequest(text='query parameter "port" is required')
    if len(ports) > MAX_PORTS:
        raise web.HTTPBadRequest(text=f"more than {MAX_PORTS} ports")
    return ports
