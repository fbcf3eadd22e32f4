"""What the supervisor finds out about file trees of sandboxes, and where there are none."""

from __future__ import annotations

import subprocess
import sys

import pytest
from wasilet_node.runtime import user_namespace

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not user_namespace.may_be_had(), reason="only root's sandboxes have file trees of their own"),
]

SCRIPT = """
from wasilet_node.runtime import linux, private_root
print(private_root.why_unavailable())
linux.keep_only_capabilities(frozenset())
print(private_root.why_unavailable())
"""


def test_the_reason_is_the_kernels_where_there_is_one() -> None:
    """In a process of its own, because a fork needs one thread."""
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n") == ["", "unshare: Operation not permitted", ""]
