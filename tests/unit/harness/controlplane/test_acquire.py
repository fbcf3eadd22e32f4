"""Where binaries are looked for, in which order, and that nothing half-made is ever taken for one."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from wasilet.controlplane.acquire import AcquireError, acquire, locate
from wasilet.controlplane.binaries import BINARIES, HOST_PROVIDER, Binary, go_architecture
from wasilet.controlplane.gobuild import BuildError, Go, find_go
from wasilet.errors import StateError

pytestmark = pytest.mark.unit

KUBERNETES = BINARIES["kube-apiserver"].version


def put(folder: Path, name: str, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho Kubernetes v{version}\n")
    path.chmod(0o755)
    return path


def cached(cache: Path, name: str) -> Path:
    binary = BINARIES[name]
    return put(cache / "binaries" / f"{name}-v{binary.version}-linux-{go_architecture()}", name, binary.version)


def test_every_pin_is_a_full_version() -> None:
    for binary in BINARIES.values():
        assert len(binary.version.split(".")) == 3, binary.name


def test_the_users_own_assets_come_before_path_and_cache(tmp_path: Path) -> None:
    mine = put(tmp_path / "assets", "kube-apiserver", KUBERNETES)
    put(tmp_path / "bin", "kube-apiserver", KUBERNETES)
    cached(tmp_path / "cache", "kube-apiserver")
    environ = {"KUBEBUILDER_ASSETS": str(tmp_path / "assets"), "PATH": str(tmp_path / "bin")}
    found = locate("kube-apiserver", cache=tmp_path / "cache", environ=environ)
    assert found is not None
    assert (found.path, found.source, found.version) == (mine, "KUBEBUILDER_ASSETS", KUBERNETES)


def test_another_minor_version_on_path_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path / "bin", "kube-apiserver", "1.20.0")
    mine = cached(tmp_path / "cache", "kube-apiserver")
    found = locate("kube-apiserver", cache=tmp_path / "cache", environ={"PATH": str(tmp_path / "bin")})
    assert found is not None
    assert (found.path, found.source) == (mine, "cache")


def test_a_binary_that_changed_is_asked_its_version_again(tmp_path: Path) -> None:
    put(tmp_path / "bin", "kube-apiserver", "1.20.0")
    environ = {"PATH": str(tmp_path / "bin")}
    assert locate("kube-apiserver", cache=tmp_path / "cache", environ=environ) is None
    put(tmp_path / "bin", "kube-apiserver", KUBERNETES + " ")
    found = locate("kube-apiserver", cache=tmp_path / "cache", environ=environ)
    assert found is not None
    assert found.source == "PATH"


def test_a_spoiled_memory_of_versions_is_no_obstacle(tmp_path: Path) -> None:
    put(tmp_path / "bin", "kube-apiserver", KUBERNETES)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "versions.json").write_text("[")
    assert locate("kube-apiserver", cache=tmp_path / "cache", environ={"PATH": str(tmp_path / "bin")})


def test_nothing_found_names_every_source_and_what_to_do(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(AcquireError) as failure:
        acquire(
            HOST_PROVIDER,
            cache=tmp_path,
            environ={"PATH": "/nowhere"},
            progress=said.append,
            mirror="http://127.0.0.1:9",
            toolchain=lambda _: Go(path=None, problem="Go is not installed"),
        )
    text = str(failure.value)
    assert "127.0.0.1:9" in text
    assert "connection refused" in text
    assert "kube-scheduler" in text
    assert "Go is not installed" in text
    assert "KUBEBUILDER_ASSETS" in failure.value.hint
    assert [path.name for path in (tmp_path / "binaries").iterdir()] == [".lock"]


@pytest.mark.parametrize(("version", "words"), [("go1.19.8", "too old: 1.26 or newer is needed"), ("go1.26.8", "")])
def test_an_old_go_is_refused_by_its_version(tmp_path: Path, version: str, words: str) -> None:
    go = tmp_path / "go"
    go.write_text(f"#!/bin/sh\necho go version {version} linux/amd64\n")
    go.chmod(0o755)
    found = find_go({"PATH": str(tmp_path)})
    assert words in found.problem
    assert (found.path is None) == bool(words)


def test_a_cache_on_a_full_disk_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # without a file name, as from write()

    monkeypatch.setattr("wasilet.controlplane.acquire.fetch", full)
    with pytest.raises(StateError, match=f"cannot write {tmp_path}/cache/binaries: the disk is full") as error:
        acquire(["etcd"], cache=tmp_path / "cache", environ={}, progress=lambda _: None)
    assert "WASILET_CACHE" in error.value.hint
    assert [entry.name for entry in (tmp_path / "cache" / "binaries").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("words", "hint"), [("no space left on device", "free some space"), ("i/o timeout", "GOPROXY")]
)
def test_a_build_that_fails_says_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, hint: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BuildError(f"go build of etcd failed: {words}")

    monkeypatch.setattr("wasilet.controlplane.acquire.build", broken)
    go = Go(path=Path("/usr/bin/go"), version="1.24.0", problem="")
    with pytest.raises(AcquireError, match=words) as error:
        acquire(
            ["etcd"],
            cache=tmp_path,
            environ={},
            progress=lambda _: None,
            allow_download=False,
            toolchain=lambda _: go,
        )
    assert hint in error.value.hint


def test_two_runs_at_once_share_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[str] = []
    begun, waited = threading.Event(), threading.Event()

    def slow(group: list[Binary], *, output: Path, **_: object) -> None:
        builds.extend(binary.name for binary in group)
        begun.set()
        assert waited.wait(10), "the second run did not wait for the first"
        for binary in group:
            put(output, binary.name, binary.version)

    def said(line: str) -> None:
        if line.startswith(f"waiting for another run (pid {os.getpid()})"):
            waited.set()

    monkeypatch.setattr("wasilet.controlplane.acquire.build", slow)
    go = Go(path=Path("/usr/bin/go"), version="1.24.0", problem="")

    def bring() -> Path:
        found = acquire(
            ["etcd"], cache=tmp_path, environ={}, progress=said, allow_download=False, toolchain=lambda _: go
        )
        return found["etcd"].path

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(bring)
        assert begun.wait(10)
        second = pool.submit(bring)
        assert first.result(20) == second.result(20)
    assert builds == ["etcd"]
    assert not list((tmp_path / "binaries").glob(".new-*"))
