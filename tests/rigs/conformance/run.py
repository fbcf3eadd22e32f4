"""Runs Kubernetes' end-to-end tests against a cluster of Wasilet's.

``PYTHONPATH=. python -P -m tests.rigs.conformance.run`` brings up a cluster of its own and runs all that
``selection.yaml`` selects; ``--focus`` takes part of it, ``--cluster`` a cluster that runs already.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from wasilet import process
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.status import status
from wasilet.controlplane.acquire import acquire as acquire_binaries
from wasilet.errors import HarnessError
from wasilet.settings import cache_root, load

from tests.clusters import TestCluster, whole_cluster
from tests.rigs.conformance import images, report, suite

NODES = 2
"""Some of the tests look for a second one."""

LIMIT_SECONDS = 3 * 3600.0


def run(
    cluster: TestCluster,
    *,
    pinned: suite.Pin,
    folder: Path,
    focus: Sequence[str] = (),
    skip: Sequence[str] = (),
    procs: int = 2,
    say: Callable[[str], None],
) -> list[report.Result]:
    """Run the selection, or the part of it whose names match one of ``focus`` and none of ``skip``; logs and reports go
    to ``folder``. Raises HarnessError when the suite cannot be had or did not run."""
    selection = report.Selection.load()
    programs = suite.acquire(pinned, cache=cache_root(), say=say)
    kubectl = acquire_binaries(
        ["kubectl"], cache=cache_root(), environ=os.environ, progress=say, kubernetes=pinned.minor
    )["kubectl"]
    registry = str(cluster.status()["registry"])
    repository_list = folder / "repositories.yaml"
    repository_list.write_text(images.repositories(registry))
    pushed = images.push_images(programs, registry, repository_list, say=say, environ=cluster.settings.environ)
    say(f"{len(pushed)} images in {registry}; the log is {folder / 'log'}")
    skips = [re.escape(part) for entry in selection.skips for part in entry.tests] + list(skip)
    argv: list[str | Path] = [
        *(programs.ginkgo, f"--procs={procs}", "--no-color", f"--label-filter={selection.labels}"),
        *(f"--output-dir={folder}", "--json-report=report.json", f"--timeout={LIMIT_SECONDS:.0f}s", "-v"),
        *(f"--focus={words}" for words in focus or [rf"\[({'|'.join(selection.groups)})\] "]),
        *(f"--skip={words}" for words in skips),
        *(programs.tests, "--", f"--kubeconfig={cluster.admin_kubeconfig}", f"--kubectl-path={kubectl.path}"),
        *("--provider=skeleton", f"--num-nodes={NODES}", "--node-os-distro=custom", "--node-os-arch=custom"),
        *("--dump-logs-on-failure=false", "--minStartupPods=0", f"--e2e-output-dir={folder}"),
    ]
    with (folder / "log").open("w") as log:

        def on_line(line: str) -> None:
            log.write(line + "\n")
            if re.match(r"\S+ \[(FAILED|PANICKED|TIMEDOUT|INTERRUPTED)\]", line):
                say(line)

        process.run(
            argv,
            cwd=folder,
            env={**os.environ, "KUBE_TEST_REPO_LIST": str(repository_list)},
            timeout_seconds=LIMIT_SECONDS + 600,
            check=False,
            on_line=on_line,
        )
    results = report.read(folder / "report.json", selection)
    if not any(result.state in {"passed", "failed"} for result in results):
        raise HarnessError("no test was run", hint=f"see {folder / 'log'}")
    return results


def own_cluster(pinned: suite.Pin) -> contextlib.AbstractContextManager[TestCluster]:
    """One of the minor, for as long as it is open."""
    return whole_cluster("conformance", nodes=NODES, kubernetes_version=pinned.minor)


def write_page(results: Sequence[report.Result], pinned: suite.Pin, *, part: str = "") -> None:
    """The minor's page of ``docs``; ``part``: what was chosen, where that was not all. Raises HarnessError."""
    new = report.new_names(suite.conformance_names(pinned.version), suite.conformance_names(pinned.before))
    groups = report.Selection.load().groups
    text = report.page(results, version=pinned.version, new=new, before=pinned.before, groups=groups, part=part)
    pinned.page.write_text(text)


@contextlib.contextmanager
def _running(name: str) -> Iterator[TestCluster]:
    settings = load(environ=os.environ, name=name)
    status(settings)
    with open_cluster(settings) as cluster:
        yield TestCluster(settings, cluster)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    parser.add_argument("--focus", action="append", default=[], help="regular expression of names; repeatable")
    parser.add_argument("--skip", action="append", default=[], help="regular expression of names; repeatable")
    parser.add_argument("--procs", type=int, default=2, help="how many tests run at a time")
    parser.add_argument("--cluster", default="", help="the name of a cluster that runs; without, one is made")
    parser.add_argument("--folder", type=Path, help="where log and report go")
    parser.add_argument("--minor", default="", help=f"of Kubernetes: {', '.join(suite.minors())}; else the newest")
    parser.add_argument("--page", action="store_true", help="write the minor's page of docs")
    parser.add_argument("--part", default="", help="for the page: what was chosen, in words")
    parser.add_argument(
        "--earlier",
        action="append",
        default=[],
        type=Path,
        help="report.json of an earlier run: the page has its other tests too; repeatable, the newest first",
    )
    options = parser.parse_args()

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    pinned = suite.pin(options.minor)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="wasilet-conformance-"))
    folder.mkdir(parents=True, exist_ok=True)
    with _running(options.cluster) if options.cluster else own_cluster(pinned) as cluster:
        results = run(
            cluster,
            pinned=pinned,
            folder=folder.absolute(),
            focus=options.focus,
            skip=options.skip,
            procs=options.procs,
            say=say,
        )
    for earlier in options.earlier:
        results = report.merged(results, report.read(earlier, report.Selection.load()))
    if options.page:
        write_page(results, pinned, part=options.part)
    failed = report.failures(results)
    for result in failed:
        say(f"FAILED {result.name}: {result.why}")
    say(f"{sum(result.state == 'passed' for result in results)} passed, {len(failed)} failed; see {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
