"""Release downloads from a local server: good, wrong, truncated, missing."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from wasilet.controlplane.binaries import BINARIES
from wasilet.controlplane.download import DownloadError, fetch, mirrored

pytestmark = pytest.mark.unit

EXECUTABLE = b"#!/bin/sh\necho Kubernetes v1.34.4\n" + b"#" * 100_000


@dataclass
class Mirror:
    """A web server on loopback: ``files`` by path, ``truncated`` paths end half-way."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    state = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            body = state.files.get(self.path)
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path in state.truncated else body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def offer(mirror: Mirror, name: str, body: bytes, *, checksum: str | None = None) -> str:
    """Put a release on the mirror; returns the path of the file."""
    binary = BINARIES[name]
    fields = binary.fields(binary.version, "amd64")
    path = "/" + binary.release_url.format(**fields).removeprefix("https://")
    sums = "/" + binary.checksum_url.format(**fields).removeprefix("https://")
    mirror.files[path] = body
    digest = checksum or hashlib.sha256(body).hexdigest()
    mirror.files[sums] = (digest if name.startswith("kube") else f"{digest}  {path.rsplit('/', 1)[-1]}\n").encode()
    return path


def bring(mirror: Mirror, name: str, destination: Path) -> list[str]:
    said: list[str] = []
    binary = BINARIES[name]
    fetch(
        binary,
        version=binary.version,
        architecture="amd64",
        destination=destination,
        mirror=mirror.url,
        progress=said.append,
    )
    return said


def tar_gz(name: str, body: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def test_a_good_file_is_written_whole_and_executable(mirror: Mirror, tmp_path: Path) -> None:
    offer(mirror, "kube-apiserver", EXECUTABLE)
    said = bring(mirror, "kube-apiserver", tmp_path / "kube-apiserver")
    assert (tmp_path / "kube-apiserver").read_bytes() == EXECUTABLE
    assert (tmp_path / "kube-apiserver").stat().st_mode & 0o777 == 0o755
    assert said[0].startswith("downloading kube-apiserver v")
    assert [path.name for path in tmp_path.iterdir()] == ["kube-apiserver"]


def test_an_executable_is_taken_out_of_its_archive(mirror: Mirror, tmp_path: Path) -> None:
    binary = BINARIES["etcd"]
    offer(mirror, "etcd", tar_gz(f"etcd-v{binary.version}-linux-amd64/etcd", EXECUTABLE))
    bring(mirror, "etcd", tmp_path / "etcd")
    assert (tmp_path / "etcd").read_bytes() == EXECUTABLE


def test_an_archive_without_the_executable_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    offer(mirror, "etcd", tar_gz("etcd-v0/readme", b"no"))
    with pytest.raises(DownloadError, match="the archive holds no etcd"):
        bring(mirror, "etcd", tmp_path / "etcd")


def test_a_wrong_checksum_leaves_nothing(mirror: Mirror, tmp_path: Path) -> None:
    offer(mirror, "kube-apiserver", EXECUTABLE, checksum="0" * 64)
    with pytest.raises(DownloadError, match="does not match its published checksum"):
        bring(mirror, "kube-apiserver", tmp_path / "kube-apiserver")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    mirror.truncated.add(offer(mirror, "kube-apiserver", EXECUTABLE))
    with pytest.raises(DownloadError, match=r"broken off|truncated"):
        bring(mirror, "kube-apiserver", tmp_path / "kube-apiserver")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_names_its_address(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"dl\.k8s\.io/v[\d.]+/bin/linux/amd64/kube-apiserver.*: HTTP 404"):
        bring(mirror, "kube-apiserver", tmp_path / "kube-apiserver")


def test_a_page_instead_of_a_checksum_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    offer(mirror, "kube-apiserver", EXECUTABLE)
    for path in mirror.files:
        if path.endswith(".sha256"):
            mirror.files[path] = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match="holds no SHA-256 checksum"):
        bring(mirror, "kube-apiserver", tmp_path / "kube-apiserver")


def test_a_dead_mirror_is_named(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"127.0.0.1:9.*connection refused"):
        bring(Mirror(url="http://127.0.0.1:9"), "kube-apiserver", tmp_path / "kube-apiserver")


@pytest.mark.parametrize("mirror_url", ["ftp://mirror.example", "mirror.example"])
def test_a_mirror_that_is_no_web_address_is_refused(mirror_url: str) -> None:
    with pytest.raises(DownloadError, match="is not an http"):
        mirrored("https://dl.k8s.io/x", mirror_url)
