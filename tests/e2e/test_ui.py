"""The live view in a terminal of its own, driven by keys; what is on the screen is read back."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from wasilet.kube.client import api_path

from tests.clusters import TestCluster

pytestmark = pytest.mark.e2e

LIMIT_SECONDS = 60.0


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, argv: list[str], environ: dict[str, str]) -> None:
        self._fd, child = pty.openpty()
        ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
        self.before = termios.tcgetattr(child)
        self._child = child
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            argv, stdin=child, stdout=child, stderr=child, env=environ, cwd=root, start_new_session=True
        )
        self.text = ""

    def wait(self, text: str) -> None:
        """Read until ``text`` came since the last key."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while text not in self.text:
            assert time.monotonic() < deadline, f"{text!r} is not on the screen:\n{self.text[-4000:]}"
            if select.select([self._fd], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self._fd, 65536).decode(errors="replace")
                except OSError as error:
                    raise AssertionError(f"it ended: {self.text[-2000:]}") from error

    def press(self, keys: bytes) -> None:
        self.text = ""
        os.write(self._fd, keys)

    def end(self) -> int:
        """Its exit code; reads on, so that it can write its last words."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.text += os.read(self._fd, 65536).decode(errors="replace")
        return self.process.wait(timeout=1)

    def attributes(self) -> list[object]:
        return termios.tcgetattr(self._child)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._fd)
        os.close(self._child)


@pytest.fixture
def terminal(cluster: TestCluster) -> Iterator[Terminal]:
    environ = {**cluster.settings.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    for name in ("NO_COLOR", "CI"):
        environ.pop(name, None)
    made = Terminal([sys.executable, "-P", "-m", "invoke", "ui", "--name", cluster.settings.name], environ)
    yield made
    made.close()


@pytest.fixture
def namespace(cluster: TestCluster) -> Iterator[str]:
    """Two pods that no node takes: they need no image, and stay as they are."""
    name = "live-view"
    cluster.kube.create(api_path("namespaces"), {"metadata": {"name": name}})
    deadline = time.monotonic() + LIMIT_SECONDS
    while cluster.kube.find(api_path("serviceaccounts", "default", namespace=name)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for pod in ("aa-first", "zz-second"):
        spec = {"containers": [{"name": "c", "image": "none"}], "nodeSelector": {"no-such": "node"}}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod}, "spec": spec}
        cluster.kube.create(api_path("pods", namespace=name), body)
    yield name
    cluster.kube.delete(api_path("namespaces", name))


def test_keys_choose_a_pod_and_leave(terminal: Terminal, namespace: str, cluster: TestCluster) -> None:
    terminal.wait(f"Wasilet {cluster.settings.name}")
    terminal.wait("zz-second")
    terminal.press(b"G")
    terminal.wait("log of zz-second")
    terminal.press(b"k")
    terminal.wait("log of aa-first")
    terminal.press(b"\x1b[B")
    terminal.wait("log of zz-second")
    terminal.wait("FailedScheduling")
    terminal.press(b"q")
    assert terminal.end() == 0
    assert terminal.attributes() == terminal.before, "the terminal is not as it was"
    assert "\x1b[?1049l" in terminal.text, "the alternate screen was not left"


def test_ctrl_c_leaves_the_terminal_as_it_was(terminal: Terminal, cluster: TestCluster) -> None:
    terminal.wait(f"Wasilet {cluster.settings.name}")
    terminal.process.send_signal(2)
    assert terminal.end() in {0, 130}
    assert terminal.attributes() == terminal.before
