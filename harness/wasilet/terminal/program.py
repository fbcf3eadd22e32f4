"""Invoke's program with this project's manners, for ``./run`` and for plain ``invoke``.

Invoke ends with exit code 1 when it cannot make sense of the command line, with a traceback when a number is none, and
with no message on Ctrl-C. Here each is one clear line, and exit code 2 or 130, as for everything else that is typed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from invoke.config import AmbiguousMergeError, Config
from invoke.env import Environment
from invoke.exceptions import AmbiguousEnvVar, Exit, ParseError, UncastableEnvVar, UnknownFileType
from invoke.program import Program
from invoke.util import yaml  # type: ignore[attr-defined]
from wasilet_common.process_start import prepare_process, silence_stdout

from wasilet.errors import HarnessError, UsageError
from wasilet.package_data import checkout_root
from wasilet.settings import flag
from wasilet.terminal.cli import EXIT_FAILED, EXIT_INTERRUPTED, lost_output

INVOKES_OWN = "invoke.main"
"""The module whose program runs when ``invoke`` is typed."""


class TaskProgram(Program):
    """Invoke's own program but for what it prints about a command line that is wrong."""

    def create_config(self) -> None:
        """Read the configuration files."""
        with _clear_errors(self):
            super().create_config()

    def parse_core(self, argv: list[str] | None) -> None:
        """Find Invoke's own options in the command line."""
        with _clear_errors(self):
            super().parse_core(argv)

    def parse_collection(self) -> None:
        """Load tasks.py."""
        with _clear_errors(self):
            super().parse_collection()

    def parse_tasks(self) -> None:
        """Find the tasks and their options in the command line."""
        with _clear_errors(self):
            super().parse_tasks()

    def parse_cleanup(self) -> None:
        """Answer ``--help`` and ``--list``."""
        with _clear_errors(self):
            super().parse_cleanup()

    def update_config(self, merge: bool = True) -> None:  # noqa: FBT001, FBT002  (Invoke's own signature)
        """Read the file that ``--config`` names."""
        with _clear_errors(self):
            super().update_config(merge)

    def execute(self) -> None:
        """Run the tasks."""
        with _interruptible(), _clear_settings(self):
            # An attribute of the instance: Invoke's Config takes an ordinary assignment for a setting.
            object.__setattr__(self.config, "load_shell_env", functools.partial(load_shell_env, self.config))
            super().execute()


def take_over() -> None:
    """For tasks.py: let plain ``invoke``, which is running already when it loads the tasks, go on as ``./run`` does.
    What Invoke parses before it knows of tasks.py, its own options, stays its own affair."""
    if (main := sys.modules.get(INVOKES_OWN)) is not None and type(main.program) is Program:
        prepare_process()
        main.program.__class__ = TaskProgram


def in_checkout() -> bool:
    """Whether this runs in the folder of the sources, whose ``tasks.py`` and ``invoke.yaml`` then count: ``./run``."""
    return checkout_root() == Path.cwd()


class _InvokeVariables(Environment):
    """Invoke's own ``INVOKE_*`` variables. Those of Wasilet's section are read by ``wasilet.settings``."""

    def _path_set(self, key_path: Any, value: str) -> None:
        if key_path[0] == "wasilet":
            return
        name = (self._prefix or "") + self._to_env_var(key_path)
        if isinstance(self._path_get(key_path), bool):
            value = "1" if value and flag(name, value) else ""
        try:
            super()._path_set(key_path, value)
        except ValueError as error:
            raise UsageError(f"{name} must be a number, not {value!r}") from error
        except UncastableEnvVar as error:
            raise UsageError(f"{name} cannot be set by the environment: it is a list") from error


def load_shell_env(config: Config) -> None:
    """In place of ``Config.load_shell_env``: a boolean is what it says, and a number that is none an error with the
    variable's name. Raises UsageError."""
    config.merge()
    try:
        found = _InvokeVariables(config=config, prefix=config._env_prefix).load()  # noqa: SLF001  (offers nothing public)
    except AmbiguousEnvVar as error:
        raise UsageError(f"settings in the environment: {error}") from error
    config._set(_env=found)  # noqa: SLF001
    config.merge()


def _typed() -> str:
    if INVOKES_OWN in sys.modules:
        return "invoke"
    return "./run" if in_checkout() else "wasilet"


@contextlib.contextmanager
def _clear_errors(program: Program) -> Iterator[None]:
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
        except (yaml.YAMLError, AmbiguousMergeError, UnknownFileType, UnicodeDecodeError) as error:
            raise _unusable_file(error, getattr(program, "config", None)) from error
        except ValueError as error:
            # An option that takes a number was given none; Invoke lets Python's own message through.
            given = str(error).rpartition(": ")[2]
            raise Exit(f"error: an option takes a number, and was given {given}", code=EXIT_FAILED) from error


@contextlib.contextmanager
def _clear_settings(program: Program) -> Iterator[None]:
    try:
        yield
    except HarnessError as error:
        raise Exit(f"error: {error}", code=error.exit_code) from error
    except (yaml.YAMLError, AmbiguousMergeError) as error:
        raise _unusable_file(error, getattr(program, "config", None)) from error


def _unusable_file(error: Exception, config: Config | None) -> Exit:
    if isinstance(error, AmbiguousMergeError) and config is not None and (words := _misshapen(config)):
        return Exit(f"error: {words}", code=EXIT_FAILED)
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a configuration file of Invoke"
    what = getattr(error, "problem", None) or " ".join(str(error).split())
    return Exit(f"error: {where} cannot be used: {what}", code=EXIT_FAILED)


def _misshapen(config: Config) -> str:
    """Which setting of which file does not fit: Invoke names neither."""
    project = getattr(config, "_project", None) or {}
    for level in ("_system", "_user", "_runtime"):
        other = getattr(config, level, None) or {}
        if (misfit := _misfit(project, other)) is not None:
            path, wanted = misfit
            return f"{getattr(config, f'{level}_path', '')}: {'.'.join(path)} must be {'a' if wanted else 'no'} mapping"
    return ""


def _misfit(known: Any, given: Any, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], bool] | None:
    """The first setting that is a mapping in one and none in the other, and whether it is one in ``known``."""
    if isinstance(known, dict) != isinstance(given, dict):
        return path, isinstance(known, dict)
    if not isinstance(known, dict):
        return None
    found = (_misfit(known[key], given[key], (*path, str(key))) for key in known if key in given)
    return next((misfit for misfit in found if misfit is not None), None)


def _line(words: str) -> str:
    words = words.strip().rstrip("!.")
    return f"{words[:1].lower()}{words[1:]}"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        try:
            yield
        finally:
            # What a full device does not take is known now, not when Python ends.
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise Exit("interrupted", code=EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of the help or the list has gone (`--list | head`): nothing is wrong.
        silence_stdout()
        raise Exit(code=0) from None
    except OSError as error:
        silence_stdout()
        words = f"cannot read {error.filename}: {error.strerror}" if error.filename else str(lost_output(error))
        raise Exit(f"error: {words}", code=EXIT_FAILED) from error
