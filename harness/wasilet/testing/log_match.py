"""What a log must and must not hold, judged line by line as it comes, and reported as text when it does not.

Pure: no cluster, no clock. A log of a million lines is looked at once, whatever the number of waits.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Text = str | re.Pattern[str]
"""A piece of a line, or a regular expression that is found in it."""

KEPT_FORBIDDEN = 10
"""Of the lines that hold what must be absent so many are remembered, and all are counted."""

MIN_LIKENESS = 0.5
MAX_COMPARED_LINES = 300
MAX_COMPARED_CHARACTERS = 500


def texts(given: Text | Iterable[Text] | None, *, pattern: bool = False) -> tuple[Text, ...]:
    """One or several, as a person writes them. ``pattern``: strings are regular expressions. Raises ValueError for an
    empty text, which every line holds, and for an expression that is none; TypeError for what is no text."""
    if given is None:
        return ()
    several = (given,) if isinstance(given, str | re.Pattern) else tuple(given)
    made: list[Text] = []
    for text in several:
        if not isinstance(text, str | re.Pattern):
            raise TypeError(f"{text!r} is neither a text nor a regular expression")
        if not (text if isinstance(text, str) else text.pattern):
            raise ValueError("an empty text is in every line: it asserts nothing")
        try:
            made.append(re.compile(text) if pattern and isinstance(text, str) else text)
        except re.error as error:
            raise ValueError(f"{text!r} is no regular expression: {error}") from error
    return tuple(made)


@dataclass
class Wanted:
    """One thing that the log must hold."""

    how: str
    """``contains``, ``matches`` or ``in order``."""

    text: Text
    line: int | None = None
    """The number (from 1) of the line that has it, once there is one."""

    words: str = ""
    """For messages, where the usual ones do not fit."""

    def __str__(self) -> str:
        """For messages."""
        if self.words:
            return self.words
        what = self.text if isinstance(self.text, str) else self.text.pattern
        return f"{self.how} {what!r}"


@dataclass(frozen=True)
class JudgeState:
    """What a judge knows at some line of the log."""

    seen: int
    next: int
    lines: tuple[int | None, ...]
    forbidden: tuple[tuple[int, Text], ...]
    forbidden_count: int


@dataclass
class Judge:
    """Takes lines and knows what is still missing."""

    contains: Sequence[Text] = ()
    in_order: Sequence[Text] = ()
    absent: Sequence[Text] = ()
    wanted: list[Wanted] = field(default_factory=list)
    forbidden: list[tuple[int, Text]] = field(default_factory=list)
    """Line number and text of what must not be there, and is: the first :data:`KEPT_FORBIDDEN`."""

    forbidden_count: int = 0
    seen: int = 0
    _next: int = 0
    _ordered: list[Wanted] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises ValueError when nothing is asserted."""
        if not (self.contains or self.in_order or self.absent):
            raise ValueError("nothing is asserted: give contains, matches, in_order or absent")
        for text in self.contains:
            self.wanted.append(Wanted("contains" if isinstance(text, str) else "matches", text))
        self._ordered = [Wanted("in order", text) for text in self.in_order]
        self.wanted += self._ordered

    def feed(self, lines: Iterable[str]) -> None:
        """The next lines of the log."""
        anywhere = [want for want in self.missing if want.how != "in order"]
        for line in lines:
            self.seen += 1
            for want in anywhere:
                if want.line is None and found(want.text, line):
                    want.line = self.seen
            if self._next < len(self._ordered) and found(self._ordered[self._next].text, line):
                self._ordered[self._next].line = self.seen
                self._next += 1
            for text in self.absent:
                if found(text, line):
                    self.forbidden_count += 1
                    if len(self.forbidden) < KEPT_FORBIDDEN:
                        self.forbidden.append((self.seen, text))

    def state(self) -> JudgeState:
        """To return to with :meth:`restore`."""
        lines = tuple(want.line for want in self.wanted)
        return JudgeState(self.seen, self._next, lines, tuple(self.forbidden), self.forbidden_count)

    def restore(self, state: JudgeState) -> None:
        """As if nothing had been fed since."""
        self.seen, self._next, self.forbidden_count = state.seen, state.next, state.forbidden_count
        self.forbidden = list(state.forbidden)
        for want, line in zip(self.wanted, state.lines, strict=True):
            want.line = line

    @property
    def missing(self) -> list[Wanted]:
        """What no line has had yet."""
        return [want for want in self.wanted if want.line is None]

    @property
    def only_absent(self) -> bool:
        """Whether nothing has to come: then only the end of the log is a proof."""
        return not self.wanted


def found(text: Text, line: str) -> bool:
    """Whether a line has it."""
    return text in line if isinstance(text, str) else text.search(line) is not None


def explain(judge: Judge, lines: Sequence[str]) -> list[str]:
    """Each assertion with how it went; below a missing one, the line that is most like it, marked where it differs."""
    said = []
    for want in judge.wanted:
        if want.line is not None:
            said.append(f"  found    {want}  (line {want.line})")
            continue
        said.append(f"  MISSING  {want}")
        said += [f"           {line}" for line in _nearest(want, lines, judge)]
    said += [f"  PRESENT  absent {quoted(text)}  (line {number})" for number, text in judge.forbidden]
    if judge.forbidden_count > len(judge.forbidden):
        said.append(f"           and {judge.forbidden_count - len(judge.forbidden)} more")
    hit = {quoted(text) for _, text in judge.forbidden}
    said += [f"  absent   {quoted(text)}" for text in judge.absent if quoted(text) not in hit]
    return said


def quoted(text: Text) -> str:
    """A text or pattern as messages show it."""
    return repr(text if isinstance(text, str) else text.pattern)


def _nearest(want: Wanted, lines: Sequence[str], judge: Judge) -> list[str]:
    if want.how == "in order":
        elsewhere = next((number for number, line in enumerate(lines, 1) if found(want.text, line)), None)
        if elsewhere is not None:
            before = [other for other in judge.wanted if other.how == "in order" and other.line is not None]
            after = f"after line {before[-1].line}" if before else "there"
            return [f"line {elsewhere} has it, but it is wanted {after}, in the order that was given"]
    if not isinstance(want.text, str):
        return []
    expected = want.text[:MAX_COMPARED_CHARACTERS]
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(expected)
    best, best_line, best_number = MIN_LIKENESS, "", 0
    shown = lines[-MAX_COMPARED_LINES:]
    for number, line in enumerate(shown, len(lines) - len(shown) + 1):
        matcher.set_seq1(line[:MAX_COMPARED_CHARACTERS])
        if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best and matcher.ratio() > best:
            best, best_line, best_number = matcher.ratio(), line[:MAX_COMPARED_CHARACTERS], number
    if not best_number:
        return []
    return [f"line {best_number} is most like it:", *_marked(expected, best_line)]


def _marked(expected: str, got: str) -> list[str]:
    """Both texts, and under each a caret where they differ."""
    return [line.rstrip("\n") for line in difflib.ndiff([expected + "\n"], [got + "\n"])]


def numbered(lines: Sequence[str], judge: Judge, *, shown: int) -> list[str]:
    """The end of the log with line numbers; a ``>`` before each line that an assertion refers to."""
    first = max(0, len(lines) - shown)
    marked = {want.line for want in judge.wanted if want.line}
    marked |= {n for n, line in enumerate(lines[first:], first + 1) if any(found(text, line) for text in judge.absent)}
    width = len(str(len(lines)))
    said = [f"  ... {first} lines before ..."] if first else []
    for number, line in enumerate(lines[first:], first + 1):
        said.append(f"  {'>' if number in marked else ' '} {number:>{width}}  {printable(line)}")
    return said


def printable(line: str) -> str:
    """A line whose control characters cannot move the cursor of who reads it."""
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line)
