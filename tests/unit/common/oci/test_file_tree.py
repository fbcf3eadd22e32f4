"""The files of an image, from hostile layers to a folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from wasilet_common.oci import mediatypes
from wasilet_common.oci.file_tree import Merger, unpack
from wasilet_common.oci.tarball import Budget, LayerError

pytestmark = pytest.mark.unit

Entry = tuple[str, str]
"""Name and content; ``->x`` is a symbolic link, ``=x`` a hard one, ``/`` a folder, ``!`` a device."""


def layer(path: Path, entries: list[Entry]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if content == "/":
                info.type = tarfile.DIRTYPE
            elif content == "!":
                info.type = tarfile.CHRTYPE
            elif content.startswith("->"):
                info.type, info.linkname = tarfile.SYMTYPE, content[2:]
            elif content.startswith("="):
                info.type, info.linkname = tarfile.LNKTYPE, content[1:]
            data = content.encode() if info.type == tarfile.REGTYPE else b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tree(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = f"->{path.readlink()}" if path.is_symlink() else "/" if path.is_dir() else path.read_text()
    return found


def unpacked(folder: Path, *layers: list[Entry], limit: int = 1 << 20) -> dict[str, str]:
    archive = folder / "archive.tar"
    with archive.open("wb") as out:
        merger = Merger(out, budget=Budget(total_bytes=limit))
        for number, entries in reversed(list(enumerate(layers))):
            merger.layer(layer(folder / f"{number}.tar", entries), media_type=mediatypes.OCI_LAYER_TAR)
        merger.finish()
    target = folder / "target"
    target.mkdir()
    unpack(archive, target, limit_bytes=1 << 20)
    assert set(folder.iterdir()) <= {archive, target, *(folder / f"{n}.tar" for n in range(len(layers)))}
    return tree(target)


LAYERS: dict[str, tuple[list[list[Entry]], dict[str, str]]] = {
    "files, folders and links": (
        [[("./a/", "/"), ("a/x", "1"), ("b/c/y", "2"), ("l", "->a/x"), ("h", "=a/x"), ("dev", "!")]],
        {"a": "/", "a/x": "1", "b": "/", "b/c": "/", "b/c/y": "2", "l": "->a/x", "h": "1"},
    ),
    "a layer above wins": ([[("x", "low"), ("y", "low")], [("x", "high")]], {"x": "high", "y": "low"}),
    "a deleted file": ([[("a/x", "1"), ("a/y", "2")], [("a/.wh.x", "")]], {"a": "/", "a/y": "2"}),
    "a deleted folder": ([[("a/b/x", "1"), ("z", "2")], [(".wh.a", "")]], {"z": "2"}),
    "deleted and made again": ([[("a/x", "1")], [(".wh.a", ""), ("a/y", "2")]], {"a": "/", "a/y": "2"}),
    "an opaque folder": (
        [[("a/x", "1"), ("b", "3")], [("a/.wh..wh..opq", ""), ("a/y", "2")]],
        {"a": "/", "a/y": "2", "b": "3"},
    ),
    "a file over a folder": ([[("a/x", "1")], [("a", "file")]], {"a": "file"}),
    "a folder over a link": ([[("a", "->/etc")], [("a/x", "1")]], {"a": "/", "a/x": "1"}),
    "a link over a folder": ([[("a/x", "1")], [("a", "->/etc")]], {"a": "->/etc"}),
    "below a link of its own layer": ([[("a", "->/tmp"), ("a/x", "1")]], {"a": "->/tmp"}),
    "a link where a file has a folder": ([[("a/x", "1"), ("a", "->/tmp")]], {"a": "/", "a/x": "1"}),
    "below a link that comes later": ([[("a/x", "->y"), ("a", "->/tmp")]], {"a": "/", "a/x": "->y"}),
    "a name twice": ([[("x", "1"), ("x", "2")]], {"x": "1"}),
    "a hard link to nothing": ([[("x", "=gone")]], {}),
    "absolute names are below the folder": ([[("/etc/passwd", "1")]], {"etc": "/", "etc/passwd": "1"}),
}


@pytest.mark.parametrize(("layers", "found"), LAYERS.values(), ids=LAYERS)
def test_layers_are_merged_as_an_image(tmp_path: Path, layers: list[list[Entry]], found: dict[str, str]) -> None:
    assert unpacked(tmp_path, *layers) == found


REFUSED = {
    "up": [("../x", "1")],
    "up within": [("a/../../x", "1")],
    "a hard link up": [("x", "=../../etc/passwd")],
    "too long a name": [("x" * 256, "1")],
    "too much": [("x", "1" * (2 << 20))],
}


@pytest.mark.parametrize("entries", REFUSED.values(), ids=REFUSED)
def test_what_is_no_file_below_a_folder_is_refused(tmp_path: Path, entries: list[Entry]) -> None:
    with pytest.raises(LayerError):
        unpacked(tmp_path, entries)


def test_an_artifacts_blobs_are_files_by_their_names(tmp_path: Path) -> None:
    blob, archive, target = tmp_path / "blob", tmp_path / "archive", tmp_path / "target"
    blob.write_text("data")
    with archive.open("wb") as out:
        merger = Merger(out, budget=Budget(total_bytes=100))
        merger.file("models/m.bin", blob)
        with pytest.raises(LayerError, match="more than one file"):
            merger.file("models/m.bin", blob)
        merger.finish()
    target.mkdir()
    unpack(archive, target, limit_bytes=1 << 20)
    assert tree(target) == {"models": "/", "models/m.bin": "data"}
