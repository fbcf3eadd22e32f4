"""Official release downloads, believed only when their published checksum agrees.

A mirror takes the place of ``https://``: ``https://mirror.example/k8s`` serves
``https://mirror.example/k8s/dl.k8s.io/v1.34.4/bin/linux/amd64/kubectl``. The checksum comes from the same place as the
file: it finds a truncated or a damaged file, not a dishonest mirror. Users who need more build from source, where
go.sum pins every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tarfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO
from urllib.parse import urlsplit

import requests

from wasilet.controlplane.binaries import Binary

CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 30.0
TOTAL_TIMEOUT_SECONDS = 900.0
MAX_BYTES = 1024**3
_CHUNK_BYTES = 1024 * 1024


class DownloadError(Exception):
    """A release could not be had; the message names the address and the reason."""


def mirrored(url: str, mirror: str) -> str:
    """``url``, served by ``mirror`` when there is one. Raises DownloadError for a mirror that is no http(s) address."""
    if not mirror:
        return url
    if urlsplit(mirror).scheme not in {"http", "https"}:
        raise DownloadError(f"the mirror {mirror!r} is not an http:// or https:// address")
    return f"{mirror.rstrip('/')}/{url.removeprefix('https://')}"


def fetch(
    binary: Binary,
    *,
    version: str,
    architecture: str,
    destination: Path,
    mirror: str = "",
    progress: Callable[[str], None],
) -> None:
    """Download ``binary`` to the file ``destination`` (mode 0755), verified.

    ``destination`` is written last and whole, by the caller's rename. Raises DownloadError.
    """
    fields = binary.fields(version, architecture)
    url = mirrored(binary.release_url.format(**fields), mirror)
    sums_url = mirrored(binary.checksum_url.format(**fields), mirror)
    with requests.Session() as session, TemporaryDirectory(dir=destination.parent, prefix=".download-") as folder:
        expected = _published_checksum(_text(session, sums_url), PurePosixPath(urlsplit(url).path).name, sums_url)
        archive = Path(folder) / "file"
        progress(f"downloading {binary.name} v{version}")
        actual = _stream(session, url, archive, label=f"{binary.name} v{version}", progress=progress)
        if actual != expected:
            raise DownloadError(
                f"{url} does not match its published checksum and was thrown away "
                f"(expected sha256 {expected}, got {actual})"
            )
        if binary.archive_member:
            _extract(archive, binary.archive_member.format(**fields), destination, url)
        else:
            archive.replace(destination)
    destination.chmod(0o755)


def _get(session: requests.Session, url: str) -> requests.Response:
    try:
        response = session.get(url, stream=True, timeout=(CONNECT_TIMEOUT_SECONDS, READ_TIMEOUT_SECONDS))
    except requests.RequestException as error:
        raise DownloadError(f"{url}: {_reason(error)}") from error
    if response.status_code != requests.codes.ok:
        response.close()
        raise DownloadError(f"{url}: HTTP {response.status_code}")
    return response


def _reason(error: Exception) -> str:
    """The innermost message: requests nests its causes three deep."""
    text = str(error)
    if "NameResolution" in text or "resolve" in text:
        return "the host name does not resolve (no network?)"
    if "refused" in text:
        return "connection refused"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    return text.rsplit(": ", 1)[-1].strip(" ')")


def _text(session: requests.Session, url: str) -> str:
    with contextlib.closing(_get(session, url)) as response:
        try:
            body = response.raw.read(_CHUNK_BYTES + 1, decode_content=True)
        except Exception as error:
            raise DownloadError(f"{url}: {_reason(error)}") from error
    if len(body) > _CHUNK_BYTES:
        raise DownloadError(f"{url}: larger than a list of checksums can be")
    return str(body.decode("utf-8", errors="replace"))


def _published_checksum(text: str, file_name: str, url: str) -> str:
    lines = [line.split() for line in text.splitlines() if line.strip()]
    for words in lines:
        listed = len(words) == 2 and PurePosixPath(words[1].lstrip("*")).name == file_name
        alone = len(words) == 1 and len(lines) == 1
        if (listed or alone) and re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
            return words[0].lower()
    raise DownloadError(f"{url} holds no SHA-256 checksum of {file_name}")


def _stream(session: requests.Session, url: str, target: Path, *, label: str, progress: Callable[[str], None]) -> str:
    digest = hashlib.sha256()
    started = said = time.monotonic()
    done = 0
    with contextlib.closing(_get(session, url)) as response, target.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        try:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                now = time.monotonic()
                if done > MAX_BYTES:
                    raise DownloadError(f"{url}: larger than {MAX_BYTES} bytes")
                if now - started > TOTAL_TIMEOUT_SECONDS:
                    raise DownloadError(f"{url}: not done after {TOTAL_TIMEOUT_SECONDS:.0f} s")
                if now - said >= 1:
                    said = now
                    of = f" of {total / 1e6:.0f}" if total else ""
                    progress(f"downloading {label}: {done / 1e6:.0f}{of} MB")
        except requests.RequestException as error:
            raise DownloadError(f"{url}: broken off after {done} bytes ({_reason(error)})") from error
    if total and done != total and "Content-Encoding" not in response.headers:
        raise DownloadError(f"{url}: truncated, {done} of {total} bytes")
    return digest.hexdigest()


def _extract(archive: Path, member: str, destination: Path, url: str) -> None:
    try:
        with tarfile.open(archive, "r:*") as tar:
            for info in tar:
                if info.name.removeprefix("./") == member and info.isfile():
                    source = tar.extractfile(info)
                    if source is not None:
                        _copy(source, destination)
                        return
    except (tarfile.TarError, EOFError) as error:
        raise DownloadError(f"{url}: not a readable archive ({error})") from error
    raise DownloadError(f"{url}: the archive holds no {member}")


def _copy(source: IO[bytes], destination: Path) -> None:
    with destination.open("wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            file.write(chunk)
