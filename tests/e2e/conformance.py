"""Writes ``docs/node-conformance.md`` from the case files: ``python -m tests.e2e.conformance``.

What the page says is supported is exactly what a test shows; what a module cannot have is listed by hand, in
``cannot.yaml``, with its reason. A test compares the page with what this makes.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import yaml

from tests.e2e.casefiles import load

PAGE = Path(__file__).resolve().parents[2] / "docs" / "node-conformance.md"
CANNOT = Path(__file__).with_name("cannot.yaml")
_HEAD = """\
# What the node supports

This page is made from the end-to-end cases (`tests/e2e/cases/`) by `python -m tests.e2e.conformance`. Each line is a
test that runs on a real cluster. The right-hand column names the test of Kubernetes that says the same, where there is
one: what a wasm module can satisfy of it holds with the same fields, reasons, messages and events. Lines marked with
**C** run a second time with the same program as a component of WASI 0.2.
"""


def page() -> str:
    """The whole page."""
    all_cases = load()
    twice = {case.name for case in all_cases if case.also_component}
    cases = [case for case in all_cases if not (case.component and case.name in twice)]
    parts = [_HEAD]
    for area, found in groupby(cases, key=lambda case: case.area):
        parts += [f"\n## {area}\n", "| What holds | Kubernetes' own test |", "| --- | --- |"]
        for case in found:
            note = f" ({case.note})" if case.note else ""
            mark = " **C**" if case.also_component else ""
            parts.append(f"| {_cell(case.name + note + mark)} | {_cell(case.kubernetes)} |")
    parts += [
        "\n## What does not hold for a wasm module\n",
        "| Field or feature | What happens | Why |",
        "| --- | --- | --- |",
    ]
    for entry in yaml.safe_load(CANNOT.read_text()):
        parts.append(f"| {_cell(entry['what'])} | {_cell(entry['happens'])} | {_cell(entry['why'])} |")
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(page())
