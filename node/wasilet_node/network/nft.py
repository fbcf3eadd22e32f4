"""Packet filter rules, by the ``nft`` command: the same that kube-proxy needs, and rules are made once, not per pod."""

from __future__ import annotations

import os
import shutil
import subprocess

from wasilet_node.network.errors import NetworkAbsentError, NetworkError

TIMEOUT_SECONDS = 10.0
PLACES = "/usr/sbin:/sbin:/usr/local/sbin"
"""Where administrators' commands are, whatever ``PATH`` holds."""


def find(places: str = PLACES) -> str:
    """The path of ``nft``, in ``PATH`` or ``places``. Raises NetworkAbsentError."""
    found = shutil.which("nft", path=os.environ.get("PATH", "") + os.pathsep + places)
    if found is None:
        raise NetworkAbsentError("nft is not installed (package nftables)")
    return found


def apply(rules: str) -> None:
    """All of ``rules`` or none, in the network namespace of the calling thread. Raises NetworkError."""
    try:
        done = subprocess.run(
            [find(), "-f", "-"],
            input=rules,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkError(f"nft does not run: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it gave no reason"]
        raise NetworkError(f"nft refused the rules: {lines[0]}")
