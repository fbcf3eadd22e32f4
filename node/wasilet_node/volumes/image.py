"""Image volumes: an image's or artifact's files as a folder that is the pod's own and read only (KEP-4639).

``<pod>/volumes/<volume>/<digest>/`` appears by rename, so a folder that is there is whole. It is unpacked for each pod
from one archive in the image store: what one pod's folder could suffer is no other pod's, and it goes with the pod.
When a container starts again and the image is another one by then (``pullPolicy: Always``), there is another folder
beside it.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from wasilet_common.oci.file_tree import unpack
from wasilet_common.oci.tarball import LayerError

from wasilet_node.volumes.base import VolumeError
from wasilet_node.volumes.kinds import Place, Source
from wasilet_node.volumes.pod_dirs import make_private
from wasilet_node.volumes.removal import remove_tree

KIND = "image"
_END_BYTES = 1024 * 1024


def check(source: Source) -> str:
    """Why this node can never serve it; empty when it can."""
    return "" if source.get("reference") else "no image is named"


def place(folder: Path, archive: Path, digest: str) -> Place:
    """Unpack it below the volume's folder unless that was done. Blocking. Raises VolumeError."""
    target = folder / digest.partition(":")[2]
    if not target.is_dir():
        making = folder / f"making-{secrets.token_hex(8)}"
        try:
            make_private(folder)
            make_private(making)
            unpack(archive, making, limit_bytes=archive.stat().st_size + _END_BYTES)
            making.rename(target)
        except (LayerError, OSError) as error:
            remove_tree(folder, making.name)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise VolumeError(f"failed to mount image volume: {reason}") from error
    return Place(path=target, read_only=True, fixed=True)
