"""What a person sees on stderr while a play runs: one line per step, and what is running now.

On a terminal rich draws it; in a pipe, in CI or with NO_COLOR there are plain lines, and a step that takes long says
so now and then. Data (``--output json``, paths, references) goes to stdout and never through here.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from wasilet.steps import Outcome, Recap, Reporter

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text


PLAIN_FIRST_SECONDS = 3.0
PLAIN_EVERY_SECONDS = 10.0
_COLOURS = {"ok": "green", "changed": "yellow", "skipped": "cyan", "failed": "bold red"}


def is_interactive(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether lines may be redrawn: a real terminal, not in CI, not ``dumb``."""
    return (
        stream.isatty()
        and environ.get("CI", "").lower() in {"", "0", "false"}
        and environ.get("TERM", "dumb") != "dumb"
    )


def reporter_for(environ: Mapping[str, str], *, stream: TextIO | None = None, show_diff: bool = False) -> Reporter:
    """The reporter that suits ``stream`` (stderr) and the environment."""
    stream = stream or sys.stderr
    if is_interactive(stream, environ) and not environ.get("NO_COLOR"):
        return RichReporter(stream, show_diff=show_diff)
    return PlainReporter(stream, show_diff=show_diff)


class PlainReporter:
    """Lines that read well in a CI log: no colours, nothing redrawn."""

    def __init__(self, stream: TextIO, *, show_diff: bool = False) -> None:
        self._stream = stream
        self._show_diff = show_diff
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def play_started(self, title: str) -> None:
        """The title line."""
        self._write(f"{title}")

    def step_started(self, name: str) -> None:
        """Only remembered."""
        self._started[name] = time.monotonic()

    def step_progress(self, name: str, message: str) -> None:
        """Printed only when the step takes long, and then not often."""
        now = time.monotonic()
        started = self._started.get(name, now)
        if now - started < PLAIN_FIRST_SECONDS or now - self._said.get(name, 0.0) < PLAIN_EVERY_SECONDS:
            return
        self._said[name] = now
        self._write(f"  ...      {name}: {message}")

    def step_finished(self, outcome: Outcome) -> None:
        """One line, and below it the difference (with ``--diff``) or what went wrong."""
        for line in outcome_lines(outcome, show_diff=self._show_diff):
            self._write(line)

    def play_finished(self, recap: Recap) -> None:
        """The recap line."""
        self._write(recap.line())

    def notice(self, message: str) -> None:
        """Printed at once: it belongs to no step."""
        self._write(message)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text + "\n")
            self._stream.flush()
        except BrokenPipeError:
            # The reader of this has gone (`up 2>&1 | head`): what was begun is finished all the same.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class RichReporter:
    """Colours, and a line with a spinner for each step that is running."""

    def __init__(self, stream: TextIO, *, show_diff: bool = False) -> None:
        from rich.console import Console

        self._console: RichConsole = Console(file=stream, highlight=False, soft_wrap=True)
        self._show_diff = show_diff
        self._running: dict[str, tuple[float, str]] = {}
        self._live: Live | None = None
        self._lock = threading.Lock()

    def play_started(self, title: str) -> None:
        """The title, then the live area below it."""
        from rich.live import Live

        self._console.print(title, style="bold", markup=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            transient=True,
            refresh_per_second=8,
            redirect_stdout=False,
        )
        self._live.start()

    def step_started(self, name: str) -> None:
        """Adds a spinner line."""
        with self._lock:
            self._running[name] = (time.monotonic(), "")

    def step_progress(self, name: str, message: str) -> None:
        """Changes the spinner line."""
        with self._lock:
            started, _ = self._running.get(name, (time.monotonic(), ""))
            self._running[name] = (started, message)

    def step_finished(self, outcome: Outcome) -> None:
        """Replaces the spinner line by a fixed one."""
        with self._lock:
            self._running.pop(outcome.name, None)
        first, *rest = outcome_lines(outcome, show_diff=self._show_diff)
        from rich.text import Text

        line = Text(first)
        line.stylize(_COLOURS[outcome.status.value], 2, 10)
        self._console.print(line)
        for text in rest:
            style = "green" if text.lstrip().startswith("+") else "red" if text.lstrip().startswith("-") else "dim"
            self._console.print(Text(text, style=style))

    def play_finished(self, recap: Recap) -> None:
        """Takes the live area away and prints the recap."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._console.print(recap.line(), style="bold green" if recap.succeeded else "bold red", markup=False)

    def notice(self, message: str) -> None:
        """Printed at once: it belongs to no step."""
        self._console.print(message, style="yellow", markup=False)

    def _render(self) -> Text:
        from rich.text import Text

        now = time.monotonic()
        frame = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(now * 8) % 10]
        with self._lock:
            running = list(self._running.items())
        lines = [
            f"{frame} {name} {now - started:5.1f} s  {message}"[: max(20, self._console.width - 1)]
            for name, (started, message) in running
        ]
        return Text("\n".join(lines), style="blue")


def outcome_lines(outcome: Outcome, *, show_diff: bool) -> list[str]:
    """The lines of one finished step."""
    seconds = f" ({outcome.seconds:.1f} s)" if outcome.seconds >= 0.05 else ""
    detail = f": {outcome.detail}" if outcome.detail else ""
    lines = [f"  {outcome.status.value:<8} {outcome.name}{detail}{seconds}"]
    if show_diff:
        lines += [f"           {line}" for line in outcome.diff]
    if outcome.hint:
        lines.append(f"           {outcome.hint}")
    lines += [f"           | {line}" for line in outcome.log_tail]
    if outcome.log is not None:
        lines.append(f"           the whole log: {outcome.log}")
    return lines
