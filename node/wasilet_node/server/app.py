"""The kubelet API: routes, the guard in front of all of them, and the server that listens.

Every request passes the guard first, also one for a path that does not exist: unauthenticated clients learn nothing but
``401``. The server runs from the start of the agent and listens once it has an address and a serving certificate, so
pods run while the node's first certificate request still waits for approval. Routes and answers are those of
pkg/kubelet/server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry

from wasilet_node.kube.base import Kube
from wasilet_node.network.attachment import MachineNetwork, Networks
from wasilet_node.runtime.protocol import RuntimeUnavailableError
from wasilet_node.server.auth import AuthenticationError, Authenticator, AuthorizationError, Authorizer, User
from wasilet_node.server.health import HealthViews
from wasilet_node.server.logs import LogViews
from wasilet_node.server.logwatch import LogWatcher
from wasilet_node.server.metrics import MetricsViews, ProbeMetrics
from wasilet_node.server.pods import PodSource, PodViews
from wasilet_node.server.stats import SummaryView, UsageReader
from wasilet_node.server.streams.limits import StreamLimits
from wasilet_node.server.streams.portforward import PortForwardView
from wasilet_node.server.streams.remotecommand import RemoteCommandViews, StreamRuntime
from wasilet_node.server.streams.turns import Turns
from wasilet_node.server.streams.upgrade import ACCEPTED_HEADER, LIMITS, TURNS
from wasilet_node.server.tls import Acceptor, ServerError, bind, listen, server_context
from wasilet_node.settings import NodeSettings

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
MAX_REQUEST_LINE_BYTES = 64 * 1024
"""``exec`` carries its argv in the query."""

MAX_HEADER_BYTES = 32 * 1024
IDLE_TIMEOUT_SECONDS = 60.0
"""Of a connection without a request in progress, a half-sent one included."""

SHUTDOWN_TIMEOUT_SECONDS = 0.5
"""Twice this is given to requests in progress; those who follow logs would never end by themselves."""

REBIND_SECONDS = 5.0
SERVER = "kubelet"
"""The header of that name."""

_KEPT_HEADERS = frozenset({"Allow", "Retry-After", ACCEPTED_HEADER})

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
USER: web.RequestKey[User] = web.RequestKey("user", User)


class KubeletServer:
    """The HTTPS server of the node.

    ``address`` (an IP) and the certificate may come later, by ``set_address`` and ``set_certificate``. ``healthy``
    says what is wrong with the agent's main loop, or None. All ``set_*`` methods may be called at any time and take
    effect for new connections; a change of address closes the old socket, never a connection.
    """

    def __init__(
        self,
        *,
        settings: NodeSettings,
        kube: Kube,
        pods: PodSource,
        runtime: StreamRuntime,
        log_root: Path,
        client_ca_pem: bytes | None = None,
        address: str | None = None,
        healthy: Callable[[], str | None] = lambda: None,
        max_connections: int = MAX_CONNECTIONS,
        networks: Networks | None = None,
    ) -> None:
        self._port = settings.port
        self._max_connections = max_connections
        self._address = settings.bind_address or address
        self._fixed_address = settings.bind_address is not None
        self._client_ca_pem = client_ca_pem
        self._certificate: tuple[bytes, bytes] | None = None
        self._context: ssl.SSLContext | None = None
        self._changed = asyncio.Event()
        self._bound: tuple[str, int] | None = None
        self._proven: set[web.RequestHandler] = set()
        self._busy: set[web.RequestHandler] = set()
        self._listening = asyncio.Event()
        self._authenticator = Authenticator(kube)
        self._authorizer = Authorizer(kube, node_name=settings.node_name)
        self._watcher = LogWatcher()
        self._runner: web.AppRunner | None = None
        usage = UsageReader(pods=pods, runtime=runtime, data=settings.paths.data)
        self._metrics = MetricsViews(settings=settings, pods=pods, runtime=runtime, usage=usage)
        self._app = self._routes(
            PodViews(pods=pods, runtime=runtime),
            LogViews(pods=pods, log_root=log_root, watcher=self._watcher),
            HealthViews(settings=settings, healthy=healthy),
            SummaryView(settings=settings, usage=usage, log_root=log_root),
        )
        forward = PortForwardView(pods=pods, networks=networks or MachineNetwork())
        self._add_streams(RemoteCommandViews(pods=pods, runtime=runtime), forward)

    def set_certificate(self, certificate_pem: bytes, key_pem: bytes) -> None:
        """Serve with this certificate from now on. Raises ServerError, and keeps the old one, if it cannot be used."""
        context = server_context(certificate_pem=certificate_pem, key_pem=key_pem, client_ca_pem=self._client_ca_pem)
        self._certificate, self._context = (certificate_pem, key_pem), context
        self._metrics.set_certificate(certificate_pem)
        self._changed.set()

    def set_client_ca(self, pem: bytes | None) -> None:
        """Trust client certificates of this CA, and no longer those of the one before; None: bearer tokens only.

        Idle connections are closed and busy ones end with their request, for they were verified by the former CA.
        """
        if pem == self._client_ca_pem:
            return
        if self._certificate is not None:
            certificate_pem, key_pem = self._certificate
            self._context = server_context(certificate_pem=certificate_pem, key_pem=key_pem, client_ca_pem=pem)
        self._client_ca_pem = pem
        for connection in self._connections():
            if connection in self._busy:
                connection.close()
            else:
                connection.force_close()

    def set_address(self, address: str) -> None:
        """Listen on this IP address instead, unless the settings name one to bind to."""
        if not self._fixed_address and address != self._address:
            self._address = address
            self._changed.set()

    @property
    def probes(self) -> ProbeMetrics:
        """Where the pod workers report each probe, for ``/metrics/probes``."""
        return self._metrics.probes

    @property
    def registry(self) -> CollectorRegistry:
        """Where the agent registers metrics of its own, for ``/metrics``."""
        return self._metrics.registry

    @property
    def port(self) -> int | None:
        """The port it listens on; None: not yet."""
        return self._bound[1] if self._bound is not None and self._listening.is_set() else None

    async def wait_listening(self) -> None:
        """Until it listens for the first time."""
        await self._listening.wait()

    async def run(self) -> None:
        """Serve until cancelled. Raises ServerError when the port cannot be had at the start."""
        if self._client_ca_pem is None:
            logger.warning("no client CA is known: the kubelet API accepts bearer tokens only")
        self._runner = web.AppRunner(
            self._app,
            handle_signals=False,
            access_log=None,
            logger=_HttpLogger(__name__),
            handler_cancellation=True,
            keepalive_timeout=IDLE_TIMEOUT_SECONDS,
            shutdown_timeout=SHUTDOWN_TIMEOUT_SECONDS,
            max_line_size=MAX_REQUEST_LINE_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )
        await self._runner.setup()
        try:
            await self._serve(self._runner)
        finally:
            self._listening.clear()
            await self._runner.cleanup()
            self._watcher.close()
            await self._authenticator.close()
            await self._authorizer.close()

    async def _serve(self, runner: web.AppRunner) -> None:
        factory = runner.server
        if factory is None:
            raise ServerError("the HTTP server was not set up")
        acceptor = Acceptor(
            protocol_factory=lambda: _quiet(factory()),
            context=self._current_context,
            established=lambda: len(self._connections()),
            make_room=self._make_room,
            max_connections=self._max_connections,
        )
        listener: socket.socket | None = None
        accepting: asyncio.Task[None] | None = None
        address: str | None = None
        try:
            while True:
                self._changed.clear()
                if self._address is not None and self._address != address:
                    try:
                        successor = bind(self._address, self._port)
                    except ServerError as error:
                        if address is None:
                            raise
                        logger.warning("%s; trying again", error)
                        await asyncio.sleep(REBIND_SECONDS)
                        continue
                    await _stop(accepting, listener)
                    listener, accepting, address = successor, None, self._address
                if listener is not None and accepting is None and self._context is not None:
                    listen(listener)
                    accepting = asyncio.create_task(acceptor.run(listener))
                    self._bound = listener.getsockname()[:2]
                    self._listening.set()
                    logger.info("serving the kubelet API on %s port %d", *self._bound)
                await self._wait_for_change(accepting)
        finally:
            await _stop(accepting, listener)

    async def _wait_for_change(self, accepting: asyncio.Task[None] | None) -> None:
        changed = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait(
                {changed} | ({accepting} if accepting is not None else set()), return_when="FIRST_COMPLETED"
            )
        finally:
            changed.cancel()
        if accepting is not None and accepting.done():
            accepting.result()

    def _current_context(self) -> ssl.SSLContext:
        if self._context is None:
            raise ServerError("there is no serving certificate")
        return self._context

    def _connections(self) -> list[web.RequestHandler]:
        server = self._runner.server if self._runner is not None else None
        return server.connections if server is not None else []

    def _make_room(self) -> bool:
        """Close the oldest connection that never passed the guard, an idle one if there is one."""
        unproven = [connection for connection in self._connections() if connection not in self._proven]
        for connection in sorted(unproven, key=self._busy.__contains__)[:1]:
            connection.force_close()
        return bool(unproven)

    def _prove(self, connection: web.RequestHandler) -> None:
        self._proven.add(connection)
        if len(self._proven) > 2 * len(self._connections()) + 64:
            self._proven.intersection_update(self._connections())

    def _routes(self, pods: PodViews, logs: LogViews, health: HealthViews, stats: SummaryView) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=64 * 1024)
        app[TURNS] = Turns()
        app[LIMITS] = StreamLimits()
        app.on_response_prepare.append(_unnamed)
        for path, handler in (
            ("/healthz", health.healthz),
            ("/healthz/{check}", health.check),
            ("/configz", health.configz),
            ("/pods", pods.list),
            ("/pods/", pods.list),
            ("/runningpods", pods.running),
            ("/runningpods/", pods.running),
            ("/stats/summary", stats.summary),
            ("/metrics", self._metrics.kubelet),
            ("/metrics/resource", self._metrics.resource),
            ("/metrics/probes", self._metrics.prober),
            ("/metrics/cadvisor", self._metrics.cadvisor),
            ("/containerLogs/{namespace}/{pod}/{container}", logs.container_logs),
        ):
            app.router.add_get(path, handler, allow_head=False)
        for path, message in (
            ("/logs/{path:.*}", "logs endpoint is disabled."),
            ("/debug/pprof/{path:.*}", "profiling endpoint is disabled."),
            ("/debug/flags/v", "flags endpoint is disabled."),
        ):
            app.router.add_route("*", path, _disabled(message))
        return app

    def _add_streams(self, commands: RemoteCommandViews, forward: PortForwardView) -> None:
        for path, handler in (
            ("/exec/{namespace}/{pod}/{container}", commands.exec),
            ("/exec/{namespace}/{pod}/{uid}/{container}", commands.exec),
            ("/attach/{namespace}/{pod}/{container}", commands.attach),
            ("/attach/{namespace}/{pod}/{uid}/{container}", commands.attach),
            ("/portForward/{namespace}/{pod}", forward.port_forward),
            ("/portForward/{namespace}/{pod}/{uid}", forward.port_forward),
        ):
            self._app.router.add_get(path, handler, allow_head=False)
            self._app.router.add_post(path, handler)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.monotonic()
        response: web.StreamResponse | None = None
        connection = request.protocol
        self._busy.add(connection)
        labels = self._metrics.http.labels(request.method, request.path)
        self._metrics.http.requests.labels(*labels).inc()
        self._metrics.http.inflight.labels(*labels).inc()
        try:
            response = await self._admit(request) or await self._answer(request, handler)
            return response
        finally:
            self._busy.discard(connection)
            self._metrics.http.inflight.labels(*labels).dec()
            self._metrics.http.duration.labels(*labels).observe(time.monotonic() - started)
            logger.debug(
                "%s %s %s from %s: %s in %.1f ms",
                request.method,
                request.rel_url.raw_path,
                request[USER].name if USER in request else "-",
                request.remote,
                response.status if response is not None else "gone",
                (time.monotonic() - started) * 1000,
            )

    async def _admit(self, request: web.Request) -> web.Response | None:
        """None when the caller may pass, else the refusal."""
        transport = request.transport
        try:
            user = await self._authenticator.authenticate(
                tls=transport.get_extra_info("ssl_object") if transport is not None else None,
                authorization=request.headers.get("Authorization", ""),
                websocket_protocols=request.headers.get("Sec-WebSocket-Protocol", ""),
            )
        except AuthenticationError as error:
            logger.warning("cannot authenticate a caller of the kubelet API: %s", error)
            user = None
        if user is None:
            return web.Response(status=401, text="Unauthorized")
        request[USER] = user
        try:
            decision = await self._authorizer.authorize(user, method=request.method, path=_authorized_path(request))
        except AuthorizationError as error:
            logger.warning("%s: %s", error, error.__cause__)
            return web.Response(status=500, text=str(error))
        if not decision.allowed:
            return web.Response(status=403, text=decision.message())
        self._prove(request.protocol)
        return None

    @staticmethod
    async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            kept = [(key, value) for key, value in error.headers.items() if key in _KEPT_HEADERS]
            text = error.text or ""
            if text == f"{error.status}: {error.reason}" and error.status == 404:
                text = "404 page not found\n"
            answer = web.Response(status=error.status, text=text, headers=kept)
        except RuntimeUnavailableError:
            logger.warning("the container runtime does not answer: %s cannot be served", request.rel_url.raw_path)
            answer = web.Response(status=500, text="the container runtime does not answer")
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s %s failed", request.method, request.rel_url.raw_path)
            answer = web.Response(status=500, text="Internal Server Error")
        if request.writer.output_size > 0:
            # A second answer would be read as a part of the one that has begun; a cut connection is an error to all.
            raise ConnectionAbortedError("the answer broke off")
        return answer


class _QuietHandler(web.RequestHandler):
    """Answers what is no HTTP with a status alone: the parser's text quotes what came in and names the library."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """As aiohttp's, without its text."""
        answer = super().handle_error(request, status, exc, message)
        if isinstance(answer, web.Response):
            answer.text = f"{status} {HTTPStatus(status).phrase}\n"
        answer.headers["Server"] = SERVER
        return answer


def _quiet(handler: web.RequestHandler) -> web.RequestHandler:
    # aiohttp's server makes its handlers itself; the class adds no field, so one can become the other.
    handler.__class__ = _QuietHandler
    return handler


async def _unnamed(_: web.Request, response: web.StreamResponse) -> None:
    """Unauthenticated clients need not know which server of which version this is."""
    response.headers["Server"] = SERVER


class _HttpLogger(logging.Logger):
    """The HTTP parser's complaints: at debug and without its text, which quotes clients' headers, tokens too."""

    def exception(self, msg: object, *args: object, exc_info: Any = True, **_: Any) -> None:
        """A request that cannot be parsed, a client that left (``kubectl logs | head``), or a fault of the HTTP server
        itself, which is reported in full."""
        if isinstance(exc_info, HttpProcessingError):
            logger.debug("a client sent what is no HTTP: %s", type(exc_info).__name__)
        elif isinstance(exc_info, ConnectionError):
            logger.debug("a connection ended before its answer did: %s", type(exc_info).__name__)
        else:
            logger.error(msg, *args, exc_info=exc_info)

    def debug(self, msg: object, *args: object, **_: Any) -> None:
        """Nothing of interest."""


def _authorized_path(request: web.Request) -> str:
    """The path that decides the subresource: that of the route taken, so that no spelling of a path can pass for
    another."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else request.path


def _disabled(message: str) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=405, text=message)

    return answer


async def _stop(accepting: asyncio.Task[None] | None, listener: socket.socket | None) -> None:
    if accepting is not None:
        accepting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await accepting
    if listener is not None:
        listener.close()
