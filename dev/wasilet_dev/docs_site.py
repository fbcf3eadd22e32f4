"""``./run docs``: the documentation as a site, by Sphinx with MyST, strict: a warning fails it.

Sphinx and what it needs are locked in ``requirements-docs.lock`` and installed into their own environment, named
by that file's hash, so that those who only run clusters never download them.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from wasilet import process
from wasilet.steps import Finding, Play, Progress, Recap, Step

from wasilet_dev.docs_tasks import checkout

if TYPE_CHECKING:
    from wasilet.steps import Reporter

INSTALL_TIMEOUT_SECONDS = 600.0
BUILD_TIMEOUT_SECONDS = 300.0
_COMPLETE = ".complete"


def site() -> Path:
    """The folder of the built site."""
    return checkout() / "site"


def build_site(*, environ: Mapping[str, str], reporter: Reporter) -> Recap:
    """Bring the reference up to date, have the tools, build the site. Raises UsageError outside a checkout."""
    root = checkout()
    lock = root / "requirements-docs.lock"
    key = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:16]
    tools = root / ".venvs" / f"docs-{key}"
    python = tools / "bin" / "python"

    # In a process of its own: Invoke has parsed the command line of this one, and with that used up the help texts.
    maker = [sys.executable, "-P", "-m", "wasilet_dev.docs_tasks"]

    def look_reference() -> Finding:
        done = process.run([*maker, "--check"], timeout_seconds=60, check=False, env=environ)
        return Finding.ok("up to date") if done.returncode == 0 else Finding.differs("write docs/harness.md")

    def change_reference(_: Progress) -> str:
        process.run(maker, timeout_seconds=60, env=environ)
        return "docs/harness.md"

    def look_tools() -> Finding:
        return Finding.ok(tools.name) if (tools / _COMPLETE).is_file() else Finding.differs(f"make {tools}")

    def change_tools(progress: Progress) -> str:
        shutil.rmtree(tools, ignore_errors=True)
        pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check"]
        progress("making an environment")
        process.run([sys.executable, "-P", "-m", "venv", "--without-pip", str(tools)], timeout_seconds=60, env=environ)
        progress("installing requirements-docs.lock")
        process.run(
            [
                *pip,
                "--python",
                str(tools / "bin" / "python"),
                "install",
                "--quiet",
                "--require-hashes",
                "-r",
                str(lock),
            ],
            timeout_seconds=INSTALL_TIMEOUT_SECONDS,
            env=environ,
        )
        (tools / _COMPLETE).touch()
        return tools.name

    def change_site(progress: Progress) -> str:
        progress("sphinx-build")
        sphinx = [str(python), "-P", "-m", "sphinx"]
        options = ["--builder", "dirhtml", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
        process.run(
            [*sphinx, *options, "--doctree-dir", str(root / "build" / "doctrees"), str(root / "docs"), str(site())],
            timeout_seconds=BUILD_TIMEOUT_SECONDS,
            env={**environ, "PYTHONPATH": ""},
        )
        return str(site() / "index.html")

    return Play(
        "documentation",
        [
            Step(name="reference of the tasks", look=look_reference, change=change_reference),
            Step(name="tools", look=look_tools, change=change_tools),
            Step(name="site", look=lambda: Finding.differs("build the site"), change=change_site),
        ],
    ).run(reporter=reporter)
