"""The files of an image as one archive, and that archive as a folder: what an image volume is made of.

Layers are hostile. ``Merger`` reads them from the top down and writes one plain archive of regular files, folders and
links, in which every name stands once, is relative and has no ``..``. Of what layers below say of a name that was seen
or deleted above nothing is left, and devices and FIFOs are left out. ``unpack`` makes the folder, files first and
symbolic links last, so that while it writes there is no link that could lead it elsewhere. Links stay as they are: a
guest's preopen and the node's own walks follow none that leads out of the folder.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import BinaryIO, Final

from wasilet_common.oci import mediatypes
from wasilet_common.oci.tarball import Budget, Content, LayerError, Member, walk

MAX_FILES: Final = 100_000
_MAX_NAME_BYTES: Final = 255
_MAX_PATH_BYTES: Final = 4095
_WHITEOUT: Final = ".wh."
_OPAQUE: Final = ".wh..wh..opq"


class Merger:
    """Writes the archive; give it the layers from the top down, then ``finish``. Blocking."""

    def __init__(self, out: BinaryIO, *, budget: Budget) -> None:
        self._out = out
        self._budget = budget
        self._kinds: dict[str, bytes] = {}
        """By name: the entry of the topmost layer that has it."""

        self._hidden: set[str] = set()
        """Names that layers above deleted, with all below them."""

        self._opaque: set[str] = set()
        """Folders of which layers below say nothing more."""

        self._links: list[tarfile.TarInfo] = []
        self._count = 0

    def layer(self, path: Path, *, media_type: str) -> None:
        """One layer. Raises LayerError, OSError."""
        mine: dict[str, bytes] = {}
        hidden: set[str] = set()
        opaque: set[str] = set()
        for member, content in walk(path, media_type=media_type, budget=self._budget):
            name = checked(member.name)
            folder, _, base = name.rpartition("/")
            if base == _OPAQUE:
                opaque.add(folder)
            elif base.startswith(_WHITEOUT):
                hidden.add(f"{folder}/{base.removeprefix(_WHITEOUT)}".lstrip("/"))
            elif name and name not in mine and self._is_visible(name, mine):
                self._take(name, member, content)
                mine[name] = member.kind
                for depth in range(1, name.count("/") + 1):
                    # A folder without its own entry is one all the same.
                    mine.setdefault("/".join(name.split("/")[:depth]), tarfile.DIRTYPE)
        self._kinds |= mine
        self._hidden |= hidden
        self._opaque |= opaque

    def file(self, name: str, path: Path) -> None:
        """A blob that is a file as it is. Raises LayerError, OSError."""
        name = checked(name)
        if not name or not self._is_visible(name, {}):
            raise LayerError(f"the artifact has more than one file {name!r}")
        with path.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            self._budget.take(size)
            self._head(name, size)
            while chunk := source.read(1024 * 1024):
                self._out.write(chunk)
            self._pad(size)
        self._kinds[name] = tarfile.REGTYPE

    def finish(self) -> None:
        """Links, then the end of the archive. Raises OSError."""
        for link in sorted(self._links, key=lambda each: each.type == tarfile.SYMTYPE):
            self._out.write(link.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        self._out.write(b"\0" * 1024)

    def _is_visible(self, name: str, mine: dict[str, bytes]) -> bool:
        if name in self._kinds or name in self._hidden:
            return False
        parts = name.split("/")
        for depth in range(len(parts)):
            above = "/".join(parts[:depth])
            if above in self._opaque or above in self._hidden:
                return False
            kind = self._kinds.get(above) or mine.get(above)
            if above and kind is not None and kind != tarfile.DIRTYPE:
                return False
        return True

    def _take(self, name: str, member: Member, content: Content) -> None:
        self._count += 1
        if self._count > MAX_FILES:
            raise LayerError(f"the image has more than {MAX_FILES} files")
        if member.is_file:
            self._head(name, member.size, executable=member.executable)
            content.copy(self._out)
            self._pad(member.size)
        elif member.is_folder:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            self._out.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        elif member.is_hard_link or member.is_symbolic_link:
            info = tarfile.TarInfo(name)
            info.type = member.kind
            info.linkname = checked(_clean(member.link)) if member.is_hard_link else _link_text(member.link)
            self._links.append(info)

    def _head(self, name: str, size: int, *, executable: bool = False) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o755 if executable else 0o644
        self._out.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _pad(self, size: int) -> None:
        self._out.write(b"\0" * (-size % 512))


def unpack(archive: Path, folder: Path, *, limit_bytes: int) -> None:
    """Make what ``Merger`` wrote below an empty folder of this process alone. Blocking. Raises LayerError, OSError."""
    budget = Budget(total_bytes=limit_bytes)
    for member, content in walk(archive, media_type=mediatypes.OCI_LAYER_TAR, budget=budget):
        name = checked(member.name)
        path = folder / name
        if member.is_folder:
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            continue
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if member.is_file:
            mode = 0o755 if member.executable else 0o644
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(path, flags, mode), "wb") as file:
                content.copy(file)
        elif member.is_hard_link:
            source = folder / checked(member.link)
            if source.is_file():  # its target may be one that another layer deleted
                path.hardlink_to(source)
        elif member.is_symbolic_link:
            path.symlink_to(member.link)


def checked(name: str) -> str:
    """The name. Raises LayerError unless it can be one below a folder."""
    parts = name.split("/") if name else []
    try:
        encoded = os.fsencode(name)
        too_long = any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in parts) or len(encoded) > _MAX_PATH_BYTES
    except UnicodeEncodeError:
        too_long = True
    if too_long or "\0" in name or any(part in {"", ".", ".."} for part in parts):
        raise LayerError(f"the image holds a file whose name is no path below a folder: {name[:100]!r}")
    return name


def _clean(link: str) -> str:
    return "/".join(part for part in link.split("/") if part not in {"", "."})


def _link_text(link: str) -> str:
    if not link or "\0" in link or len(os.fsencode(link)) > _MAX_PATH_BYTES:
        raise LayerError("the image holds a symbolic link without a usable target")
    return link
