"""``docs/benchmarks.md`` and its chart, written from what ``invoke bench floor`` measured."""

from __future__ import annotations

import datetime as dt
import html
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet_dev.bench_floor import EVENTS, HEADINGS, NODE, STATUS, Row

PAGE = "benchmarks.md"
CHART = "benchmarks.svg"
RECORD = "benchmarks.json"

LIMITS = {
    "create to Running": "scheduler, binding and one status patch are the floor; above it: the service account's "
    "token, volumes, the pod's network, the supervisor's answer.",
    "delete to gone": "the last status, then the deletion in the API server, as every kubelet does it; the stand-in "
    "that only patches status leaves the former out.",
    "burst": "processor time: all cores are full. What the API server does per pod is the largest part.",
    "CPU per start": "what the API server takes follows from the number of writes per pod.",
    "CPU per end": "the sandboxes' share is the kernel's: it takes their memory apart.",
}
_ABOUT = """\
Written by `./run bench floor --write`; do not edit. `ratio` is the node's figure by that of the floor with Events,
`reach` what the project aims at."""
_BUSY = """\
**The machine had other work to do** (load {load:g} before the benchmark began): read the ratios, which come from
alternating rounds, and not the absolute figures. Those of processor time vary little; those of bursts (one per round)
and of p99 are rough even so."""
_METHOD = """\
Three agents take turns on one cluster. The *floor* runs nothing and only reports each pod as Running; the *floor with
Events* also writes the three Events of a start, the last status and the Event of an end, which a kubelet must.
Scheduler, API server and etcd are the same for all."""

_WIDTH, _LABEL, _BAR, _GAP, _TOP = 760, 250, 14, 12, 34
_COLOURS = {NODE: "#4c6ef5", STATUS: "#adb5bd", EVENTS: "#868e96"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the figures are of."""

    processor: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    load: float
    """Of the last minute, before the benchmark began: above the number of cores the absolute figures mean little."""

    versions: Mapping[str, str]
    date: str


def machine_now(versions: Mapping[str, str]) -> Machine:
    """This one."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory, 1),
        kernel=platform.release().split("-")[0],
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 1),
        versions=versions,
        date=dt.datetime.now(dt.UTC).strftime("%d %B %Y"),
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def write(docs: Path, machine: Machine, tables: Mapping[int, Sequence[Row]], *, rounds: int) -> list[Path]:
    """The page, the chart and the figures as JSON; ``tables`` by the size of the burst. Raises OSError."""
    contents = {
        PAGE: page(machine, tables, rounds=rounds),
        CHART: chart(next(iter(tables.values()))),
        RECORD: json.dumps(record(machine, tables, rounds=rounds), indent=1) + "\n",
    }
    for name, text in contents.items():
        (docs / name).write_text(text, encoding="utf-8")
    return [docs / name for name in contents]


def record(machine: Machine, tables: Mapping[int, Sequence[Row]], *, rounds: int) -> dict[str, Any]:
    """For programs."""
    return {
        "machine": {**vars(machine), "versions": dict(machine.versions)},
        "rounds": rounds,
        "bursts": {str(pods): [row.to_json() for row in rows] for pods, rows in tables.items()},
    }


def measured_on(machine: Machine) -> str:
    """One sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"Measured on {machine.date}: {machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB, Linux "
        f"{machine.kernel}, Python {machine.python}; {versions}."
    )


def page(machine: Machine, tables: Mapping[int, Sequence[Row]], *, rounds: int) -> str:
    """The page, in Markdown."""
    measured = f"{measured_on(machine).removesuffix('.')}; {rounds} rounds."
    picture = f"![Create to Running, bursts and processor time per pod, beside the floor]({CHART})"
    busy = [_BUSY.format(load=machine.load)] if machine.load > machine.cores / 2 else []
    parts = ["# Benchmarks", _ABOUT, measured, *busy, _METHOD, picture]
    for pods, rows in tables.items():
        parts += [f"## Bursts of {pods}", _table(rows)]
    parts += ["## What limits each figure", "\n".join(f"- **{name}**: {text}" for name, text in LIMITS.items())]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> str:
    head = ["", "unit", *HEADINGS]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {row.name} | {row.unit} | {' | '.join(row.cells())} |" for row in rows]
    return "\n".join(lines)


def chart(rows: Sequence[Row]) -> str:
    """Bars of the three agents, each group to its own scale."""
    shown = [row for row in rows if not row.name.startswith("CPU") or row.name.endswith(": all")]
    height = _TOP + len(shown) * (len(_COLOURS) * _BAR + _GAP)
    drawn = [
        f'<rect x="{_LABEL + 170 * number}" y="6" width="12" height="12" fill="{colour}"/>'
        f'<text x="{_LABEL + 18 + 170 * number}" y="16">{html.escape(name)}</text>'
        for number, (name, colour) in enumerate(_COLOURS.items())
    ]
    y = _TOP
    for row in shown:
        most = max(row.values.values()) or 1.0
        drawn.append(f'<text x="4" y="{y + 26}">{html.escape(row.name)}</text>')
        for name, colour in _COLOURS.items():
            value = row.values.get(name, 0.0)
            width = round((_WIDTH - _LABEL - 110) * value / most, 1)
            drawn.append(f'<rect x="{_LABEL}" y="{y}" width="{width}" height="{_BAR - 2}" fill="{colour}"/>')
            text = html.escape(f"{value:.1f} {row.unit}")
            drawn.append(f'<text x="{_LABEL + width + 5}" y="{y + _BAR - 4}">{text}</text>')
            y += _BAR
        y += _GAP
    style = 'font-family="sans-serif" font-size="11"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" {style}>'
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )
