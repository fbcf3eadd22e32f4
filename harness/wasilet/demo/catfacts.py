"""A cat facts API on loopback, for the tutorial's app where the internet is absent: ``python -P -m
wasilet.demo.catfacts``.

It answers ``GET /fact`` as the public one does, ``{"fact": ..., "length": ...}``, with one fact after another.
"""

from __future__ import annotations

import argparse
import http
import http.server
import itertools
import json
import signal
import threading
from collections.abc import Iterator

FACTS = (
    "A cat's nose print is as individual as a human fingerprint.",
    "A group of kittens is called a kindle, and one of grown cats a clowder.",
    "Cats spend around two thirds of their lives asleep.",
    "A cat can rotate each ear by 180 degrees; more than 20 muscles turn it.",
    "Isaac Newton is said to have cut a flap into his door for his cat, long before Kubernetes had ingress.",
    "Cats cannot taste sweetness: they lack the receptor for it.",
    "A cat lands on its feet because it turns the front of its body first, then the back.",
    "The hearing of cats reaches up to about 64 kHz, three times as high as that of people.",
)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server_version = "cat-facts"
    timeout = 10
    server: Server

    def do_GET(self) -> None:
        """``/fact`` and ``/healthz``; anything else is 404."""
        if self.path.partition("?")[0] == "/fact":
            fact = self.server.next_fact()
            self._answer(http.HTTPStatus.OK, {"fact": fact, "length": len(fact)})
        elif self.path == "/healthz":
            self._answer(http.HTTPStatus.OK, {})
        else:
            self._answer(http.HTTPStatus.NOT_FOUND, {"message": "Not Found", "code": 404})

    def _answer(self, status: http.HTTPStatus, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name)
        """Silent: no one reads it, and it would grow for ever."""


class Server(http.server.ThreadingHTTPServer):
    """Loopback only."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self._facts: Iterator[str] = itertools.cycle(FACTS)
        self._lock = threading.Lock()

    def next_fact(self) -> str:
        """The next one, round and round."""
        with self._lock:
            return next(self._facts)


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="wasilet.demo.catfacts", description="A cat facts API on loopback.")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args(argv)
    with Server(arguments.port) as server:
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        server.serve_forever(poll_interval=0.5)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
