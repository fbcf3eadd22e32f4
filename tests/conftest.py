"""Fixtures of all tests: the real clusters, made once a session and only when a test asks for them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.clusters import TestCluster, control_plane, whole_cluster

_LEFT_OUT = pytest.StashKey[int]()

if TYPE_CHECKING:
    from tests.rigs.kind.session import KindRig


def pytest_configure() -> None:
    """Programs that the tests start must hear Ctrl-C. A shell without job control starts its background jobs with
    SIGINT ignored, which children inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked slow, unless the marker expression or a path on the command line names it; and run last
    what needs the rig's Docker engine, which runs to the session's end. Docker refuses what the machine forwards for
    others (``docs/network.md``), pods of two nodes among it."""
    items.sort(key=lambda item: "kind_rig" in getattr(item, "fixturenames", ()))
    if "slow" in (config.option.markexpr or ""):
        return
    named = {str(Path(argument.partition("::")[0]).resolve()) for argument in config.args}
    left_out = [item for item in items if item.get_closest_marker("slow") and str(item.path) not in named]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
        config.stash[_LEFT_OUT] = len(left_out)


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    """Say what is not run, and how it is."""
    count = config.stash.get(_LEFT_OUT, 0)
    return f"{count} tests marked slow are left out: `./run test -m slow` runs them" if count else None


@pytest.fixture(scope="session")
def control_plane_cluster() -> Iterator[TestCluster]:
    """A real API server with controller-manager and scheduler, shared by the session: use names of your own in it."""
    with control_plane() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[TestCluster]:
    """A whole cluster with a Ready wasm node, of the provider that WASILET_PROVIDER names, shared by the session.

    On kind, where Linux has a node too, that one is tainted and the wasm node is not: what tests apply without a word
    on where it is to run, runs on wasm, as on ``host``."""
    provider = os.environ.get("WASILET_PROVIDER", "host")
    if provider != "kind":
        with whole_cluster(provider=provider) as made:
            yield made
        return
    rig: KindRig = request.getfixturevalue("kind_rig")
    with whole_cluster(
        f"e2e-{os.getpid()}",
        provider="kind",
        taints=(),
        image=rig.image,
        config=rig.config(linux_taint="wasilet.dev/linux:NoSchedule"),
        environment=rig.engine.environment,
    ) as made:
        yield made


@pytest.fixture(scope="session")
def kind_rig(request: pytest.FixtureRequest) -> Iterator[KindRig]:
    """Docker and a node image for kind; skips where neither is there nor can be made."""
    from tests.rigs.kind.session import RigUnavailableError
    from tests.rigs.kind.session import kind_rig as rig

    folder = Path(tempfile.mkdtemp(prefix="wasilet-rig"))
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        with capture.global_and_fixture_disabled():
            sys.stderr.write(f"kind rig: {line}\n")

    try:
        with rig(folder, say=say) as made:
            yield made
    except RigUnavailableError as error:
        pytest.skip(error.message)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A private folder whose path is short enough for Unix sockets; pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="w", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
