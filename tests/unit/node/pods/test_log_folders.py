"""Names of log folders: kubelet's, and within what a file system takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasilet_common.cri_log import layout
from wasilet_node.server.logs import find_log

from tests.unit.node.pods.fakes import Fakes, eventually
from tests.unit.node.pods.fakes import make_pod as bound_pod
from tests.unit.node.pods.rig import container, gone, phase, running
from tests.unit.node.server.rig import make_pod

pytestmark = pytest.mark.unit

UID = "01234567-89ab-cdef-0123-456789abcdef"


def folder(namespace: str, name: str, uid: str = UID) -> str:
    return layout.pod_folder(Path("/l"), namespace=namespace, name=name, uid=uid).name


@pytest.mark.parametrize("length", [1, 100, 217 - 7])
def test_a_name_that_fits_stays(length: int) -> None:
    assert folder("default", "n" * length) == f"default_{'n' * length}_{UID}"


@pytest.mark.parametrize(("namespace", "name"), [(1, 217), (63, 155), (63, 253), (7, 253), (63, 252)])
def test_a_name_that_is_too_long_fits_and_keeps_namespace_and_uid(namespace: int, name: int) -> None:
    made = folder("s" * namespace, "n" * name)
    assert len(made.encode()) <= 255
    assert made.startswith("s" * namespace + "_nnn")
    assert made.count("_") == 2
    assert layout.uid_of(made) == UID


def test_two_long_names_that_begin_alike_have_two_folders() -> None:
    assert folder("default", "n" * 250 + "-a") != folder("default", "n" * 250 + "-b")
    assert folder("default", "n" * 253) == folder("default", "n" * 253)


def test_a_name_is_not_cut_behind_a_dot_or_dash() -> None:
    made = folder("s" * 63, ("n" * 50 + "." * 1) * 4 + "n" * 49)
    assert ".-" not in made
    assert "--" not in folder("s" * 63, "n-" * 126 + "n")


def test_the_log_of_a_pod_with_a_long_name_is_found(tmp_path: Path) -> None:
    pod = make_pod(state={"running": {}}, restartCount=0)
    pod["metadata"] |= {"namespace": "s" * 63, "name": "n" * 253, "uid": UID}
    found = find_log(pod, "main", previous=False, log_root=tmp_path).path
    found.parent.mkdir(parents=True)
    found.write_bytes(b"")
    assert found.parent.parent.name == folder("s" * 63, "n" * 253)


async def test_a_pod_with_a_long_name_runs_and_leaves_nothing(tmp_path: Path) -> None:
    fakes = Fakes(data=tmp_path)
    name = "n" * 253
    async with running(fakes) as manager:
        fakes.kube.add(bound_pod(name, uid=UID))
        await eventually(lambda: phase(fakes, name) == "Running")
        assert container(fakes, pod=name)["ready"]
        assert [entry.name for entry in layout.pods_root(fakes.paths.logs).iterdir()] == [folder("default", name)]
        fakes.kube.ask_deletion(name)
        await eventually(lambda: gone(fakes, name) and not manager.pods())
    assert list(layout.pods_root(fakes.paths.logs).iterdir()) == []


async def test_what_is_left_of_a_pod_with_a_long_name_is_cleaned_up(tmp_path: Path) -> None:
    fakes = Fakes(data=tmp_path)
    left = layout.pod_folder(fakes.paths.logs, namespace="s" * 63, name="n" * 253, uid=UID)
    (left / "main").mkdir(parents=True)
    async with running(fakes):
        await eventually(lambda: not left.exists())
