"""Command lines as pflag and cobra take them (k3d, minikube, kind and Docker are all built on these), checked strictly.

A stand-in is only worth something where it refuses what the real tool would refuse: an unknown command or flag, a
value that the flag does not take, an argument too many. What a tool takes is said as data, from its documentation.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

Check = Callable[[str], bool]


def matches(pattern: str) -> Check:
    """A value that a regular expression takes wholly."""
    return lambda value: re.fullmatch(pattern, value) is not None


def anything(value: str) -> bool:
    """Any value but an empty one."""
    return bool(value)


def existing_file(value: str) -> bool:
    """A file that is there."""
    return Path(value).is_file()


boolean = matches(r"true|false|1|0|t|f|T|F|TRUE|FALSE|True|False")
"""What Go's strconv.ParseBool takes."""

duration = matches(r"(\d+(\.\d+)?(ns|us|ms|s|m|h))+|0")
"""What Go's time.ParseDuration takes, without signs."""

number = matches(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag; given without a value only when it is a switch."""

    check: Check
    switch: bool = False
    repeatable: bool = False


def switch() -> Flag:
    """A boolean flag."""
    return Flag(check=boolean, switch=True)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a tool."""

    flags: Mapping[str, Flag]
    """By name with dashes; short ones too."""

    arguments: tuple[int, int] = (0, 0)
    """The least and the greatest number of positional arguments."""

    after_dashes: bool = False
    """Whether what follows ``--`` is the command's own affair."""


@dataclass(kw_only=True)
class Parsed:
    """What was typed."""

    command: tuple[str, ...]
    arguments: list[str] = field(default_factory=list)
    flags: dict[str, list[str]] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    """What follows ``--``."""

    def one(self, name: str, default: str = "") -> str:
        """The last value of a flag, which is the one that counts."""
        return self.flags.get(name, [default])[-1]


def refuse(message: str) -> NoReturn:
    """As cobra does."""
    sys.stderr.write(f"Error: {message}\n")
    sys.exit(1)


def parse(words: Sequence[str], commands: Mapping[tuple[str, ...], Command]) -> Parsed:
    """Find the command and check all that was typed. Leaves the process for what the tool would refuse."""
    name: tuple[str, ...] = ()
    rest = list(words)
    while rest and not rest[0].startswith("-") and any(c[: len(name) + 1] == (*name, rest[0]) for c in commands):
        name = (*name, rest.pop(0))
    if name not in commands:
        refuse(f"unknown command {' '.join(words[:3])!r}")
    command, parsed = commands[name], Parsed(command=name)
    while rest:
        word = rest.pop(0)
        if word == "--":
            if not command.after_dashes:
                refuse("accepts nothing after --")
            parsed.rest, rest = rest, []
        elif word.startswith("-") and len(word) > 1:
            _flag(word, rest, command, parsed)
        else:
            parsed.arguments.append(word)
    least, greatest = command.arguments
    if not least <= len(parsed.arguments) <= greatest:
        refuse(f"accepts between {least} and {greatest} arg(s), received {len(parsed.arguments)}")
    return parsed


def _flag(word: str, rest: list[str], command: Command, parsed: Parsed) -> None:
    name, equals, value = word.partition("=")
    flag = command.flags.get(name)
    if flag is None:
        refuse(f"unknown flag: {name}")
    if not equals:
        if flag.switch:
            value = "true"
        elif rest:
            value = rest.pop(0)
        else:
            refuse(f"flag needs an argument: {name}")
    if not flag.check(value):
        refuse(f'invalid argument "{value}" for "{name}" flag')
    if name in parsed.flags and not flag.repeatable:
        refuse(f"{name} is given twice")
    parsed.flags.setdefault(name, []).append(value)
