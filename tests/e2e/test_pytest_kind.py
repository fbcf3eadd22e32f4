"""pytest-kind beside Wasilet, for real: its fixture makes the cluster, with our binaries and image, and ours adopts it.

It is installed, from its own lock file, into a folder that only this test's pytest looks into.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wasilet.controlplane.acquire import acquire
from wasilet.providers.docker import Docker
from wasilet.providers.kind import CLUSTER_LABEL
from wasilet.settings import cache_root

from tests.rigs.kind.session import KindRig

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = ROOT / "requirements-kind.lock"
SUITE = ROOT / "tests" / "rigs" / "pytest_kind" / "adopts.py"


@pytest.fixture(scope="module")
def pytest_kind() -> Path:
    """The folder with pytest-kind in it; kept in the cache by the lock file's digest."""
    target = cache_root() / "rigs" / f"pytest-kind-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"
    if not (target / "pytest_kind").is_dir():
        new = target.with_suffix(f".new{os.getpid()}")
        new.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--target", str(new), "-r", str(LOCK)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            shutil.rmtree(new, ignore_errors=True)
            pytest.skip(f"pytest-kind cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        new.replace(target)
    return target


def test_its_cluster_is_adopted_used_and_deleted_by_itself(
    kind_rig: KindRig, pytest_kind: Path, short_folder: Path
) -> None:
    cache = cache_root()
    found = acquire(["kind", "kubectl"], cache=cache, environ={}, progress=lambda _: None)
    name = f"theirs-{os.getpid()}"
    (short_folder / "adopts_test.py").write_text(SUITE.read_text())
    # pytest-kind's dependencies warn about Python; this project's own strictness is not theirs.
    (short_folder / "pytest.ini").write_text("[pytest]\npython_files = *_test.py\n")
    kept = {k: v for k, v in kind_rig.engine.environment.items() if not k.startswith(("WASILET_", "PYTEST_"))}
    environ = {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(pytest_kind), str(ROOT)]),
        "WASILET_STATE_HOME": str(short_folder / "state"),
        "WASILET_CACHE": str(cache),
        "KUBECONFIG": str(short_folder / "user.conf"),
    }
    command = [sys.executable, "-P", "-m", "pytest", "-q", "--rootdir", str(short_folder), "-p", "no:cacheprovider"]
    command += ["--wasilet-provider", "kind", "--cluster-name", name]
    command += ["--kind-bin", str(found["kind"].path), "--kind-kubectl-bin", str(found["kubectl"].path)]
    command += ["--kind-image", kind_rig.image] if kind_rig.image else []
    done = subprocess.run(
        [*command, str(short_folder)], cwd=short_folder, env=environ, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    docker = Docker(kind_rig.engine.environment)
    left = docker.containers(f"{CLUSTER_LABEL}={name}")
    if left:
        docker.run("rm", "--force", "--volumes", *(container.id for container in left))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "2 passed" in done.stdout
    assert left == []
    assert not (short_folder / "state" / name).exists()


def test_nothing_of_wasilet_imports_it() -> None:
    for package in ("harness", "node"):
        for source in (ROOT / package).rglob("*.py"):
            assert "import pytest_kind" not in source.read_text()
            assert "from pytest_kind" not in source.read_text()
