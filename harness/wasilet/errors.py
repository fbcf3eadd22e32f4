"""What the harness raises: one tree, so that a task needs one ``except``.

::

    HarnessError              one clear line, a hint, an exit code
    ├── UsageError            what was typed cannot be done: unknown provider, bad name, unknown sample
    ├── StateError            the cluster's folder cannot be read or written, or another run holds its lock
    ├── PortTakenError        something else listens where a component must
    ├── WaitTimeoutError      what was waited for did not come in time
    ├── CommandError          a program failed, is missing or took too long (see wasilet.process)
    ├── ComponentError        a long-lived component died or never became ready
    ├── AcquireError          a binary could be had from nowhere (wasilet.controlplane.acquire)
    ├── ApiError              the API server refused, or gave no answer
    └── CancelledError        Ctrl-C, or a neighbouring step failed
"""

from __future__ import annotations

from pathlib import Path


class HarnessError(Exception):
    """One clear line for the user (``message``), what to do about it (``hint``), and the exit code of the task."""

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(HarnessError):
    """What was typed cannot be done; nothing was changed."""


class StateError(HarnessError):
    """The cluster's folder cannot be used: read-only, full, damaged, or locked by another run."""


class PortTakenError(HarnessError):
    """Another program listens on a port that a component needs."""


class WaitTimeoutError(HarnessError):
    """A bounded wait ran out; the message names what was waited for."""


class CommandError(HarnessError):
    """A program failed. ``returncode`` is None when it is missing or was stopped at its time limit."""

    def __init__(
        self,
        message: str,
        *,
        argv: tuple[str, ...],
        returncode: int | None,
        tail: tuple[str, ...] = (),
        hint: str = "",
        exit_code: int = 2,
    ) -> None:
        super().__init__(message, hint=hint, exit_code=exit_code)
        self.argv = argv
        self.returncode = returncode
        self.tail = tail
        """The last lines that the program wrote to stderr (or stdout when stderr is empty)."""


class ComponentError(HarnessError):
    """A component died or never became ready. ``log`` is where its whole log is, ``tail`` its last lines."""

    def __init__(self, message: str, *, log: Path | None = None, tail: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.log = log
        self.tail = tail


class ApiError(HarnessError):
    """The API server's refusal (``code`` and ``reason`` are its Status), or no answer at all (``code`` 0)."""

    def __init__(self, message: str, *, code: int = 0, reason: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.reason = reason


class CancelledError(HarnessError):
    """The run was given up from outside: Ctrl-C, SIGTERM, or a failed step beside this one."""

    def __init__(self, message: str = "given up") -> None:
        super().__init__(message, exit_code=130)
