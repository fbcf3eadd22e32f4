"""Invoke's program with this project's manners, for ``./run`` and for plain ``invoke``.

Invoke ends with exit code 1 when it cannot make sense of the command line, with a traceback when a number is none, and
without a word on Ctrl-C. Here each is one clear line, and exit code 2 or 130, as for everything else that is typed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from invoke.exceptions import Exit, ParseError
from invoke.program import Program

from wasilet.package_data import checkout_root
from wasilet.terminal.cli import EXIT_FAILED, EXIT_INTERRUPTED, stop_writing

INVOKES_OWN = "invoke.main"
"""The module whose program runs when ``invoke`` is typed."""


class TaskProgram(Program):
    """Invoke's own program but for what it says about a command line that is wrong."""

    def create_config(self) -> None:
        """Read the configuration files."""
        with _clear_words():
            super().create_config()

    def parse_core(self, argv: list[str] | None) -> None:
        """Find Invoke's own options in the command line."""
        with _clear_words():
            super().parse_core(argv)

    def parse_collection(self) -> None:
        """Load tasks.py."""
        with _clear_words():
            super().parse_collection()

    def parse_tasks(self) -> None:
        """Find the tasks and their options in the command line."""
        with _clear_words():
            super().parse_tasks()

    def parse_cleanup(self) -> None:
        """Answer ``--help`` and ``--list``."""
        with _clear_words():
            super().parse_cleanup()

    def execute(self) -> None:
        """Run the tasks."""
        with _interruptible():
            super().execute()


def take_over() -> None:
    """For tasks.py: let plain ``invoke``, which is running already when it loads the tasks, go on as ``./run`` does.
    What Invoke parses before it knows of tasks.py, its own options, stays its own affair."""
    if (main := sys.modules.get(INVOKES_OWN)) is not None and type(main.program) is Program:
        main.program.__class__ = TaskProgram


def in_checkout() -> bool:
    """Whether this runs in the folder of the sources, whose ``tasks.py`` and ``invoke.yaml`` then count: ``./run``."""
    return checkout_root() == Path.cwd()


def _typed() -> str:
    if INVOKES_OWN in sys.modules:
        return "invoke"
    return "./run" if in_checkout() else "wasilet"


@contextlib.contextmanager
def _clear_words() -> Iterator[None]:
    with _interruptible():
        try:
            yield
        except ParseError as error:
            task = getattr(error.context, "name", None)
            hint = f"`{_typed()} {task} --help` tells what it takes" if task else f"`{_typed()} --list` shows the tasks"
            raise Exit(f"error: {_line(str(error))} ({hint})", code=EXIT_FAILED) from error
        except Exit as error:
            if error.code != 1:
                raise
            # As of a collection that is not there; after --help and --list it is 0.
            raise Exit(f"error: {_line(str(error.message))}", code=EXIT_FAILED) from error
        except ValueError as error:
            # An option that takes a number was given none; Invoke lets Python's own words through.
            given = str(error).rpartition(": ")[2]
            raise Exit(f"error: an option takes a number, and was given {given}", code=EXIT_FAILED) from error


def _line(words: str) -> str:
    words = words.strip().rstrip("!.")
    return f"{words[:1].lower()}{words[1:]}"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Exit("interrupted", code=EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read the help or the list has gone (`--list | head`): nothing is wrong.
        stop_writing()
        raise Exit(code=0) from None
