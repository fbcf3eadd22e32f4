"""The tasks for those who work on Wasilet itself; an installed Wasilet does not have them."""

from __future__ import annotations

import os

from invoke.context import Context
from invoke.tasks import task
from wasilet.tasks.help_texts import OUTPUT_HELP
from wasilet.terminal.cli import (
    checked_output,
    command,
    emit,
    emit_json,
    exec_program,
    finish,
    remainder,
    reporter,
    settings_of,
)


@task
@command
def docs(c: Context) -> None:
    """Build this project's documentation as a site, strictly.

    Prints the first page's path. The tools are locked in requirements-docs.lock and get an environment of their own.

    Example:
      xdg-open $(invoke docs)
    """
    from wasilet_dev.docs_site import build_site, site

    finish(build_site(environ=os.environ, reporter=reporter()))
    emit(str(site() / "index.html"))


@task(
    positional=["what"],
    auto_shortflags=False,
    help={
        "what": "up (the command line), pods (what the node does), "
        "floor (the node beside the least that a node must do) or http (what serves)",
        "runs": "bench up, floor, http, network: how often (default: 3); medians are printed; "
        "bench growth: how many of the sizes 1, 3 and 10 nodes",
        "pods": "bench pods: how many are run one after another to watch the agent's memory (default: 300); "
        "bench floor: how many are a burst (default: 100); "
        "bench growth: the most of 10, 100 and 1,000 (default: 1,000); "
        "bench http: how many serve at the same time (default: 20); "
        "bench network: how many are all reached (default: 500)",
        "write": "bench floor: write docs/benchmarks.md, its chart and its JSON (bursts of 100 and of 500); "
        "bench growth: write docs/growth.md",
        "output": OUTPUT_HELP,
    },
)
@command
def bench(c: Context, what: str, runs: int = 3, pods: int = 0, *, write: bool = False, output: str = "text") -> None:
    """Measure this machine and print the figures beside the targets; judges nothing.

    A cluster of its own is brought up and taken down again. floor has the node take turns with two stand-ins that only
    write what a kubelet writes: the ratios hold on a busy machine too. http compares the component host with `wasmtime
    serve` and takes about ten minutes. network starts pods with and without a pod network in turns, and connects pods
    beside native processes in their namespaces; it takes root. growth has the API server count what nodes and pods ask
    of it, at 1, 3 and 10 nodes with 10, 100 and 1,000 pods.

    Examples:
      invoke bench pods
      invoke bench pods --pods 10000     half an hour; is memory flat?
      invoke bench up --runs 5
      invoke bench floor --pods 500
      invoke bench floor --write
      invoke bench growth --runs 2 --pods 100
      invoke bench http --pods 500
      invoke bench network
    """
    from wasilet_dev.benchmarks import figures

    checked_output(output)
    measured = figures(what, settings_of(c), runs=runs, pods=pods, reporter=reporter(), write=write)
    if output == "json":
        emit_json([figure.to_json() for figure in measured])
        return
    for figure in measured:
        emit(figure.line())


@task
@command
def versions(c: Context) -> None:
    """Compare the pinned versions with what the Go module proxy has.

    Changes nothing; docs/versions.md says how a newer one is taken in.

    Example:
      invoke versions
    """
    from wasilet_dev.versions import proposals

    for proposal in proposals(dict(os.environ)):
        emit(proposal.line())


@task
@command
def lint(c: Context) -> None:
    """Check style, types and import contracts of this project.

    Example:
      invoke lint
    """
    from wasilet_dev.test_runner import lint as check_project

    check_project()


@task(
    help={
        "m": "only tests with these markers, as `-m e2e` or `-m 'unit or component'`",
        "k": "only tests whose name matches",
        "provider": "the provider that e2e tests bring up (default: host)",
    }
)
@command
def test(c: Context, m: str = "", k: str = "", provider: str = "") -> None:
    """Run the tests, having brought what they need.

    Paths and other options of pytest follow --.

    Examples:
      ./run test                                     all of them
      ./run test -m e2e -k hello tests/e2e           (run puts the -- in by itself)
      invoke test -m unit -- tests/unit -x -q
    """
    from wasilet_dev.test_runner import pytest_command

    words = (["-m", m] if m else []) + (["-k", k] if k else []) + remainder()
    argv, env = pytest_command(settings_of(c, provider=provider), words, reporter=reporter())
    exec_program(argv, env=env)
