"""A real registry (CNCF distribution) for tests: on loopback, its storage in a folder, with a login when asked for."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from wasilet.controlplane.acquire import acquire
from wasilet.controlplane.htpasswd import entry
from wasilet.settings import cache_root

START_TIMEOUT_SECONDS = 20.0
USER, PASSWORD = "cat", "purr purr"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_registry(folder: Path, *, login: bool = False) -> Iterator[str]:
    """``host:port`` of a registry that runs as long as the block does."""
    binary = acquire(["registry"], cache=cache_root(), environ=os.environ, progress=lambda _: None)["registry"].path
    port = free_port()
    config = [
        "version: 0.1",
        "log: {level: error, accesslog: {disabled: true}}",
        f"storage: {{filesystem: {{rootdirectory: {folder / 'storage'}}}}}",
        f"http: {{addr: '127.0.0.1:{port}'}}",
    ]
    if login:
        (folder / "passwords").write_text(entry(USER, PASSWORD) + "\n")
        config.append(f"auth: {{htpasswd: {{realm: test, path: {folder / 'passwords'}}}}}")
    (folder / "config.yml").write_text("\n".join(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [binary, "serve", folder / "config.yml"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        _wait(port, process, folder / "log")
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", "/v2/")
            if connection.getresponse().status in {200, 401}:
                return
        except OSError:
            time.sleep(0.02)
        finally:
            connection.close()
    raise AssertionError(f"the registry did not start: {log.read_text()}")
