"""From volumeMounts to preopened folders.

A module resolves a path by the longest preopen that is a prefix of it, so mounts inside mounts are just more preopens.
What that gives up, compared with a mount namespace:

* a nested mount's name is not seen when the outer folder is listed;
* a single file inside another mount hides the rest of its folder there, and is refused where the folder itself is a
  mount;
* wasi-libc strips leading ``/`` and ``./`` alike, so with a ``workingDir`` a path that no mount covers means the same
  with and without its leading ``/``. Mounts below the working directory are preopened under their relative names too,
  and a mount at ``/`` wins over ``.``.

What no mount covers is the container's root file system, in small: a folder that starts empty but for the mount points
and ``/tmp``, and ends with the instance. With a ``workingDir`` there is none, since ``/`` would win over ``.``; then
``/tmp`` is its own folder, and so it is where single files make up ``/``.

``mountPropagation`` changes nothing, as guests cannot mount; a read-only preopen is read-only all the way down, so
``recursiveReadOnly`` always holds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import posixpath
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wasilet_node.kube.expansion import expand
from wasilet_node.runtime.protocol import Mount
from wasilet_node.runtime.safe_path import components, make_directories, open_root, opened, resolve, walk
from wasilet_node.volumes import hosts
from wasilet_node.volumes.base import Container, ContainerConfigError, Pod
from wasilet_node.volumes.kinds import Place, Source
from wasilet_node.volumes.pod_dirs import make_private
from wasilet_node.volumes.single_files import SingleFile, compose
from wasilet_node.volumes.termination import FOLDER as TERMINATION_FOLDER
from wasilet_node.volumes.termination import Message, message_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Instance:
    """What one start of a container has for itself: a folder on disk, and one in memory (perhaps the same)."""

    disk: Path
    memory: Path


@dataclass
class _Plan:
    pod: Pod
    container: Container
    places: Mapping[str, Place]
    environment: Mapping[str, str]
    instance: Instance
    folders: dict[str, Mount] = field(default_factory=dict)
    files: dict[str, SingleFile] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.container["name"])


def plan_mounts(
    pod: Pod,
    container: Container,
    places: Mapping[str, Place],
    environment: Mapping[str, str],
    *,
    instance: Instance,
    working_dir: str,
    hosts_content: bytes,
) -> tuple[Sequence[Mount], Message | None]:
    """The preopens of an instance, and where its termination message will be. Raises ContainerConfigError, OSError."""
    plan = _Plan(pod, container, places, environment, instance)
    for index, mount in enumerate(container.get("volumeMounts") or []):
        _volume_mount(plan, mount, index)
    _hosts(plan, hosts_content)
    message = _termination(plan)
    parent = posixpath.dirname(message.guest) if message is not None and message.root is None else ""
    composed = _compose(plan, parent)
    if message is not None and parent:
        message = message.in_folder(Path(composed[parent].host))
    folders = plan.folders | composed
    folders |= _root(plan, folders, working_dir)
    return (*_working_dir(plan, folders, working_dir), *(folders[guest] for guest in sorted(folders))), message


def _hosts(plan: _Plan, content: bytes) -> None:
    """kubelet's ``/etc/hosts``, unless the container mounts something of its own there."""
    if hosts.PATH in plan.files or hosts.PATH in plan.folders:
        return
    if _covering(plan.folders, "/etc") is None:
        plan.files[hosts.PATH] = SingleFile(guest=hosts.PATH, what="hostAliases", content=content)
    elif not plan.pod["spec"].get("hostAliases"):
        # The file is there for what is in it; hiding a volume's own /etc for it would take more than it gives.
        return
    elif "/etc" in plan.folders:
        raise ContainerConfigError(
            f"hostAliases need {hosts.PATH}, which a module can only be given in a folder of its own at /etc, "
            f'but container "{plan.name}" mounts a volume there'
        )
    else:
        plan.files[hosts.PATH] = SingleFile(guest=hosts.PATH, what="hostAliases", content=content)


def _root(plan: _Plan, folders: Mapping[str, Mount], image_working_dir: str) -> dict[str, Mount]:
    """The instance's own ``/``, or ``/tmp`` alone where it can have no ``/``; nothing where a volume is mounted."""
    read_only = (plan.container.get("securityContext") or {}).get("readOnlyRootFilesystem") is True
    if "/" in plan.folders:
        return {}
    if "/" in folders or _asked_working_dir(plan, image_working_dir):
        if "/tmp" in folders or read_only:  # noqa: S108 - a name in the guest
            return {}
        return {"/tmp": Mount(host=str(make_private(plan.instance.disk / "tmp")), guest="/tmp")}  # noqa: S108
    folder = make_private(plan.instance.disk / "root")
    with opened(open_root(folder)) as root_fd:
        for guest in (*folders, "/tmp"):  # noqa: S108
            # An instance that was prepared before may have begun to change what is here; its own names then stay.
            with contextlib.suppress(OSError):
                make_directories(root_fd, components(guest.lstrip("/")), 0o755)
    return {"/": Mount(host=str(folder), guest="/", read_only=read_only)}


_MAX_GUEST_PATH = 4095
"""As the kernel's PATH_MAX. The API server sets no limit, and looking at the folders above a path takes time that grows
with the square of its length."""


def _guest_path(path: str) -> str:
    """Absolute and clean. ``..`` cannot climb above the root, as in any file system. Raises ContainerConfigError."""
    if len(path) > _MAX_GUEST_PATH:
        raise ContainerConfigError(f'path "{path[:64]}..." has {len(path)} characters: file name too long')
    return "/" + posixpath.normpath("/" + path).lstrip("/")


def _check_options(mount: Source) -> None:
    name, propagation = mount["name"], mount.get("mountPropagation")
    if propagation not in {None, "", "None", "HostToContainer", "Bidirectional"}:
        raise ContainerConfigError(f'invalid MountPropagation mode: "{propagation}"')
    recursive = mount.get("recursiveReadOnly")
    if recursive in {None, "", "Disabled"}:
        return
    problem = ""
    if not mount.get("readOnly"):
        problem = f'volume "{name}" requested recursive read-only mode, but it is not read-only'
    elif propagation not in {None, "", "None"}:
        problem = (
            f'volume "{name}" requested recursive read-only mode, but it is not compatible with propagation '
            f'"{propagation}"'
        )
    elif recursive not in {"IfPossible", "Enabled"}:
        problem = f'unknown recursive read-only mode "{recursive}"'
    if problem:
        raise ContainerConfigError(f"failed to resolve recursive read-only mode: {problem}")


def _sub_path(mount: Source, environment: Mapping[str, str]) -> str:
    """The subPath, expanded and checked, with kubelet's messages."""
    sub_path = str(mount.get("subPath") or "")
    if expression := mount.get("subPathExpr"):
        missing: set[str] = set()

        def value(name: str) -> str:
            found = environment.get(name, "")
            if not found:
                missing.add(name)
            return found

        sub_path = expand(str(expression), value)
        if missing:
            raise ContainerConfigError(f"missing value for {', '.join(sorted(missing))}")
    if sub_path.startswith("/"):
        raise ContainerConfigError(f"error SubPath `{sub_path}` must not be an absolute path")
    if ".." in sub_path.split("/"):
        raise ContainerConfigError(f"unable to provision SubPath `{sub_path}`: must not contain '..'")
    if "\0" in sub_path:
        raise ContainerConfigError("unable to provision SubPath: must not contain a NUL byte")
    return sub_path


def _volume_mount(plan: _Plan, mount: Source, index: int) -> None:
    name = str(mount["name"])
    place = plan.places.get(name)
    if place is None:
        raise ContainerConfigError(f'cannot find volume "{name}" to mount into container "{plan.name}"')
    if place.unusable:
        raise ContainerConfigError(f'volume "{name}" cannot be mounted into container "{plan.name}": {place.unusable}')
    sub_path = _sub_path(mount, plan.environment)
    _check_options(mount)
    guest = _guest_path(str(mount["mountPath"]))
    if guest in plan.folders or guest in plan.files:
        raise ContainerConfigError(f"Duplicate mount point: {guest}")
    read_only = place.read_only or mount.get("readOnly") is True
    what = f'volumeMount "{name}" of container "{plan.name}"'
    if place.is_file:
        if sub_path:
            raise ContainerConfigError(f'failed to prepare subPath for volumeMount "{name}" of container "{plan.name}"')
        real = place.path.resolve()
        _add_file(plan, SingleFile(guest=guest, what=what, root=real.parent, names=(real.name,), read_only=read_only))
        return
    names = components(sub_path)
    if not names:
        plan.folders[guest] = Mount(host=str(place.path), guest=guest, read_only=read_only)
        return
    names, is_folder = _prepare_sub_path(plan, place, name, sub_path)
    if not is_folder:
        file = SingleFile(
            guest=guest,
            what=what,
            root=place.path,
            names=names,
            read_only=read_only,
            copied=place.live,
            in_memory=place.in_memory,
        )
        _add_file(plan, file)
    elif place.live:
        # The next update removes this folder; kubelet's bind mount keeps what was in it, and so does a copy.
        base = plan.instance.memory if place.in_memory else plan.instance.disk
        copy = base / f"copy-{index}"
        if not copy.is_dir():
            making = copy.with_name(f"{copy.name}.making-{os.urandom(4).hex()}")
            shutil.copytree(place.path.joinpath(*names), make_private(making.parent) / making.name)
            making.rename(copy)
        plan.folders[guest] = Mount(host=str(copy), guest=guest, read_only=True)
    else:
        plan.folders[guest] = Mount(
            host=str(place.path.joinpath(*names)), guest=guest, read_only=read_only, root=str(place.path)
        )


def _add_file(plan: _Plan, file: SingleFile) -> None:
    if posixpath.basename(file.guest) == "":
        raise ContainerConfigError(f"{file.what} is a file and cannot be mounted at /")
    plan.files[file.guest] = file


def _prepare_sub_path(plan: _Plan, place: Place, volume: str, sub_path: str) -> tuple[tuple[str, ...], bool]:
    """The names below the volume, free of links, and whether they lead to a folder, which is made when missing.

    Details go to the log only: as in kubelet, they could tell a pod's author about the machine's files.
    """
    with opened(open_root(place.path)) as root_fd:
        try:
            names, missing = resolve(root_fd, sub_path)
            if missing is not None and place.fixed:
                raise FileNotFoundError(errno.ENOENT, "no such file in the image", sub_path)
            if missing is not None:
                mode = stat.S_IMODE(os.fstat(root_fd).st_mode)
                try:
                    make_directories(root_fd, names, mode)
                except OSError as error:
                    logger.warning("subPath %r of volume %s: %s", sub_path, volume, error)
                    raise ContainerConfigError(
                        f'failed to create subPath directory for volumeMount "{volume}" of container "{plan.name}"'
                    ) from error
            if not names:
                return (), True
            with opened(walk(root_fd, names)) as fd:
                mode = os.fstat(fd).st_mode
        except OSError as error:
            logger.warning("subPath %r of volume %s: %s", sub_path, volume, error)
            raise ContainerConfigError(
                f'failed to prepare subPath for volumeMount "{volume}" of container "{plan.name}"'
            ) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise ContainerConfigError(f'failed to prepare subPath for volumeMount "{volume}" of container "{plan.name}"')
    return names, stat.S_ISDIR(mode)


def _covering(folders: Mapping[str, Mount], guest: str) -> Mount | None:
    """The folder whose name is the longest prefix of ``guest``."""
    at = guest
    while True:
        if at in folders:
            return folders[at]
        if at == "/":
            return None
        at = posixpath.dirname(at)


def _below(mount: Mount) -> tuple[str, ...]:
    """The names from the trusted root of a mount to its folder."""
    return components(os.path.relpath(mount.host, mount.root)) if mount.root else ()


def _termination(plan: _Plan) -> Message | None:
    """Where the termination message goes: a file in its own folder, or, below a volume, a file of the volume."""
    guest = message_path(plan.container)
    if not guest or _guest_path(guest) in plan.files or guest in plan.folders:
        return None
    parent = posixpath.dirname(guest)
    outer = _covering(plan.folders, parent)
    if outer is not None and not outer.read_only and parent not in {posixpath.dirname(path) for path in plan.files}:
        root = Path(outer.root or outer.host)
        names = (*_below(outer), *components(posixpath.relpath(guest, outer.guest)))
        with opened(open_root(root)) as root_fd:
            try:
                make_directories(root_fd, names[:-1], 0o755)
            except OSError as error:
                logger.warning("no folder for the termination message of %s: %s", plan.name, error)
                return None
        return Message.at(guest, root, names)
    if parent in plan.folders:
        return None
    plan.files[guest] = SingleFile(guest=guest, what="terminationMessagePath", content=b"", read_only=False)
    return Message(guest=guest)


def _compose(plan: _Plan, termination_parent: str) -> dict[str, Mount]:
    by_parent: dict[str, list[SingleFile]] = {}
    for guest in sorted(plan.files):
        by_parent.setdefault(posixpath.dirname(guest), []).append(plan.files[guest])
    composed: dict[str, Mount] = {}
    for index, (parent, files) in enumerate(by_parent.items()):
        if parent in plan.folders:
            raise ContainerConfigError(
                f"{files[0].what} is a single file in {parent}, where another volume is mounted; a module can only be "
                "given whole folders, so mount it in a folder of its own"
            )
        base = plan.instance.memory if any(file.in_memory for file in files) else plan.instance.disk
        folder = base / (TERMINATION_FOLDER if parent == termination_parent else f"files-{index}")
        read_only = compose(folder, files)
        composed[parent] = Mount(host=str(folder), guest=parent, read_only=read_only)
    return composed


def _asked_working_dir(plan: _Plan, image_working_dir: str) -> str:
    """Empty for none and for ``/``, which relative paths begin at anyway."""
    asked = _guest_path(str(plan.container.get("workingDir") or image_working_dir or "/"))
    return "" if asked == "/" else asked


def _working_dir(plan: _Plan, folders: Mapping[str, Mount], image_working_dir: str) -> list[Mount]:
    """``.``, what lies below it under relative names, and the folder itself when no mount covers it."""
    guest = _asked_working_dir(plan, image_working_dir)
    if not guest:
        return []
    outer = _covering(folders, guest)
    mounts: list[Mount] = []
    if outer is None:
        # The writable layer of a container image, in small: it starts empty and ends with the instance.
        security = plan.container.get("securityContext") or {}
        folder = str(make_private(plan.instance.disk / "cwd"))
        read_only = security.get("readOnlyRootFilesystem") is True
        mounts = [Mount(host=folder, guest=name, read_only=read_only) for name in (".", guest)]
    elif outer.guest == guest:
        mounts = [Mount(host=outer.host, guest=".", read_only=outer.read_only, root=outer.root)]
    else:
        root = Path(outer.root or outer.host)
        path = "/".join((*_below(outer), posixpath.relpath(guest, outer.guest)))
        with opened(open_root(root)) as root_fd:
            try:
                names, missing = resolve(root_fd, path)
                if missing is not None:
                    make_directories(root_fd, names, 0o755)
                with opened(walk(root_fd, names)) as fd:
                    if not stat.S_ISDIR(os.fstat(fd).st_mode):
                        raise NotADirectoryError
            except OSError as error:
                raise ContainerConfigError(
                    f'workingDir {guest} of container "{plan.name}" is no folder and cannot be made: '
                    f"{error.strerror or 'not a directory'}"
                ) from error
        mounts = [Mount(host=str(root.joinpath(*names)), guest=".", read_only=outer.read_only, root=str(root))]
    for inner in sorted(folders):
        relative = inner.removeprefix(guest + "/")
        if relative != inner and "/" + relative not in folders:
            mount = folders[inner]
            mounts.append(Mount(host=mount.host, guest=relative, read_only=mount.read_only, root=mount.root))
    return mounts
