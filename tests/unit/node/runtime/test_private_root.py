"""What the supervisor finds out about file trees of sandboxes, and where there are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from wasilet_node.runtime import user_namespace

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(not user_namespace.may_be_had(), reason="only root's sandboxes have file trees of their own"),
]

REASONS = """
from wasilet_node.runtime import linux, private_root
print(private_root.why_unavailable())
linux.keep_only_capabilities(frozenset())
print(private_root.why_unavailable())
"""

LINKS = """
import os, sys
from pathlib import Path
from wasilet_node.runtime import private_root
folder = sys.argv[1]
private_root.unshare_mounts()
shown = [f"{folder}/etc/conf", f"{folder}/etc/missing", f"{folder}/run", f"{folder}/lib", f"{folder}/lib/one"]
private_root.enter(folder, file=f"{folder}/file", shown=shown, mounts=())
os.replace(f"{folder}/run/next", f"{folder}/run/conf")
print(Path(f"{folder}/etc/conf").read_text(), Path(f"{folder}/lib/one").read_text(), sorted(os.listdir("/")))
"""


def test_a_link_into_a_folder_that_is_shown_stays_one(tmp_path: Path) -> None:
    """So a container that runs sees the ``resolv.conf`` that a resolver's service puts in place of another."""
    for name in ("etc", "run"):
        (tmp_path / name).mkdir()
    for name, text in {"file": "", "run/conf": "old", "run/next": "new", "run/one": "one"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "etc" / "conf").symlink_to("../run/conf")
    (tmp_path / "lib").symlink_to("run")
    command = [sys.executable, "-P", "-c", LINKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["new", "one", *str(["artifact", tmp_path.parts[1]]).split()]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["conf", "one"]


def test_the_reason_is_the_kernels_where_there_is_one() -> None:
    """In a process of its own, because a fork needs one thread."""
    done = subprocess.run([sys.executable, "-P", "-c", REASONS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n") == ["", "unshare: Operation not permitted", ""]
