"""A run that is ended at a chosen phase of what its tool does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from wasilet.settings import Settings

from tests.rigs.standins.world import World

UP = """
import os, signal, sys
from dataclasses import replace
from wasilet.cluster.opening import open_cluster
from wasilet.settings import load
from wasilet.steps import Play

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open_cluster(load(environ=os.environ, name="unit", provider=sys.argv[1], download=False)) as cluster:
    cluster.state.update(provider=sys.argv[1], ports={"registry": 5000, "apiserver": 6443})
    cluster.state.run_id()
    (step,) = [step for step in cluster.provider.create_steps(cluster) if step.key == "api-server"]
    Play("up", [replace(step, after=())]).run()
"""
"""The step that makes the cluster, by itself: what goes before it starts Wasilet's own processes."""


def interrupt(world: World, settings: Settings, phase: str, signum: signal.Signals) -> None:
    """Begin a cluster, and end the run that begins it once its tool has got so far."""
    world.configure(hold=phase)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", UP, settings.provider],
        env=dict(settings.environ) | {"PYTHONPATH": ":".join(path for path in sys.path if path)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while phase not in world.read("phases", []):
            assert process.poll() is None, f"it ended before {phase}"
            assert time.monotonic() < deadline, f"{phase} was never reached"
            time.sleep(0.02)
        process.send_signal(signum)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()
