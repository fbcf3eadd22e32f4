"""The reference of the tasks in ``docs/harness.md``, made from ``tasks.py``: ``python -P -m wasilet_dev.docs_tasks``.

Text that is written twice disagrees with itself sooner or later, so what ``--help`` prints is the source, and a unit
test compares the page with it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from wasilet.errors import UsageError
from wasilet.storage import write_file

BEGIN = "<!-- made by python -P -m wasilet_dev.docs_tasks: begin -->"
END = "<!-- made by python -P -m wasilet_dev.docs_tasks: end -->"


def checkout() -> Path:
    """The folder of the sources. Raises UsageError in an installed package, which has no pages."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "docs" / "conf.py").is_file():
        raise UsageError("the documentation is part of a checkout, not of the installed package")
    return root


def page() -> Path:
    """Where the reference stands."""
    return checkout() / "docs" / "harness.md"


def reference() -> str:
    """Markdown: a section a task, in the order of ``tasks.py``."""
    return "\n\n".join("\n".join(_section(task)) for task in tasks()) + "\n"


def updated(text: str) -> str:
    """A page with the reference between its two marks. Raises UsageError when it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError("docs/harness.md has lost the marks between which the reference of the tasks stands")
    return f"{before}{BEGIN}\n\n{reference()}\n{END}{after}"


def write() -> bool:
    """Bring the page up to date; whether it changed."""
    old = page().read_text()
    new = updated(old)
    if new != old:
        write_file(page(), new.encode(), mode=0o644)
    return new != old


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tasks", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tasks() -> list[Any]:
    """The tasks of ``tasks.py``, in its order."""
    from invoke.tasks import Task

    return [value for value in vars(_load(checkout() / "tasks.py")).values() if isinstance(value, Task)]


def _section(task: Any) -> Iterator[str]:
    yield f"### `{task.name.rstrip('_').replace('_', '-')}`"
    yield ""
    text, _, examples = (inspect.getdoc(task.body) or "").partition("\n\nExample")
    yield text
    # Invoke hands the help texts out, and has none left the second time: so a process whose command line it has parsed
    # cannot make this page any more.
    texts = dict(task.help)
    arguments = task.get_arguments()
    task.help = texts
    given = [argument for argument in arguments if argument.name in task.positional]
    options = [argument for argument in arguments if argument.name not in task.positional]
    if given or options:
        yield from ("", "| option | meaning |", "| --- | --- |")
    for argument in given:
        yield f"| `{argument.name.replace('_', '-').upper()}` | {_cell(argument.help)} |"
    for argument in options:
        yield f"| {_flags(argument)} | {_cell(argument.help)} |"
    if examples:
        lines = inspect.cleandoc(examples.partition("\n")[2]).splitlines()
        yield from ("", "```text", *lines, "```")


def _flags(argument: Any) -> str:
    long, *short = (name.replace("_", "-") for name in sorted(argument.names, key=len, reverse=True))
    value = "" if argument.kind is bool else f" {'N' if argument.kind is int else 'TEXT'}"
    names = [f"`{'--' if len(long) > 1 else '-'}{long}{value}`", *(f"`-{name}`" for name in short)]
    return ", ".join(names)


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


def main(words: Sequence[str] = ()) -> int:
    """Write the page; with ``--check`` only compare it, and 1 when it is out of date."""
    if list(words) == ["--check"]:
        text = page().read_text()
        if updated(text) == text:
            return 0
        sys.stderr.write(f"{page()} is out of date: type python -P -m wasilet_dev.docs_tasks\n")
        return 1
    changed = write()
    sys.stderr.write(f"{page()}: {'written' if changed else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
