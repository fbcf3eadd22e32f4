"""Whether a process serves: asked of the process itself, by its health endpoint or by a connection."""

from __future__ import annotations

import http.client
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
PROBE_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Asks ``https://127.0.0.1:<port><path>`` (or http, without ``ca``) and is content with 200."""

    port: int
    path: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    host: str = LOOPBACK

    def __call__(self) -> bool:
        """Whether it answered 200."""
        try:
            if self.ca is None:
                connection = http.client.HTTPConnection(self.host, self.port, timeout=PROBE_TIMEOUT_SECONDS)
            else:
                context = ssl.create_default_context(cafile=str(self.ca))
                if self.certificate is not None:
                    context.load_cert_chain(self.certificate, self.key)
                connection = http.client.HTTPSConnection(
                    self.host, self.port, timeout=PROBE_TIMEOUT_SECONDS, context=context
                )
            try:
                connection.request("GET", self.path)
                return connection.getresponse().status == http.HTTPStatus.OK
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError):
            return False


def accepts(address: str, port: int) -> bool:
    """Whether someone listens there: all that can be asked of what answers no one without a credential."""
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True
