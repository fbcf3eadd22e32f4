"""``./run test``: pytest with its own options, after what the chosen tests need has been installed.

Binaries may take minutes the first time. That is better seen here, with progress, than in a fixture that pytest
captures the output of.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wasilet import process
from wasilet.controlplane.binaries import HOST_PROVIDER, LATER
from wasilet.errors import HarnessError, UsageError
from wasilet.settings import Settings, load
from wasilet.steps import Finding, Play, Progress, Step

if TYPE_CHECKING:
    from wasilet.steps import Reporter

LINT_TIMEOUT_SECONDS = 600.0
BINARIES = (*HOST_PROVIDER, *LATER)


def pytest_command(settings: Settings, words: Sequence[str], *, reporter: Reporter) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of the pytest run. ``words``: as typed, with ``--provider`` among them where
    it was given there. Raises UsageError, and HarnessError when a binary cannot be had."""
    words = list(words)
    provider = _taken(words, "--provider")
    if provider:
        settings = load(environ=settings.environ, provider=provider)
    from wasilet.providers import by_name

    by_name(settings.provider)
    root = Path(__file__).resolve().parents[2]
    if not (root / "tests").is_dir():
        raise UsageError("the tests are part of a checkout, not of the installed package")
    if needs_binaries(words):
        play = Play("what the tests need", [_binaries_step(settings)])
        play.run(reporter=reporter).raise_for_failure()
    env = {**settings.environ, "WASILET_PROVIDER": settings.provider}
    if "slow" in " ".join(words):
        words += ["-o", "faulthandler_timeout=0"]  # the limit on one test that keeps a hang from lasting for ever
    return [sys.executable, "-P", "-m", "pytest", *_paths(words, settings)], env


def needs_binaries(words: Sequence[str]) -> bool:
    """Unless only unit tests are chosen, by marker or by path."""
    if any(word in {"--collect-only", "--co", "--help", "-h", "--markers", "--fixtures"} for word in words):
        return False
    if any(first == "-m" and second.strip() == "unit" for first, second in itertools.pairwise(words)):
        return False
    paths = [word for word in words if not word.startswith("-") and word.partition("::")[0].startswith("tests")]
    return not paths or not all(path.startswith("tests/unit") for path in paths)


def _paths(words: Sequence[str], settings: Settings) -> list[str]:
    """Paths as typed are relative to where ``run`` was called; pytest starts in the checkout."""
    base = settings.environ.get("WASILET_INVOCATION_DIR")
    if not base:
        return list(words)
    changed = []
    for word in words:
        path, separator, rest = word.partition("::")
        there = Path(base) / path
        known = bool(path) and not path.startswith("-") and not Path(path).exists() and there.exists()
        changed.append(f"{there}{separator}{rest}" if known else word)
    return changed


def _taken(words: list[str], option: str) -> str:
    """Remove ``option VALUE`` or ``option=VALUE`` from the words and return the value."""
    for index, word in enumerate(words):
        if word == option:
            if index + 1 >= len(words):
                raise UsageError(f"{option} needs a value")
            value = words[index + 1]
            del words[index : index + 2]
            return value
        if word.startswith(f"{option}="):
            del words[index]
            return word.partition("=")[2]
    return ""


def _binaries_step(settings: Settings) -> Step:
    from wasilet.controlplane.acquire import acquire, locate

    def look() -> Finding:
        missing = [n for n in BINARIES if locate(n, cache=settings.cache, environ=settings.environ) is None]
        return Finding.differs(f"acquire {', '.join(missing)}") if missing else Finding.ok(f"{len(BINARIES)} found")

    def change(progress: Progress) -> str:
        found = acquire(
            BINARIES,
            cache=settings.cache,
            environ=settings.environ,
            progress=progress,
            mirror=settings.mirror,
            allow_download=settings.download,
        )
        return ", ".join(f"{name} ({binary.source})" for name, binary in found.items())

    return Step(name="binaries", look=look, change=change)


def lint() -> None:
    """Ruff, mypy and import-linter over the checkout, each to its end so that one run shows everything. Raises
    HarnessError naming those that found something."""
    root = Path(__file__).resolve().parents[2]
    bin_folder = Path(sys.executable).parent
    commands = (
        ("ruff check", ("ruff", "check", ".")),
        ("ruff format", ("ruff", "format", "--check", ".")),
        ("mypy", ("mypy",)),
        ("import-linter", ("lint-imports",)),
    )
    failed = []
    for name, (program, *arguments) in commands:
        sys.stderr.write(f"lint: {name}\n")
        done = process.run(
            [bin_folder / program, *arguments], timeout_seconds=LINT_TIMEOUT_SECONDS, cwd=root, check=False
        )
        if done.returncode != 0:
            failed.append(name)
            sys.stdout.write(done.stdout + done.stderr)
    if failed:
        raise HarnessError(f"{', '.join(failed)} found something: see above")
