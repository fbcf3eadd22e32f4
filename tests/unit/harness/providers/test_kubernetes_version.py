from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from wasilet.controlplane.binaries import binaries
from wasilet.controlplane.versions import HERE, default_kubernetes, supported_kubernetes, versions
from wasilet.errors import UsageError
from wasilet.providers import by_name
from wasilet.providers.base import Cluster
from wasilet.providers.kubernetes_version import between, running, wanted
from wasilet.settings import load
from wasilet.state import State

pytestmark = pytest.mark.unit


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    settings = load(environ={"HOME": str(tmp_path), "WASILET_STATE_HOME": str(tmp_path / "state")}, name="c")
    state = State.of(settings)
    state.create()
    return Cluster(settings=settings, state=state, provider=by_name("host"))


def asked(cluster: Cluster, version: str) -> Cluster:
    return replace(cluster, settings=replace(cluster.settings, kubernetes_version=version))


def used(cluster: Cluster, **record: str) -> Cluster:
    (cluster.state.path / "etcd").mkdir()
    cluster.state.update(name="c", **record)
    return cluster


def test_every_pin_of_go_is_the_version_of_the_one_list() -> None:
    for minor in versions().kubernetes:
        for binary in binaries(minor).values():
            text = (HERE / binary.pin / "go.mod").read_text()
            found = re.search(rf"^\s*(?:require\s+)?{re.escape(binary.module)}\s+v(\S+)", text, re.MULTILINE)
            assert found is not None, binary.pin
            assert found.group(1) == binary.version, binary.pin


def test_three_minors_are_brought_newest_first() -> None:
    minors = [tuple(map(int, minor.split("."))) for minor in versions().kubernetes]
    assert len(minors) == 3
    assert minors == sorted(minors, reverse=True)


@pytest.mark.parametrize("given", ["", "1.37", "v1.37", "1.37.2"])
def test_a_minor_or_a_version_is_asked_for(given: str) -> None:
    assert supported_kubernetes(given) == default_kubernetes()


@pytest.mark.parametrize("given", ["1.30", "1.37.1", "2.0.0"])
def test_what_is_not_brought_is_refused_with_what_is(given: str) -> None:
    with pytest.raises(UsageError, match=r"is not brought") as failed:
        supported_kubernetes(given)
    assert default_kubernetes() in failed.value.hint


def test_a_new_cluster_gets_the_newest(cluster: Cluster) -> None:
    assert running(cluster) == ""
    assert wanted(cluster) == default_kubernetes()


def test_one_of_the_first_wasilet_is_led_over_each_minor(cluster: Cluster) -> None:
    assert running(used(cluster)) == "1.34.4"
    assert wanted(cluster) == default_kubernetes()
    known = versions().kubernetes
    assert between("1.34.4", default_kubernetes()) == [known["1.35"], known["1.36"]]


def test_who_asked_for_a_minor_stays_with_it(cluster: Cluster) -> None:
    used(cluster, kubernetes="1.36.1", kubernetes_asked="1.36")
    assert wanted(cluster) == versions().kubernetes["1.36"]
    assert wanted(asked(cluster, "1.37")) == versions().kubernetes["1.37"]


def test_there_is_no_way_back(cluster: Cluster) -> None:
    used(cluster, kubernetes=default_kubernetes())
    with pytest.raises(UsageError, match="cannot go back to"):
        wanted(asked(cluster, "1.36"))


def test_a_minor_on_the_way_that_is_not_brought_is_named() -> None:
    with pytest.raises(UsageError, match=r"leads over 1\.33, 1\.34, which is not brought"):
        between("1.32.1", default_kubernetes())


def test_a_cluster_that_stays_with_a_minor_no_longer_brought_is_told_the_way_on(cluster: Cluster) -> None:
    old = used(cluster, kubernetes="1.34.4", kubernetes_asked="1.34")
    with pytest.raises(
        UsageError, match=r"made with --kubernetes-version 1\.34, which this Wasilet no longer"
    ) as failed:
        wanted(old)
    newest = default_kubernetes()
    assert failed.value.hint is not None
    assert f"--kubernetes-version {newest.rpartition('.')[0]}`" in failed.value.hint
    assert wanted(asked(old, "1.37")) == newest
