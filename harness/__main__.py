"""``python -P -m harness``, which ``run`` ends in: Invoke, with this project's tasks and its own manners.

Invoke ends with exit code 1 when it cannot make sense of the command line, with a traceback when a number is none, and
without a word on Ctrl-C. Here each is one clear line, and exit code 2 or 130, as for everything else that is typed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

try:
    from invoke import __version__
    from invoke.exceptions import Exit, ParseError
    from invoke.program import Program
except KeyboardInterrupt:  # it takes a while to load
    sys.exit(130)

from harness.cli import EXIT_FAILED, EXIT_INTERRUPTED


class TaskProgram(Program):
    """Invoke's own program but for what it says about a command line that is wrong."""

    def create_config(self) -> None:
        """Read the configuration files."""
        with _clear_words():
            super().create_config()

    def parse_collection(self) -> None:
        """Load tasks.py."""
        with _clear_words():
            super().parse_collection()

    def parse_tasks(self) -> None:
        """Find the tasks and their options in the command line."""
        with _clear_words():
            super().parse_tasks()

    def parse_core(self, argv: list[str] | None) -> None:
        """Find Invoke's own options in the command line."""
        with _clear_words():
            super().parse_core(argv)

    def execute(self) -> None:
        """Run the tasks."""
        with _interruptible():
            super().execute()


@contextlib.contextmanager
def _clear_words() -> Iterator[None]:
    with _interruptible():
        try:
            yield
        except ParseError as error:
            task = getattr(error.context, "name", None)
            hint = f"`./run {task} --help` tells what it takes" if task else "`./run --list` shows the tasks"
            words = str(error).strip().rstrip("!.")
            raise Exit(f"error: {words[:1].lower()}{words[1:]} ({hint})", code=EXIT_FAILED) from error
        except ValueError as error:
            # An option that takes a number was given none; Invoke lets Python's own words through.
            given = str(error).rpartition(": ")[2]
            raise Exit(f"error: an option takes a number, and was given {given}", code=EXIT_FAILED) from error


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Exit("interrupted", code=EXIT_INTERRUPTED) from None


def main() -> None:
    """The command line."""
    names = ["invoke", "inv"]
    TaskProgram(name="Invoke", binary="inv[oke]", binary_names=names, version=__version__).run()


if __name__ == "__main__":
    main()
