"""What a run of the suite showed, from ginkgo's JSON report, and the page that tells it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.rigs.conformance.suite import HERE

_INTRODUCTION = """\
Made by `python -m tests.rigs.conformance.run --minor {minor} --page`, from one or more runs: the end-to-end tests of
Kubernetes {version}, as they are, those labelled Conformance or NodeConformance, on a cluster whose only nodes are two
wasm nodes. The images they ask for (agnhost, busybox, pause, nginx...) are one
[program](../tests/rigs/conformance/standin/src/main.rs) that stands in for them: a component, which really serves and
connects, where tests reach for the network, and else a module.
What a module cannot do is left out by name, each with its reason, in
[selection.yaml](../tests/rigs/conformance/selection.yaml); a stand-in never claims what it did not do.
"""
_GROUP = re.compile(r"\[(sig-[a-z-]+)\] ")
_ALL_MARKS = re.compile(r" \[[^\]]*\]")
_MARKS = re.compile(r" \[(?:Conformance|NodeConformance|LinuxOnly)\]")


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Tests that a wasm node cannot pass, and why."""

    reason: str
    tests: tuple[str, ...]
    """Parts of full names."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which tests are run: ``selection.yaml``."""

    labels: str
    groups: tuple[str, ...]
    skips: tuple[Skip, ...]

    @classmethod
    def load(cls, path: Path = HERE / "selection.yaml") -> Selection:
        """Raises OSError, KeyError."""
        data = yaml.safe_load(path.read_text())
        skips = tuple(Skip(reason=skip["reason"], tests=tuple(skip["tests"])) for skip in data["skips"])
        return cls(labels=data["labels"], groups=tuple(data["groups"]), skips=skips)

    def reason(self, name: str) -> str:
        """Why a test is not run; empty when it is."""
        return next((skip.reason for skip in self.skips if any(part in name for part in skip.tests)), "")

    def stale(self, names: Sequence[str]) -> list[str]:
        """Parts of names that match no test: a misspelt one would skip nothing, unseen."""
        parts = [part for skip in self.skips for part in skip.tests]
        return [part for part in parts if not any(part in name for name in names)]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One test. ``state``: passed, failed, skipped (by the test itself) or excluded (by the selection)."""

    name: str
    state: str
    seconds: float = 0.0
    why: str = ""

    @property
    def group(self) -> str:
        """``sig-node`` and the like."""
        found = _GROUP.match(self.name)
        return found.group(1) if found else "other"

    @property
    def title(self) -> str:
        """The name without the group and without what all share."""
        return _MARKS.sub("", _GROUP.sub("", self.name)).strip()


def read(path: Path, selection: Selection) -> list[Result]:
    """The results of the tests that ``selection`` speaks of. Raises OSError, ValueError."""
    found: dict[str, Result] = {}
    for suite in json.loads(path.read_text()):
        for spec in suite.get("SpecReports") or []:
            if spec["LeafNodeType"] == "It" and (result := _result(spec, selection)) is not None:
                found[result.name] = result
    return sorted(found.values(), key=lambda result: result.name)


def _result(spec: Mapping[str, Any], selection: Selection) -> Result | None:
    name = " ".join([*(spec.get("ContainerHierarchyTexts") or []), spec["LeafNodeText"]])
    labels = {label for found in spec.get("ContainerHierarchyLabels") or [] for label in found or []}
    labels |= set(spec.get("LeafNodeLabels") or [])
    group = _GROUP.match(name)
    if group is None or group.group(1) not in selection.groups or not labels & {"Conformance", "NodeConformance"}:
        return None
    seconds = spec.get("RunTime", 0) / 1e9
    state, failure = spec["State"], spec.get("Failure") or {}
    message = " ".join(str(failure.get("Message", "")).split())[:400]
    if state == "passed":
        return Result(name=name, state="passed", seconds=seconds)
    if state == "skipped" and message:
        return Result(name=name, state="skipped", why=message)
    if state in {"skipped", "pending"}:
        reason = selection.reason(name)
        return Result(name=name, state="excluded", why=reason) if reason else None
    return Result(name=name, state="failed", seconds=seconds, why=message or state)


def merged(results: Sequence[Result], earlier: Sequence[Result]) -> list[Result]:
    """``results``, and of ``earlier`` what was not run this time."""
    names = {result.name for result in results if result.state in {"passed", "failed"}}
    kept = [result for result in earlier if result.name not in names]
    known = names | {result.name for result in kept}
    added = [result for result in results if result.name in names or result.name not in known]
    return sorted([*kept, *added], key=lambda result: result.name)


def failures(results: Sequence[Result]) -> list[Result]:
    """Those that were to pass and did not."""
    return [result for result in results if result.state == "failed"]


def plain(name: str) -> str:
    """A full name without marks such as ``[Slow]``, whose choice and order change from one minor to the next."""
    return _ALL_MARKS.sub("", name)


def new_names(names: Sequence[str], before: Sequence[str]) -> list[str]:
    """Of ``names``, without marks, those that ``before`` has not."""
    return sorted({plain(name) for name in names} - {plain(name) for name in before})


def page(
    results: Sequence[Result],
    *,
    version: str,
    new: Sequence[str] = (),
    before: str = "",
    groups: Sequence[str] = (),
    part: str = "",
) -> str:
    """A minor's page. ``groups``: those that were to be run; it names the ones of which nothing was. ``new``: the names
    of what is new since the release ``before``. ``part``: what was chosen, where that was not all."""
    return "\n".join((*_lines(results, version, groups, part), *_new_lines(results, new, before))) + "\n"


def _new_lines(results: Sequence[Result], new: Sequence[str], before: str) -> Iterator[str]:
    states = {
        "passed": "passed",
        "failed": "failed",
        "skipped": "skipped by the test",
        "excluded": "cannot be for wasm",
    }
    found = {plain(result.name): states[result.state] for result in results}
    groups = {result.group for result in results}
    chosen = [name for name in new if (match := _GROUP.match(name)) and match.group(1) in groups]
    if before:
        yield from ("", f"## Conformance tests that {before} did not have, of these groups", "")
        yield from (f"- {name.replace('[', '').replace(']', ':', 1)}: {found.get(name, 'not run')}" for name in chosen)
        if not chosen:
            yield "None."


def _lines(results: Sequence[Result], version: str, wanted: Sequence[str], part: str) -> Iterator[str]:
    states = ("passed", "failed", "skipped", "excluded")
    counts = Counter((result.group, result.state) for result in results)
    groups = sorted({result.group for result in results})
    yield f"# Kubernetes' own tests on a Wasilet node: {version}"
    yield ""
    yield from _INTRODUCTION.format(version=version, minor=version.rpartition(".")[0]).splitlines()
    yield ""
    if part:
        yield from (f"Of these a part was run: {part}.", "")
    ran = {result.group for result in results if result.state in {"passed", "failed"}}
    if missing := [group for group in wanted if group not in ran]:
        yield from (f"Not run on this version yet: {', '.join(missing)}.", "")
    yield "| group | passed | failed | skipped by the test | cannot be for wasm |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for group in groups:
        yield f"| {group} | " + " | ".join(str(counts[group, state]) for state in states) + " |"
    totals = [sum(counts[group, state] for group in groups) for state in states]
    yield "| **all** | " + " | ".join(f"**{total}**" for total in totals) + " |"
    for heading, state in (("Failed", "failed"), ("Skipped by the test itself", "skipped")):
        chosen = [result for result in results if result.state == state]
        if chosen:
            yield from ("", f"## {heading}", "")
            yield from (f"- {result.group}: {result.title} ({_cell(result.why)})" for result in chosen)
    yield from ("", "## What cannot be for wasm", "")
    by_reason: dict[str, list[Result]] = {}
    for result in results:
        if result.state == "excluded":
            by_reason.setdefault(result.why, []).append(result)
    for reason, chosen in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        yield f"**{reason}** ({len(chosen)})"
        yield ""
        yield from (f"- {result.group}: {result.title}" for result in chosen)
        yield ""
    yield from ("## Passed", "")
    yield from (f"- {result.group}: {result.title}" for result in results if result.state == "passed")


def _cell(text: str) -> str:
    """Text of a failure without what Markdown or HTML would take for its own."""
    return re.sub(r"[<>`*_|\[\]]", " ", text)[:200].strip()
