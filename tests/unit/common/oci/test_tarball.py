"""One file out of a layer that may be made to harm."""

from __future__ import annotations

import bz2
import gzip
import io
import random
import sys
import tarfile
import time
from pathlib import Path

import pytest
from wasilet_common.oci.mediatypes import OCI_LAYER_TAR, OCI_LAYER_TAR_GZIP, OCI_LAYER_TAR_ZSTD
from wasilet_common.oci.tarball import Budget, Found, LayerError, extract

pytestmark = pytest.mark.unit

LIMIT = 4 * 1024 * 1024
DATA = b"\0asm\x01\0\0\0" + bytes(range(256)) * 5


def layer(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "layer"
    path.write_bytes(data)
    return path


def archive(*members: tarfile.TarInfo | tuple[str, bytes], format_: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                name, data = member
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def take(path: Path, name: str, media_type: str = OCI_LAYER_TAR, limit: int = LIMIT) -> tuple[Found | None, bytes]:
    out = io.BytesIO()
    budget = Budget(total_bytes=limit)
    return extract(path, media_type=media_type, name=name, out=out, budget=budget), out.getvalue()


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("written", ["app/main.wasm", "./app/main.wasm", "/app//main.wasm"])
def test_the_file_is_found_in_every_format(tmp_path: Path, format_: int, written: str, *, compress: bool) -> None:
    data = archive(("etc/passwd", b"root" * 1000), (written, DATA), ("z", b""), format_=format_)
    path = layer(tmp_path, gzip.compress(data) if compress else data)
    found, content = take(path, "app/main.wasm", OCI_LAYER_TAR_GZIP if compress else OCI_LAYER_TAR)
    assert found == Found(size=len(DATA))
    assert content == DATA


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_understood(tmp_path: Path, format_: int) -> None:
    name = "/".join(["verzeichnis-ü"] * 20) + "/main.wasm"
    path = layer(tmp_path, archive(("x" * 300, b"other"), (name, DATA), format_=format_))
    assert take(path, name)[1] == DATA


def test_a_layer_without_the_file_says_nothing(tmp_path: Path) -> None:
    assert take(layer(tmp_path, archive(("a", b"1"), ("b/main.wasm.bak", b"2"))), "b/main.wasm") == (None, b"")


@pytest.mark.parametrize("whiteout", ["app/.wh.main.wasm", ".wh.app", "app/.wh..wh..opq", ".wh..wh..opq"])
def test_a_whiteout_hides_the_file_of_the_layers_below(tmp_path: Path, whiteout: str) -> None:
    assert take(layer(tmp_path, archive((whiteout, b""))), "app/main.wasm")[0] == Found(deleted=True)


def test_an_opaque_folder_may_hold_the_file_again(tmp_path: Path) -> None:
    path = layer(tmp_path, archive(("app/.wh..wh..opq", b""), ("app/main.wasm", DATA)))
    assert take(path, "app/main.wasm") == (Found(size=len(DATA)), DATA)


def test_several_gzip_streams_are_one_layer(tmp_path: Path) -> None:
    data = archive(("a", b"x" * 70_000), ("main.wasm", DATA))
    pieces = b"".join(gzip.compress(data[i : i + 10_000]) for i in range(0, len(data), 10_000))
    assert take(layer(tmp_path, pieces + b"\0" * 512), "main.wasm", OCI_LAYER_TAR_GZIP)[1] == DATA


@pytest.mark.parametrize(
    ("kind", "words"),
    [(tarfile.SYMTYPE, "a symbolic link"), (tarfile.LNKTYPE, "a hard link"), (tarfile.DIRTYPE, "not a regular file"),
     (tarfile.CHRTYPE, "not a regular file"), (tarfile.FIFOTYPE, "not a regular file")],
)  # fmt: skip
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: bytes, words: str) -> None:
    path = layer(tmp_path, archive(special("main.wasm", kind, "/etc/shadow")))
    with pytest.raises(LayerError, match=words):
        take(path, "main.wasm")


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("main.wasm")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": "99999999999"}
    with pytest.raises(LayerError, match="sparse"):
        take(layer(tmp_path, archive(info)), "main.wasm")


def test_a_gzip_bomb_ends_at_the_limit(tmp_path: Path) -> None:
    bomb = gzip.compress(archive(("zeros", b"\0" * (64 * 1024 * 1024))))
    with pytest.raises(LayerError, match="decompress to more than the 4194304 bytes allowed"):
        take(layer(tmp_path, bomb), "main.wasm", OCI_LAYER_TAR_GZIP)


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("main.wasm")
    info.size = 1 << 40
    with pytest.raises(LayerError, match="1099511627776 bytes, more than"):
        take(layer(tmp_path, info.tobuf()), "main.wasm")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_huge_extended_header_is_not_read_into_memory(tmp_path: Path, kind: bytes) -> None:
    info = special("x", kind)
    info.size = 8**11 - 1
    with pytest.raises(LayerError, match="too large"):
        take(layer(tmp_path, info.tobuf(tarfile.USTAR_FORMAT)), "main.wasm")


@pytest.mark.parametrize(
    "record", [b"0 path=a\n", b"5 a=b\n", b"99 path=a\n", b"path=a\n", b"11 path=a\n", b"-1 a=b\n", b"9 size=x\n"]
)
def test_a_pax_header_that_does_not_parse_is_refused(tmp_path: Path, record: bytes) -> None:
    info = special("x", b"x")
    info.size = len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + archive(("main.wasm", DATA))
    with pytest.raises(LayerError, match="pax header"):
        take(layer(tmp_path, data), "main.wasm")


def test_many_small_pax_records_cost_no_more_than_their_length(tmp_path: Path) -> None:
    record = b"5 a=\n" * 13_000
    info = special("x", b"x")
    info.size = len(record)
    header = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(-(-len(record) // 512) * 512, b"\0")
    began = time.process_time()
    found, _ = take(layer(tmp_path, header * 60 + archive(("main.wasm", DATA))), "main.wasm")
    assert found == Found(size=len(DATA))
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize(
    ("data", "media_type", "words"),
    [
        (b"not a tar" * 100, OCI_LAYER_TAR, "not a tar archive"),
        (archive(("a", b"x")), OCI_LAYER_TAR_GZIP, "is not gzip"),
        (gzip.compress(archive(("a", b"x" * 5000)))[:-40], OCI_LAYER_TAR_GZIP, "ends within"),
        (archive(("a", b"x" * 5000))[:1000], OCI_LAYER_TAR, "ends within a file"),
        (bz2.compress(b"x"), "application/vnd.oci.image.layer.v1.tar+bzip2", "is not one that an image may have"),
    ],
    ids=["no tar", "no gzip", "a gzip cut short", "a tar cut short", "bzip2"],  # the same in every xdist worker
)
def test_what_is_not_the_archive_it_says_is_refused(tmp_path: Path, data: bytes, media_type: str, words: str) -> None:
    with pytest.raises(LayerError, match=words):
        take(layer(tmp_path, data), "main.wasm", media_type)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python decompresses zstd")
def test_zstd_without_a_decompressor_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match=r"tar\+zstd, which this node's Python cannot decompress .*gzip"):
        take(layer(tmp_path, b"\x28\xb5\x2f\xfd"), "main.wasm", OCI_LAYER_TAR_ZSTD)


def test_thousands_of_spoilt_archives_end_in_nothing_but_layer_errors(tmp_path: Path) -> None:
    randomly = random.Random(7)
    info = tarfile.TarInfo("p/" + "q" * 120)
    info.pax_headers = {"comment": "c", "path": "app/other"}
    info.mtime = 1.5
    plain = archive(info, ("app/main.wasm", DATA), special("l", tarfile.SYMTYPE, "app/main.wasm"))
    packed = gzip.compress(plain)
    outcomes, messages = set(), set()
    for round_ in range(4000):
        source, media_type = ((plain, OCI_LAYER_TAR), (packed, OCI_LAYER_TAR_GZIP))[round_ % 2]
        data = bytearray(source)
        for _ in range(randomly.randint(1, 6)):
            data[randomly.randrange(len(data))] = randomly.randrange(256)
        if randomly.random() < 0.3:
            del data[randomly.randrange(len(data)) :]
        path = layer(tmp_path, bytes(data))
        try:
            found, content = take(path, "app/main.wasm", media_type, limit=100_000)
        except LayerError as error:
            outcomes.add("refused")
            messages.add(str(error))
        else:
            outcomes.add("read" if found else "absent")
            assert len(content) <= 100_000
    assert all(message.isprintable() for message in messages)
    assert outcomes == {"refused", "read", "absent"}
