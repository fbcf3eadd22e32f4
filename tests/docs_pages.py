"""Pages of the documentation as programs: their console blocks are typed into a shell, their files written.

What a page must look like to be run:

- a fence ``console`` holds commands, each after ``$ ``, continued after ``> ``, followed by what it prints. In what it
  prints, ``...`` stands for anything in a line, and a line of only ``...`` for any number of lines. Without any printed
  line, only success is asked for. A last line ``^C`` means that the command runs on, and is interrupted by then;
- a fence of another language below a line that ends with ``into `PATH`:`` is that file's content;
- an HTML comment ``<!-- exit code 2 -->`` above a fence says how the commands in it end; else they end with 0.

Everything else is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
INTERRUPT = "^C"
ANYTHING = "..."

_FENCE = re.compile(r"(```+)([^\n`]*)")
_INTO = re.compile(r"into `([^`]+)`:$")
_EXIT_CODE = re.compile(r"<!-- exit code (\d+) -->")


def defined_tests() -> set[str]:
    """The names of all test functions, for pages that name some."""
    pattern = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)
    return {name for file in Path(__file__).parent.rglob("test_*.py") for name in pattern.findall(file.read_text())}


class PageError(Exception):
    """A page is not written as this module wants it; the message names page and line."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command with what it prints."""

    line: int
    text: str
    """As typed; several lines where it was continued."""

    expected: tuple[str, ...]
    interrupted: bool = False
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class File:
    """A file to write."""

    line: int
    path: str
    """As the page says it; ``~`` is the home folder."""

    content: str


@dataclass(frozen=True, kw_only=True)
class Fence:
    """A fenced block."""

    line: int
    """Of its opening, counted from 1."""

    language: str
    body: tuple[str, ...]
    above: tuple[str, ...]
    """The two last lines before it that are not empty, nearest first."""


def pages() -> list[Path]:
    """Every page, sorted."""
    return sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def fences(text: str, *, name: str = "page") -> Iterator[Fence]:
    """Raises PageError for a fence that is never closed."""
    above: list[str] = []
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        opening = _FENCE.fullmatch(line.strip())
        if opening is None:
            if line.strip():
                above = [line.strip(), *above[:1]]
            continue
        marker, info = opening.groups()
        indent = len(line) - len(line.lstrip())
        body = []
        for _, inner in lines:
            if inner.strip() == marker:
                break
            body.append(inner[indent:] if not inner[:indent].strip() else inner)
        else:
            raise PageError(f"{name}:{number}: the fence is never closed")
        yield Fence(line=number, language=(info.split() or [""])[0], body=tuple(body), above=tuple(above))
        above = []


def without_fences(text: str) -> str:
    """The text with fenced blocks blanked, line numbers kept."""
    lines = text.splitlines()
    for fence in fences(text):
        for number in range(fence.line - 1, fence.line + len(fence.body) + 1):
            lines[number] = ""
    return "\n".join(lines)


def items(text: str, *, name: str = "page") -> list[Command | File]:
    """What to do, in the order of the page. Raises PageError."""
    found: list[Command | File] = []
    for fence in fences(text, name=name):
        if fence.language == "console":
            found += _commands(fence, name)
        elif fence.above and (into := _INTO.search(fence.above[0])):
            found.append(File(line=fence.line, path=into.group(1), content="\n".join(fence.body) + "\n"))
    return found


def _commands(fence: Fence, name: str) -> Iterator[Command]:
    declared = next((match for line in fence.above if (match := _EXIT_CODE.search(line))), None)
    exit_code = int(declared.group(1)) if declared else 0
    begun: tuple[int, list[str], list[str]] | None = None
    for number, line in enumerate(fence.body, start=fence.line + 1):
        if line.startswith("$ "):
            if begun is not None:
                yield _command(*begun, exit_code)
            begun = (number, [line[2:]], [])
        elif begun is None:
            raise PageError(f"{name}:{number}: a console block begins with a command, after '$ '")
        elif line.startswith("> ") or line == ">":
            if begun[2]:
                raise PageError(f"{name}:{number}: a continuation after output")
            begun[1].append(line[2:])
        else:
            begun[2].append(line.rstrip())
    if begun is None:
        raise PageError(f"{name}:{fence.line}: a console block without a command")
    yield _command(*begun, exit_code)


def _command(line: int, text: list[str], expected: list[str], exit_code: int) -> Command:
    interrupted = bool(expected) and expected[-1] == INTERRUPT
    while expected and (expected[-1] in {"", INTERRUPT}):
        expected.pop()
    return Command(
        line=line, text="\n".join(text), expected=tuple(expected), interrupted=interrupted, exit_code=exit_code
    )


def matches(expected: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether ``printed`` is what the page says; trailing blanks and empty lines at the end do not count."""
    pattern = "".join(r"(?:[^\n]*\n)*" if line == ANYTHING else _line_pattern(line) + r"[ \t]*\n" for line in expected)
    text = "".join(f"{line.rstrip()}\n" for line in printed).rstrip("\n") + "\n" if printed else ""
    return re.fullmatch(pattern, text) is not None


def begins(expected: Sequence[str], printed: Sequence[str]) -> bool:
    """Whether the first lines of ``printed`` are what the page says: for commands that run on."""
    return any(matches(expected, printed[:count]) for count in range(len(printed) + 1))


def _line_pattern(line: str) -> str:
    # kubectl's columns are as wide as their contents, and the page's contents are others: blanks match blanks.
    parts = [re.escape(part) for part in re.split(r"\s{2,}", line)]
    return r"[ ]{2,}".join(parts).replace(re.escape(ANYTHING), r"[^\n]*")
