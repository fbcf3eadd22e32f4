"""Kubernetes' own end-to-end tests on a cluster whose only nodes are wasm nodes; by command only, as they take an hour.

``WASILET_CONFORMANCE_FOCUS`` is a regular expression for a part of them; only a whole run writes the page.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.clusters import whole_cluster
from tests.rigs.conformance import report
from tests.rigs.conformance.run import NODES, PAGE, run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_what_a_wasm_node_can_do_it_does_as_kubernetes_tests_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    focus = os.environ.get("WASILET_CONFORMANCE_FOCUS", "")

    def say(line: str) -> None:
        with capfd.disabled():
            sys.stderr.write(f"conformance: {line}\n")

    with whole_cluster("conformance", nodes=NODES) as cluster:
        results = run(cluster, folder=tmp_path, focus=[focus] if focus else [], say=say)
    if not focus:
        PAGE.write_text(report.page(results, groups=report.Selection.load().groups))
    assert any(result.state == "passed" for result in results)
    failed = report.failures(results)
    assert not failed, "\n".join(f"{result.name}: {result.why}" for result in failed)
