"""What the harness adds on kind, and what ``up`` costs when nothing changes: printed, one figure a line.

``python -P -m tests.bench.providers [kind] [host]``. ``kind create cluster`` is timed by its step; what is added
is the rest of ``up``, from the API server's first answer to a Ready node that takes pods.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from wasilet.cluster.down import down
from wasilet.cluster.up import up
from wasilet.console import PlainReporter
from wasilet.providers.base import API_SERVER_STEP
from wasilet.settings import Settings
from wasilet.steps import SilentReporter

from tests.clusters import temporary_settings
from tests.rigs.kind.session import kind_rig

UNCHANGED_RUNS = 5


def kind() -> dict[str, float]:
    """Seconds, by what they were spent on."""
    with (
        tempfile.TemporaryDirectory(prefix="wasilet-bench") as folder,
        kind_rig(Path(folder), say=lambda line: print(line, file=sys.stderr)) as rig,
        temporary_settings(
            f"bench-{os.getpid()}",
            provider="kind",
            image=rig.image,
            config=rig.config(),
            environment=rig.engine.environment,
        ) as settings,
    ):
        figures = _measured(settings)
        down(settings, reporter=SilentReporter(), purge=True).raise_for_failure()
        return figures


def host() -> dict[str, float]:
    """The same for the default provider, to compare."""
    with temporary_settings("bench") as settings:
        return _measured(settings)


def _measured(settings: Settings) -> dict[str, float]:
    log = io.StringIO()
    began = time.monotonic()
    recap = up(settings, reporter=PlainReporter(log))
    whole = time.monotonic() - began
    assert recap.succeeded, log.getvalue()
    cluster_step = next(outcome for outcome in recap.outcomes if outcome.key == API_SERVER_STEP)
    again = []
    for _ in range(UNCHANGED_RUNS):
        began = time.monotonic()
        assert not up(settings, reporter=SilentReporter()).changed
        again.append(time.monotonic() - began)
    return {
        "up, from nothing": whole,
        f"  of it the step {cluster_step.name!r}": cluster_step.seconds,
        "  of it what the harness adds": whole - cluster_step.seconds,
        "up, nothing changes (median)": statistics.median(again),
    }


def main(arguments: Sequence[str]) -> int:
    """Print the figures of each provider named; of kind without one."""
    for name in arguments or ["kind"]:
        for what, seconds in {"kind": kind, "host": host}[name]().items():
            print(f"{name:<6} {what:<40} {seconds:6.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
