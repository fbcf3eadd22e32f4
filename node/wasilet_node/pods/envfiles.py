"""Environment files, which ``fileKeyRef`` takes a variable from (KEP-3721).

Their form is what kubelet's parser takes of a shell's: ``NAME='value'``, the value in single quotes and nothing in it
special, lines of it included; blank lines and ``#`` comments, also after a value. Blanks before ``=`` are an error, and
blanks after it mean an empty value, as in a shell.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_BYTES = 1024 * 1024
"""kubelet has no limit for the file; one megabyte is far more than an environment can hold."""

_BLANK = " \t"


class EnvFileError(ValueError):
    """The file is not of the form; the message says which line and why."""


def value_of(text: str, key: str) -> str:
    """The value of ``key``, empty when the file has none. Later lines are not looked at once it is found, so a mistake
    behind it is none. Raises EnvFileError."""
    for name, value in _assignments(text):
        if name == key:
            return value
    return ""


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    lines = enumerate((line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")), start=1)
    for number, whole in lines:
        line = whole.lstrip(_BLANK)
        if not line or line.startswith("#"):
            continue
        name, equals, rest = line.partition("=")
        if not equals:
            raise _error(number, "missing '='")
        if not name.rstrip(_BLANK):
            raise _error(number, "empty variable name")
        if name != name.rstrip(_BLANK):
            raise _error(number, "whitespace before '=' is not allowed")
        if rest.startswith(tuple(_BLANK)):
            yield name, ""
            continue
        if not rest.startswith("'"):
            raise _error(number, "value must be enclosed in single quotes")
        value, closed, behind = rest[1:].partition("'")
        while not closed:
            _, following = next(lines, (0, None))
            if following is None:
                raise EnvFileError(
                    f"invalid environment variable format starting at line {number}: unclosed single quote"
                )
            more, closed, behind = following.partition("'")
            value += "\n" + more
        behind = behind.lstrip(_BLANK)
        if behind and not behind.startswith("#"):
            raise _error(number, "unexpected content after closing quote")
        yield name, value


def _error(number: int, what: str) -> EnvFileError:
    return EnvFileError(f"invalid environment variable format at line {number}: {what}")
