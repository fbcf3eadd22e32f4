"""Kubernetes' own end-to-end tests on a cluster whose only nodes are wasm nodes; by command only, as they take an hour.

``WASILET_CONFORMANCE_MINOR`` names the minor of cluster and tests, else it is the newest. ``WASILET_CONFORMANCE_FOCUS``
is a regular expression for a part of them; only a whole run writes the page.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.rigs.conformance import report, suite
from tests.rigs.conformance.run import own_cluster, run, write_page

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_what_a_wasm_node_can_do_it_does_as_kubernetes_tests_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    focus = os.environ.get("WASILET_CONFORMANCE_FOCUS", "")

    def say(line: str) -> None:
        with capfd.disabled():
            sys.stderr.write(f"conformance: {line}\n")

    pinned = suite.pin(os.environ.get("WASILET_CONFORMANCE_MINOR", ""))
    with own_cluster(pinned) as cluster:
        results = run(cluster, pinned=pinned, folder=tmp_path, focus=[focus] if focus else [], say=say)
    if not focus:
        write_page(results, pinned)
    assert any(result.state == "passed" for result in results)
    failed = report.failures(results)
    assert not failed, "\n".join(f"{result.name}: {result.why}" for result in failed)
