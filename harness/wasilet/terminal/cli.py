"""What every task needs: settings from Invoke's configuration and the command line, and failures as one clear line.

Exit codes: 0 all is well, 2 failed or wrong usage, 130 ended by Ctrl-C (143 by SIGTERM).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from invoke.context import Context
from invoke.exceptions import Exit
from wasilet_common.process_start import silence_stdout

from wasilet.console import reporter_for
from wasilet.errors import CommandError, ComponentError, HarnessError, StateError, UsageError
from wasilet.settings import Settings, environment_flag, from_invoke_variables, invocation_path, load
from wasilet.state import State
from wasilet.steps import Recap
from wasilet.storage import os_error_reason, os_error_text

P = ParamSpec("P")
R = TypeVar("R")

EXIT_FAILED = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class _TerminatedError(BaseException):
    """SIGTERM; a BaseException, so that nothing but the entry point below handles it."""


def command(body: Callable[P, R]) -> Callable[P, R]:
    """Let a task end with one line on stderr and its exit code, whatever happens in it."""

    @functools.wraps(body)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        if "--help" in (*args, *kwargs.values()) or "-h" in (*args, *kwargs.values()):
            # Invoke takes `invoke demo --help` for the value of demo's positional argument.
            name = body.__name__.rstrip("_").replace("_", "-")
            exec_program([sys.executable, "-P", "-m", "wasilet", "--help", name], env=dict(os.environ))
        previous = signal.signal(signal.SIGTERM, _terminate)
        try:
            return body(*args, **kwargs)
        except HarnessError as error:
            raise Exit(_error_lines(error), code=error.exit_code) from error
        except KeyboardInterrupt:
            raise Exit("interrupted", code=EXIT_INTERRUPTED) from None
        except _TerminatedError:
            raise Exit("ended by SIGTERM", code=EXIT_TERMINATED) from None
        except BrokenPipeError:
            # The reader of the output has gone (`| head`): nothing is wrong, and nothing more can be printed.
            silence_stdout()
            raise Exit(code=0) from None
        except OSError as error:
            raise Exit(f"error: {os_error_text(error)}", code=EXIT_FAILED) from error
        except Exit:
            raise
        except Exception as error:
            # A bug in Wasilet: for its report the whole stack, for scripts the exit code of every failure.
            traceback.print_exception(error)
            raise Exit(f"error: internal error: {type(error).__name__}: {error}", code=EXIT_FAILED) from error
        finally:
            signal.signal(signal.SIGTERM, previous)

    return guarded


def _terminate(_signum: int, _frame: FrameType | None) -> None:
    raise _TerminatedError


def _error_lines(error: HarnessError) -> str:
    debug = False
    with contextlib.suppress(UsageError):
        debug = environment_flag(os.environ, "WASILET_DEBUG")
    if debug:
        traceback.print_exception(error)
    lines = [f"error: {error}"]
    if isinstance(error, CommandError):
        lines += [f"  | {line}" for line in error.tail]
    if isinstance(error, ComponentError) and error.log is not None:
        lines.append(f"  the whole log: {error.log}")
    return "\n".join(lines)


def settings_of(context: Context, /, **given: Any) -> Settings:
    """Settings for a task: invoke.yaml, environment, then what was typed. Raises UsageError."""
    section = _section(context)
    for key in ("kubeconfig", "config"):
        if given.get(key):
            given[key] = invocation_path(given[key])
    settings = load(section, **given)
    if not given.get("provider") and not settings.environ.get("WASILET_PROVIDER"):
        # No one has to say again what a cluster was made with.
        with contextlib.suppress(StateError):
            if recorded := State.of(settings).cluster.provider:
                settings = replace(settings, provider=recorded)
    return settings


def _section(context: Context) -> Any:
    """The ``wasilet`` section. Invoke lets a project's file win over the user's; here the project's holds the defaults,
    so the user's file, then ``INVOKE_WASILET_*``, then ``--config`` are laid over it again. Raises UsageError."""
    from invoke.config import merge_dicts

    section = _plain(context.config.get("wasilet", {}))
    levels = [getattr(context.config, level, None) or {} for level in ("_user", "_runtime")]
    levels.insert(1, {"wasilet": from_invoke_variables(os.environ)})
    for level in levels:
        over = level.get("wasilet", {})
        if not isinstance(over, dict) or not isinstance(section, dict):
            return over if isinstance(section, dict) else section  # what is no mapping is reported by load()
        try:
            merge_dicts(section, over)
        except TypeError as error:  # Invoke's AmbiguousMergeError: a section in one file, a number in the other
            raise UsageError(f"the settings in invoke.yaml files do not fit together: {error}") from error
    return section


def _plain(value: Any) -> Any:
    if hasattr(value, "_config"):
        value = value._config  # noqa: SLF001  (Invoke's proxy of a mapping; it offers nothing public)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def checked_output(output: str) -> str:
    """``--output``: ``text`` or ``json``. Raises UsageError."""
    if output not in {"text", "json"}:
        raise UsageError(f"unknown output {output!r}", hint="text or json")
    return output


def finish(recap: Recap, *, output: str = "text") -> None:
    """Print the recap's JSON where it was asked for, and end the task as the play ended."""
    if output == "json":
        emit_json(recap.to_json())
    for failure in recap.failures:
        code = failure.error.exit_code if failure.error else EXIT_FAILED
        # The reporter has shown all of it, a compiler's many lines included.
        raise Exit(f"error: {failure.name}: {failure.detail.partition(chr(10))[0]}", code=code)


def finish_with(code: int) -> None:
    """End the task with a guest's own exit code."""
    if code:
        raise Exit(code=code)


def emit(line: str) -> None:
    """A line of data on stdout. Raises StateError when it cannot be written, and BrokenPipeError as it is."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        silence_stdout()
        raise lost_output(error) from error


def lost_output(error: OSError) -> StateError:
    """What to say of a stdout that takes nothing more: a full disk, a device that is gone."""
    return StateError(f"cannot write to stdout: {os_error_reason(error)}")


def emit_json(data: Any) -> None:
    """Data on stdout as JSON."""
    emit(json.dumps(data, indent=2))


def reporter(*, diff: bool = False) -> Any:
    """The reporter of this terminal."""
    return reporter_for(os.environ, show_diff=diff)


def remainder() -> list[str]:
    """What stands after ``--`` in the command line, word by word (Invoke joins it with blanks)."""
    words = sys.argv[1:]
    return words[words.index("--") + 1 :] if "--" in words else []


def exec_program(argv: Sequence[str], *, env: dict[str, str], cwd: str | None = None) -> None:
    """Become another program, with its exit code, its terminal and its signals. Raises CommandError."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if cwd:
            os.chdir(cwd)
        os.execvpe(argv[0], list(argv), env)  # noqa: S606
    except OSError as error:
        raise CommandError(
            f"{argv[0]} cannot be started: {error.strerror}", argv=tuple(argv), returncode=None
        ) from error
