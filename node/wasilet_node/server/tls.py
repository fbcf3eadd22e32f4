"""TLS contexts made from PEM in memory, and the loop that accepts connections.

Connections are accepted here, one by one, rather than by asyncio's own server, because then each connection is given
the context of that moment: a renewed certificate or another client CA is a new context for the next connection, with
or without SNI, and going from no client CA to one changes whether a certificate is requested at all (an SNI callback
cannot change that: OpenSSL takes the verify mode from the first context). It is also where connections are counted,
those in their handshake included, which a limit inside the HTTP server would not see.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_SECONDS = 10.0
SHUTDOWN_TIMEOUT_SECONDS = 5.0
LISTEN_BACKLOG = 512
ACCEPT_RETRY_SECONDS = 0.5
KEEPALIVE = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 15),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 15),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 9),
)
"""As Go's listeners have it. Who follows the log of a silent container and vanishes (a cut network, a machine that is
switched off) would hold a connection for over two hours with the kernel's own numbers. No TCP_USER_TIMEOUT: it would
also end those who pause their pager."""


class ServerError(Exception):
    """The kubelet API cannot be served; the message says what to do about it."""


def server_context(*, certificate_pem: bytes, key_pem: bytes, client_ca_pem: bytes | None) -> ssl.SSLContext:
    """TLS 1.2 or newer, HTTP/1.1, client certificates requested when a client CA is known, but never required.

    There is no session resumption: a resumed session would carry a client certificate past a change of the client CA.
    Raises ServerError for a pair that does not match or cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    try:
        _load_pair(context, certificate_pem, key_pem)
    except (ssl.SSLError, OSError) as error:
        raise ServerError(f"the serving certificate and its key cannot be used: {error}") from error
    if client_ca_pem is not None:
        try:
            context.load_verify_locations(cadata=client_ca_pem.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ServerError(f"the client CA cannot be used: {error}") from error
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def bind(address: str, port: int) -> socket.socket:
    """A socket bound to one address, not yet listening: a port that is taken is known before a certificate is there.

    Raises ServerError with the cause.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise _bind_error(address, port, error) from error
    return listener


def listen(listener: socket.socket) -> None:
    """Let connections in. Raises ServerError when another process took the port in between."""
    try:
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        address, port = listener.getsockname()[:2]
        raise _bind_error(address, port, error) from error


def _bind_error(address: str, port: int, error: OSError) -> ServerError:
    hint = (
        "; another kubelet or node may hold it: choose another with --port" if error.errno == errno.EADDRINUSE else ""
    )
    return ServerError(f"cannot serve the kubelet API on {address} port {port}: {error.strerror}{hint}")


class Acceptor:
    """Accepts connections until it is cancelled, at most ``max_connections`` at a time.

    ``established`` counts connections past their handshake; ``make_room`` is asked to close one of them (an idle one
    that never proved who it is) and says whether it did. Without room a new connection is closed at once.
    """

    def __init__(
        self,
        *,
        protocol_factory: Callable[[], asyncio.Protocol],
        context: Callable[[], ssl.SSLContext],
        established: Callable[[], int],
        make_room: Callable[[], bool],
        max_connections: int,
    ) -> None:
        self._protocol_factory = protocol_factory
        self._context = context
        self._established = established
        self._make_room = make_room
        self._max_connections = max_connections
        self._handshakes: dict[asyncio.Task[None], None] = {}
        """In the order in which they began."""

    async def run(self, listener: socket.socket) -> None:
        """Accept until cancelled; the socket stays the caller's."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except ConnectionError:
                    continue
                except OSError:
                    logger.warning("cannot accept a connection to the kubelet API", exc_info=True)
                    await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                    continue
                if len(self._handshakes) + self._established() >= self._max_connections and not self._find_room():
                    logger.debug("refused a connection: %d are open", self._max_connections)
                    connection.close()
                    continue
                task = loop.create_task(self._shake_hands(connection))
                self._handshakes[task] = None
                task.add_done_callback(lambda done: self._handshakes.pop(done, None))
        finally:
            for task in self._handshakes:
                task.cancel()
            await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _find_room(self) -> bool:
        """Whether something was closed: the oldest handshake first, since honest ones take milliseconds, and a few
        clients that connect and say nothing would otherwise shut out all others."""
        if self._handshakes:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            return oldest.cancel()
        return self._make_room()

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for option, value in KEEPALIVE:
                connection.setsockopt(*option, value)
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol_factory,
                connection,
                ssl=self._context(),
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_SECONDS,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_SECONDS,
            )
        except (OSError, ssl.SSLError) as error:
            logger.debug("TLS handshake failed: %s", error)
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise


def _load_pair(context: ssl.SSLContext, certificate_pem: bytes, key_pem: bytes) -> None:
    """OpenSSL's file interface is all that Python offers; an anonymous file in memory keeps the key off the disk."""
    with contextlib.ExitStack() as stack:
        paths = []
        for name, pem in (("certificate", certificate_pem), ("key", key_pem)):
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
            stack.callback(os.close, descriptor)
            os.write(descriptor, pem)
            paths.append(f"/proc/self/fd/{descriptor}")
        context.load_cert_chain(paths[0], paths[1], password="")  # an encrypted key is an error, not a question
