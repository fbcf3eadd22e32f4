"""A proxy by which other machines reach a server that listens on loopback: bytes pass, nothing is read or changed.

The API server of a local cluster (``host``, kind, k3d) listens on loopback only, and should. A node on another machine
gets this proxy instead: TLS goes through it end to end, so it needs no key and knows no secret, and who comes through
must still show the API server a credential. ``python -P -m wasilet.cluster.tcp_proxy --listen 192.0.2.1:6443 --to
HOST:PORT``"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import signal
import sys
from collections.abc import Sequence

from wasilet_common.forwarding import Connections, Network, listener

logger = logging.getLogger("wasilet.tcp-proxy")

MAX_CONNECTIONS = 500
"""A node holds about a dozen; the limit keeps a flood from taking the machine's descriptors."""


async def serve(
    listen: tuple[str, int],
    to: tuple[str, int],
    *,
    stop: asyncio.Event,
    freebind: bool = False,
    allowed: Sequence[Network] = (),
) -> None:
    """Forward until ``stop`` is set; ``allowed`` as for :class:`Connections`. Raises OSError when it cannot listen."""
    forwarding = Connections(
        lambda: asyncio.open_connection(*to), name=f"{to[0]}:{to[1]}", allowed=allowed, limit=MAX_CONNECTIONS
    )
    await forwarding.begin(listener(listen, freebind=freebind))
    logger.info("%s:%d leads to %s:%d", *listen, *to)
    try:
        await stop.wait()
    finally:
        await forwarding.close()


def _address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


async def _run(listen: tuple[str, int], to: tuple[str, int], *, freebind: bool, allowed: Sequence[Network]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(listen, to, stop=stop, freebind=freebind, allowed=allowed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="wasilet.cluster.tcp_proxy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--listen", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--freebind", action="store_true", help="the address may come later")
    parser.add_argument(
        "--allow-from", type=ipaddress.ip_network, action="append", default=[], metavar="CIDR",
        help="whose connections are taken; repeatable (default: everybody's)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        asyncio.run(_run(options.listen, options.to, freebind=options.freebind, allowed=options.allow_from))
    except OSError as error:
        logger.error("cannot listen on %s:%d: %s", *options.listen, error)  # noqa: TRY400  (no traceback for that)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
