"""``/portForward``: connections to a pod's address, many at once.

Where a pod shares the address of its node, forwarding to that address would reach a foreign process of the host under
the pod's name. So the streams are opened as the protocol wants, and each connection is told why there is nothing behind
it. Source: k8s.io/kubelet/pkg/cri/streaming/portforward.
"""

from __future__ import annotations

import asyncio
import os
import struct

from aiohttp import web
from wasilet_common import pod_fields
from wasilet_common.pod_fields import Pod

from wasilet_node.network.attachment import Networks
from wasilet_node.server.pods import PodSource
from wasilet_node.server.streams import frames
from wasilet_node.server.streams.remotecommand import find_pod
from wasilet_node.server.streams.spdy import SpdyConnection, Stream, chunks
from wasilet_node.server.streams.upgrade import (
    LIMITS,
    TURNS,
    Upgraded,
    negotiate,
    take_over,
    tunnel,
    wants_spdy,
    wants_websocket,
    websocket,
)
from wasilet_node.server.streams.websocket import WebSocketConnection

PROTOCOL = "portforward.k8s.io"
TUNNEL_PROTOCOL = "SPDY/3.1+portforward.k8s.io"
CHANNEL_PROTOCOLS = ("v4.channel.k8s.io",)
CONNECTION_SECONDS = 4 * 3600.0
CONNECT_SECONDS = 10.0
READ_BYTES = 64 * 1024
MAX_PORTS = 128
MAX_PAIRS = 256
"""Half open, or waiting for their answer: what a client resets is no longer counted as an open stream."""


class PortForwardView:
    """The handler of the route."""

    def __init__(self, *, pods: PodSource, networks: Networks) -> None:
        self._pods = pods
        self._networks = networks

    async def port_forward(self, request: web.Request) -> web.StreamResponse:
        """``GET|POST /portForward/{namespace}/{pod}[/{uid}]``."""
        pod = find_pod(self._pods, request)
        with request.app[LIMITS].stream(pod_fields.uid(pod)):
            return await self._forward(request, pod)

    async def _forward(self, request: web.Request, pod: Pod) -> web.StreamResponse:
        if wants_websocket(request):
            return await self._websocket(request, pod)
        if not wants_spdy(request):
            raise web.HTTPBadRequest(text="unable to upgrade: missing upgrade headers in request")
        protocol = negotiate(request, (PROTOCOL,))
        answers = _Answers(pod, self._networks)
        async with take_over(request, protocol=protocol, accept=answers.accept) as connection:
            await answers.serve(connection)
        return Upgraded()

    async def _websocket(self, request: web.Request, pod: Pod) -> web.StreamResponse:
        offered = [each.strip() for each in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        tunnelled = TUNNEL_PROTOCOL in offered
        ports = [] if tunnelled else _ports(request)
        async with websocket(request, (TUNNEL_PROTOCOL, *CHANNEL_PROTOCOLS)) as socket:
            if tunnelled:
                answers = _Answers(pod, self._networks)
                async with tunnel(socket, request.app[TURNS], accept=answers.accept) as connection:
                    await answers.serve(connection)
                return Upgraded()
            for index, port in enumerate(ports):
                data, error = bytes([2 * index]), bytes([2 * index + 1])
                for channel in (data, error):
                    await socket.send(channel + struct.pack("<H", port))
            await _Channels(socket, self._networks, pod, ports).serve()
        return Upgraded()


class _Answers:
    """Pairs the data and error streams of each forwarded connection, and serves the pair."""

    def __init__(self, pod: Pod, networks: Networks) -> None:
        self._pod = pod
        self._networks = networks
        self._forwards: set[asyncio.Task[None]] = set()
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
            tasks = (closed, answering, *self._forwards)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self) -> None:
        while True:
            port, data, error = await self._complete.get()
            task = asyncio.create_task(self._forward(port, data, error), name=f"port-forward {port}")
            self._forwards.add(task)
            task.add_done_callback(self._forwards.discard)

    async def _forward(self, port: int, data: Stream, error: Stream) -> None:
        try:
            reader, writer = await connect(self._networks, self._pod, port)
        except ForwardError as problem:
            await error.write(str(problem).encode())
            error.close()
            data.reset(frames.CANCEL)
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_to_client(reader, data))
                group.create_task(_to_pod(data, writer))
        except* OSError as problems:
            await error.write(f"error forwarding port {port}: {problems.exceptions[0]}".encode())
        finally:
            writer.close()
            error.close()
            data.close()


class ForwardError(Exception):
    """There is nothing to forward to; the message is for the client."""


async def connect(networks: Networks, pod: Pod, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a port of a pod. Raises ForwardError."""
    if networks.addresses(pod) is None:
        raise ForwardError(refusal(pod, port))
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await networks.connect_inside(pod, port)
    except TimeoutError:
        why = "the connection timed out"
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else str(error)
    name, uid = pod_fields.name(pod), pod_fields.uid(pod)
    raise ForwardError(
        f"error forwarding port {port} to pod {name}, uid {uid}: failed to connect to localhost:{port} "
        f"inside the pod's network: {why}"
    )


async def _all_of(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _to_client(reader: asyncio.StreamReader, data: Stream) -> None:
    while chunk := await reader.read(READ_BYTES):
        await data.write(chunk)
    data.close()


async def _to_pod(data: Stream, writer: asyncio.StreamWriter) -> None:
    async for chunk in chunks(data):
        writer.write(chunk)
        await writer.drain()
    writer.write_eof()


class _Channels:
    """The plain WebSocket protocol: two numbered channels for each port, one connection each."""

    def __init__(self, socket: WebSocketConnection, networks: Networks, pod: Pod, ports: list[int]) -> None:
        self._socket = socket
        self._networks = networks
        self._pod = pod
        self._ports = ports
        self._writers: dict[int, asyncio.StreamWriter] = {}

    async def serve(self) -> None:
        """Until the client goes away, or nothing is left to forward."""
        forwards = [asyncio.create_task(self._forward(index, port)) for index, port in enumerate(self._ports)]
        receiving = asyncio.create_task(self._receive())
        try:
            async with asyncio.timeout(CONNECTION_SECONDS):
                over = asyncio.create_task(_all_of(forwards))
                await asyncio.wait([receiving, over], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (receiving, *forwards):
                task.cancel()
            await asyncio.gather(receiving, *forwards, return_exceptions=True)

    async def _forward(self, index: int, port: int) -> None:
        try:
            reader, writer = await connect(self._networks, self._pod, port)
        except ForwardError as problem:
            await self._socket.send(bytes([2 * index + 1]) + str(problem).encode())
            return
        self._writers[index] = writer
        try:
            while chunk := await reader.read(READ_BYTES):
                await self._socket.send(bytes([2 * index]) + chunk)
        except OSError as error:
            await self._socket.send(bytes([2 * index + 1]) + f"error forwarding port {port}: {error}".encode())
        finally:
            writer.close()

    async def _receive(self) -> None:
        async for message in self._socket.messages():
            if not message.data:
                continue
            index, is_error = divmod(message.data[0], 2)
            writer = self._writers.get(index)
            if writer is not None and not is_error:
                writer.write(message.data[1:])
                await writer.drain()


def refusal(pod: Pod, port: int) -> str:
    """Why there is nothing to forward to."""
    name, uid = pod_fields.name(pod), pod_fields.uid(pod)
    return (
        f"error forwarding port {port} to pod {name}, uid {uid}: "
        "the pod has no network of its own, and a port of its node may be anybody's"
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
