"""Memory volumes whose size the kernel holds: its own tmpfs for each, where this process may mount.

The folder in ``/dev/shm`` that a memory volume is otherwise can take half of the machine's memory before anyone
measures it. A tmpfs with a size is full at exactly that, and what is written to it fails with "no space left on
device". Mounting needs CAP_SYS_ADMIN; without it the volume is such a folder, and is looked at often
(``wasilet_node.pods.eviction``).

A mount outlives the agent, as the folder does; the code that removes a pod's folders unmounts it first
(``unmount_volumes``), so an agent that died half-way leaves nothing that its successor would not find.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_BYTES_PER_INODE = 1024
"""About what the kernel keeps for one, beside the contents: empty files must not take what the size forbids."""

_FEWEST_INODES = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def hold_size(folder: Path, size_bytes: int) -> bool:
    """Mount a tmpfs of that size on an empty folder, unless one is there already. False: this process may not mount."""
    if is_sized(folder):
        return True
    inodes = max(size_bytes // _BYTES_PER_INODE, _FEWEST_INODES)
    options = f"size={size_bytes},nr_inodes={inodes},mode=0700".encode()
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    if _libc.mount(b"wasilet", os.fsencode(folder), b"tmpfs", flags, options) == 0:
        return True
    number = ctypes.get_errno()
    if number not in {errno.EPERM, errno.EACCES}:
        logger.warning("no tmpfs of %d bytes at %s: %s", size_bytes, folder, os.strerror(number))
    return False


def is_sized(folder: Path) -> bool:
    """Whether a file system is mounted on a folder. Raises OSError when it is not there."""
    return folder.lstat().st_dev != folder.parent.lstat().st_dev


def unmount_volumes(pod_folder: Path) -> None:
    """Unmount what ``hold_size`` mounted for a pod's volumes, even while it is used. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder in (pod_folder / "volumes").iterdir():
            if not folder.is_symlink() and is_sized(folder):
                _unmount(folder)


def _unmount(folder: Path) -> None:
    if _libc.umount2(os.fsencode(folder), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))
