"""Where a pod's files live: a folder on disk, and one in memory for what must not reach a disk.

"Memory" is a private folder below ``/dev/shm`` (a tmpfs on every Linux), since ordinary users mount nothing; root
mounts a tmpfs in it for each volume with a size (``wasilet_node.volumes.sized_memory``). The folder is named by user
and data directory, so that two nodes on a machine stay apart. Where there is no such tmpfs, the disk takes its place,
and the log reports it once: Secrets then lie in 0700 folders on disk.

A link in the folder, ``.owner``, says whose it is, so that what no one will ever ask for again can be recognised: a
node that was killed and its data removed by hand leaves its pods' Secrets in memory, until the machine is restarted or
another node finds them (``remove_strays``).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from wasilet_node.volumes.base import VolumeError
from wasilet_node.volumes.sized_memory import unmount_volumes

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder is made in it, and checked
_OWNER = ".owner"
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")


def checked_uid(uid: str) -> str:
    """A pod uid that is safe as a folder name. Raises ValueError."""
    if _UID.fullmatch(uid) is None:
        raise ValueError(f"not a pod uid: {uid!r}")
    return uid


def checked_name(name: str) -> str:
    """A volume or container name that is safe as a folder name. Raises ValueError."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"not a volume or container name: {name!r}")
    return name


def make_private(folder: Path) -> Path:
    """A folder of mode 0700, and its parents with the same mode where they are missing. Raises OSError."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _mount_namespace() -> str:
    return str(Path("/proc/self/ns/mnt").readlink())


def _remove_own(folder: Path) -> None:
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
        for pod in folder.iterdir():
            unmount_volumes(pod)
        shutil.rmtree(folder, ignore_errors=True)


def _is_tmpfs(folder: Path) -> bool:
    try:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split(" ")[4] == str(folder) and rest.split(" ", 1)[0] == "tmpfs":
                return True
    except (OSError, IndexError):
        return False
    return False


def _is_taken(folder: Path) -> bool:
    """Whether a name is there and is no folder of this user."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    return not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid()


class PodDirs:
    """``pods`` is NodePaths.pods. ``shared_memory`` is where the memory area's private folder is made; None: no memory
    area, all on disk."""

    def __init__(self, pods: Path, *, shared_memory: Path | None = _SHARED_MEMORY) -> None:
        self.disk = pods
        self._memory: Path | None = None
        if shared_memory is not None:
            key = hashlib.sha256(os.fsencode(pods.absolute())).hexdigest()[:16]
            self._memory = shared_memory / f"wasilet-{os.geteuid()}-{key}"
        self._owner = f"{_mount_namespace()} {pods.absolute()}"
        self._shared_memory = shared_memory
        self._usable: bool | None = None

    def pod(self, uid: str) -> Path:
        """The pod's folder on disk; not made here."""
        return self.disk / checked_uid(uid)

    def memory_pod(self, uid: str) -> Path:
        """The pod's folder in memory, or the one on disk when there is no memory area; not made here."""
        return (self.memory_root() or self.disk) / checked_uid(uid)

    def memory_root(self) -> Path | None:
        """The private folder in memory, made when missing; None when there can be none.

        Anyone may make names in ``/dev/shm``: where someone else holds the folder's, another one is used, which is
        found again after a restart. Raises VolumeError when none can be had.
        """
        if self._memory is None:
            return None
        if self._usable is None:
            assert self._shared_memory is not None  # noqa: S101 - narrowing
            self._usable = os.access(self._shared_memory, os.W_OK) and (
                self._shared_memory != _SHARED_MEMORY or _is_tmpfs(self._shared_memory)
            )
            if not self._usable:
                logger.warning("no tmpfs at %s: Secrets and in-memory volumes are kept on disk", self._shared_memory)
        if not self._usable:
            return None
        try:
            self._memory = self._unsquatted(self._memory)
            self._memory.mkdir(mode=0o700, exist_ok=True)
            status = self._memory.lstat()
        except OSError as error:
            raise VolumeError(f"no folder in memory: {error}") from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise VolumeError(f"{self._memory} is not this user's folder, so nothing secret is put there")
        if status.st_mode & 0o777 != 0o700:
            self._memory.chmod(0o700)
        self._mark(self._memory / _OWNER)
        return self._memory

    def _unsquatted(self, wanted: Path) -> Path:
        """A folder that is this user's, or that does not exist yet."""
        if not _is_taken(wanted):
            return wanted
        for other in sorted(wanted.parent.glob(f"{wanted.name}-*")):
            with contextlib.suppress(OSError):
                if not _is_taken(other) and str((other / _OWNER).readlink()) == self._owner:
                    return other
        other = wanted.with_name(f"{wanted.name}-{secrets.token_hex(8)}")
        logger.warning("%s is somebody else's: Secrets and in-memory volumes are kept in %s", wanted, other)
        return other

    def _mark(self, link: Path) -> None:
        with contextlib.suppress(OSError):  # a full tmpfs: then the folder's owner is not recorded, and it stays
            try:
                link.symlink_to(self._owner)
            except FileExistsError:
                if str(link.readlink()) != self._owner:
                    link.unlink()
                    link.symlink_to(self._owner)

    def remove_strays(self) -> None:
        """Remove folders in memory of this user's nodes whose data is gone, which ends their containers too. A folder
        of another mount namespace is left alone: what is not to be seen from here may be there all the same."""
        if self._shared_memory is None:
            return
        for folder in self._shared_memory.glob(f"wasilet-{os.geteuid()}-*"):
            if folder == self._memory:
                continue
            with contextlib.suppress(OSError):
                namespace, _, pods = str((folder / _OWNER).readlink()).partition(" ")
                # The folder above is the node's; of that one "pods" may not have been made yet.
                if namespace == _mount_namespace() and not Path(pods).parent.exists():
                    _remove_own(folder)

    def clear_memory(self) -> None:
        """Remove the memory area and all that is in it, as a restart of the machine would; for when no container is
        left. A folder of that name that is someone else's is left alone."""
        if self._memory is not None:
            with contextlib.suppress(OSError):
                _remove_own(self._memory)

    def roots(self) -> Sequence[Path]:
        """Every folder that holds pods' folders."""
        memory = self.memory_root()
        return (self.disk,) if memory is None else (self.disk, memory)
