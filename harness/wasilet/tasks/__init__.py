"""The tasks of ``./run`` and ``invoke``: thin, with no logic of their own. Each ``--help`` teaches by examples."""

from wasilet.tasks.apps import build, demo, new, pull, push, run, samples
from wasilet.tasks.cluster import (
    approve,
    bootstrap,
    diagnose,
    down,
    kubeconfig,
    kubectl,
    logs,
    node,
    status,
    token,
    up,
)
from wasilet.tasks.machine import completion, doctor, report, ui
from wasilet.terminal.program import take_over

__all__ = [  # noqa: RUF022  (the order of the reference in docs/harness.md)
    "up",
    "down",
    "status",
    "logs",
    "kubeconfig",
    "kubectl",
    "approve",
    "token",
    "bootstrap",
    "node",
    "diagnose",
    "build",
    "push",
    "pull",
    "run",
    "demo",
    "report",
    "ui",
    "completion",
    "samples",
    "new",
    "doctor",
]

take_over()
