"""``invoke ui``: nodes, pods, events and logs of a cluster, live in the terminal.

What is shown comes from one observer (watches, no polling) and is drawn by rich when something changed. The log of the
pod that is chosen is followed from the moment it is chosen. Text from the cluster is hostile: control characters are
shown, never sent to the terminal.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from wasilet.cluster.diagnostics import node_report
from wasilet.errors import HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.settings import Settings
from wasilet.testing.log_match import printable
from wasilet.testing.observe import Observer, PodView, event_time
from wasilet.testing.pod_status import event_order
from wasilet.testing.served import Rates, served

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

FRAME_SECONDS = 0.1
NODES_EVERY_SECONDS = 2.0
FIRST_LIST_SECONDS = 10.0
MAX_EVENTS = 200
_KEYS = {
    b"\x1b[A": "up", b"\x1bOA": "up", b"k": "up", b"\x1b[B": "down", b"\x1bOB": "down", b"j": "down",
    b"g": "first", b"\x1b[H": "first", b"G": "last", b"\x1b[F": "last",
    b"q": "quit", b"Q": "quit", b"\x03": "quit", b"\x04": "quit",
}  # fmt: skip
_COLUMNS = (
    ("NAMESPACE", 2, 0), ("POD", 4, 0), ("PHASE", 0, 9), ("STATE", 3, 0), ("RESTARTS", 0, 8), ("FIRST LINE", 0, 10),
)  # fmt: skip
"""Title, and either a share of the width or a width in characters."""

_RATE_COLUMN = ("HTTP", 0, 16)
"""Only where a pod serves."""

_PHASE_STYLES = {"Running": "green", "Succeeded": "cyan", "Failed": "bold red", "Pending": "yellow"}


def show(settings: Settings, *, namespace: str = "") -> None:
    """Until ``q``. Raises UsageError when this is no terminal or there is no such cluster, ApiError when its API server
    does not answer."""
    from wasilet.cluster.down import unknown_cluster
    from wasilet.cluster.opening import open_cluster
    from wasilet.state import State

    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError(
            "`invoke ui` needs a terminal",
            hint="`invoke status`, `invoke kubectl -- get pods -A -w` and `invoke logs` don't",
        )
    if not State.of(settings).exists():
        raise unknown_cluster(settings)
    with open_cluster(settings) as cluster:
        kube = cluster.admin()
        kube.get("/version", timeout_seconds=5.0)
        with Observer(kube, namespace, events=True) as observer:
            View(settings.name, kube, observer).run()


@dataclass
class _Nodes:
    """Looked at now and then: a node's heartbeat would wake a watch for nothing."""

    lines: list[str]
    at: float = -NODES_EVERY_SECONDS


class View:
    """The screen, and what is chosen on it."""

    def __init__(self, name: str, kube: Kube, observer: Observer) -> None:
        self._name = name
        self._kube = kube
        self._observer = observer
        self._chosen = ""
        """The uid of a pod."""

        self._nodes = _Nodes([])
        self._rates = Rates(lambda: served(kube))
        self._over = False

    def run(self) -> None:
        """Draw and listen to keys until ``q``; the terminal is as before afterwards, however this ends."""
        from rich.console import Console
        from rich.live import Live

        console = Console(highlight=False)
        self._observer.wait(lambda: True if self._observer.listed else None, within_seconds=FIRST_LIST_SECONDS)
        with _keys() as read_keys, Live(console=console, screen=True, auto_refresh=False) as live:
            while not self._over:
                for key in read_keys(FRAME_SECONDS):
                    self._press(key)
                self._look_at_nodes()
                live.update(self._render(console), refresh=True)

    # --- keys ------------------------------------------------------------------------------------------------------

    def _press(self, key: str) -> None:
        if key == "quit":
            self._over = True
            return
        pods = self._pods()
        if not pods:
            return
        uids = [pod.uid for pod in pods]
        place = uids.index(self._chosen) if self._chosen in uids else 0
        moved = {"up": place - 1, "down": place + 1, "first": 0, "last": len(uids) - 1}[key]
        self._chosen = uids[max(0, min(moved, len(uids) - 1))]

    def _pods(self) -> list[PodView]:
        with self._observer.changed:
            alive = [view for view in self._observer.pods.values() if not view.deleted]
        return sorted(alive, key=lambda view: (view.namespace, view.name))

    # --- drawing ---------------------------------------------------------------------------------------------------

    def _look_at_nodes(self) -> None:
        if time.monotonic() - self._nodes.at < NODES_EVERY_SECONDS:
            return
        try:
            nodes = self._kube.get(api_path("nodes"), timeout_seconds=2.0).get("items") or []
            lines = [printable(line) for node in nodes for line in node_report(node)] or ["no nodes"]
        except HarnessError as error:
            lines = [printable(error.message)]
        # As it was, where metrics cannot be read: what is wrong then is shown above.
        with contextlib.suppress(HarnessError):
            self._rates.look()
        self._nodes = _Nodes(lines, time.monotonic())

    def _render(self, console: Console) -> RenderableType:
        from rich.layout import Layout

        pods = self._pods()
        if pods and self._chosen not in {pod.uid for pod in pods}:
            self._chosen = pods[0].uid
        chosen = next((pod for pod in pods if pod.uid == self._chosen), None)
        if chosen is not None:
            self._observer.follow(chosen)
        height = console.size.height
        node_lines = min(len(self._nodes.lines), 4)
        rest = max(9, height - node_lines - 3)
        pod_rows = max(4, min(len(pods) + 3, rest // 2))
        event_rows = max(3, (rest - pod_rows) // 3)
        layout = Layout()
        layout.split_column(
            Layout(self._node_panel(node_lines), size=node_lines + 2, name="nodes"),
            Layout(self._pod_panel(pods, pod_rows - 3), size=pod_rows, name="pods"),
            Layout(self._event_panel(chosen, event_rows - 2), size=event_rows, name="events"),
            Layout(self._log_panel(chosen, height - node_lines - 3 - pod_rows - event_rows - 2), name="log"),
            Layout(self._footer(), size=1, name="footer"),
        )
        return layout

    def _panel(self, lines: Any, title: str) -> RenderableType:
        from rich.panel import Panel
        from rich.text import Text

        return Panel(lines, title=Text(title, style="bold"), title_align="left", padding=(0, 1), border_style="blue")

    def _text(self, lines: list[str], style: str = "") -> RenderableType:
        from rich.text import Text

        return Text("\n".join(lines), style=style, no_wrap=True, overflow="ellipsis")

    def _node_panel(self, shown: int) -> RenderableType:
        return self._panel(self._text(self._nodes.lines[:shown]), f"Wasilet {self._name}")

    def _pod_panel(self, pods: list[PodView], rows: int) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, expand=True, padding=(0, 1), header_style="dim", pad_edge=False)
        rates = self._rates.words
        for column, ratio, width in (*_COLUMNS, *((_RATE_COLUMN,) if rates else ())):
            table.add_column(column, ratio=ratio or None, width=width or None, no_wrap=True, overflow="ellipsis")
        place = next((index for index, pod in enumerate(pods) if pod.uid == self._chosen), 0)
        first = max(0, min(place - rows // 2, len(pods) - rows))
        for pod in pods[first : first + max(1, rows)]:
            restarts = sum(int(entry.get("restartCount") or 0) for entry in pod.containers())
            first_line = pod.first_line_at()
            took = "" if first_line is None or not pod.logs else _short(first_line - pod.marks["created"])
            table.add_row(
                printable(pod.namespace),
                printable(pod.name),
                Text(pod.phase or "-", style=_PHASE_STYLES.get(pod.phase, "")),
                printable(_state_text(pod)),
                str(restarts),
                took,
                *((rates.get((pod.namespace, pod.name), ""),) if rates else ()),
                style="reverse" if pod.uid == self._chosen else "",
            )
        if not pods:
            table.add_row("no pods")
        where = f" of {printable(self._observer.namespace)}" if self._observer.namespace else ""
        return self._panel(table, f"pods{where} {min(place + 1, len(pods))}/{len(pods)}")

    def _event_panel(self, chosen: PodView | None, rows: int) -> RenderableType:
        with self._observer.changed:
            events = list(self._observer.events.values())
        uid = chosen.uid if chosen else ""
        own = [event for event in events if (event.get("involvedObject") or {}).get("uid") == uid]
        lines = [_event_line(event) for event in sorted(own, key=event_order)[-max(1, rows) :]]
        return self._panel(self._text(lines or ["none"]), "events")

    def _log_panel(self, chosen: PodView | None, rows: int) -> RenderableType:
        if chosen is None:
            return self._panel(self._text([""]), "log")
        with self._observer.changed:
            logs = list(chosen.logs.values())
            errors = [log.lost or log.error for log in logs if log.lost or log.error]
        stamped = [(line.at, line.text) for log in logs for line in log.tail(max(1, rows))]
        stamped.sort(key=lambda line: line[0])
        lines = [printable(text) for _, text in stamped][-max(1, rows) :]
        return self._panel(self._text(lines or errors or ["(empty)"]), f"log of {printable(chosen.name)}")

    def _footer(self) -> RenderableType:
        from rich.text import Text

        with self._observer.changed:
            error = self._observer.error
        if error:
            return Text(f" {printable(error)}", style="bold red", no_wrap=True, overflow="ellipsis")
        return Text(" ↑ ↓ or j k: choose a pod    g G: first, last    q: leave", style="dim", no_wrap=True)


def _state_text(pod: PodView) -> str:
    words = []
    for entry in pod.containers():
        for kind, detail in (entry.get("state") or {}).items():
            words.append(str((detail or {}).get("reason") or kind))
    return ", ".join(words)


def _event_line(event: KubeObject) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event_time(event)))
    count = f" (x{event['count']})" if (event.get("count") or 1) > 1 else ""
    return printable(f"{at} {event.get('type')} {event.get('reason')}: {event.get('message')}{count}")


def _short(seconds: float) -> str:
    from wasilet.testing.report_page import duration

    return duration(max(0.0, seconds))


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits for keys at most so many seconds and names those that mean something. The terminal gives
    them one by one and without echo meanwhile; a terminal that is gone counts as ``q``."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def resized(_signum: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(wake_write, b".")

    previous = signal.signal(signal.SIGWINCH, resized)

    def read(seconds: float) -> list[str]:
        ready, _, _ = select.select([fd, wake_read], [], [], seconds)
        if wake_read in ready:
            os.read(wake_read, 1024)
        if fd not in ready:
            return []
        try:
            data = os.read(fd, 1024)
        except OSError:
            return ["quit"]
        return _named(data) if data else ["quit"]

    try:
        tty.setcbreak(fd)
        yield read
    finally:
        signal.signal(signal.SIGWINCH, previous)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
        os.close(wake_read)
        os.close(wake_write)


def _named(data: bytes) -> list[str]:
    """The keys in what the terminal sent; what means nothing is passed over."""
    found = []
    while data:
        for code, name in _KEYS.items():
            if data.startswith(code):
                found.append(name)
                data = data[len(code) :]
                break
        else:
            data = data[1:]
    return found
