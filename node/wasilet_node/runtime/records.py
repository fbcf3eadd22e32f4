"""What the supervisor must not forget: a start and an exit record per container, beneath ``<data>/containers``.

The start record is written before the fork and on disk before the guest runs (its sandbox sees to that, since a sync
takes longer than all else and would hold up every other start), so that a container never runs twice. The exit record
is written before any client is notified, so that a finished container stays finished whichever process is killed; of a
machine that loses its power the kernel may not yet have it on disk, and then the container is one of those below unless
the API server had been notified. Neither is renamed into place: a record that a crash left torn was never acted on, so
a torn start record means that no guest ran, and a torn exit record that no client was notified.

A start record without exit record whose supervisor is gone stands for a container that died with it; how it ended no
one knows, and it is reported as kubelet does: exit code 137, reason ContainerStatusUnknown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wasilet_node.runtime import linux, wire
from wasilet_node.runtime.protocol import ContainerConfig, ContainerState, ContainerStatus

logger = logging.getLogger(__name__)

UNKNOWN_EXIT_CODE = 137
UNKNOWN_REASON = "ContainerStatusUnknown"
UNKNOWN_MESSAGE = "The container could not be located when the pod was terminated"
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The supervisor that forked a container: a pid is only a name together with its start time."""

    pid: int
    start_time: int

    def alive(self) -> bool:
        """Whether that very process still runs."""
        return linux.start_time(self.pid) == self.start_time


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """A container that was, or was about to be, forked."""

    config: ContainerConfig
    created_at_ns: int
    owner: Owner


def valid_id(container_id: str) -> bool:
    """Whether an id may name a folder."""
    return _ID.fullmatch(container_id) is not None


def initial_status(config: ContainerConfig, created_at_ns: int) -> ContainerStatus:
    """CREATED."""
    return ContainerStatus(
        id=config.id,
        pod_uid=config.pod_uid,
        pod_namespace=config.pod_namespace,
        pod_name=config.pod_name,
        container_name=config.container_name,
        attempt=config.attempt,
        image=config.image,
        image_id=config.image_id,
        log_path=config.log_path,
        state=ContainerState.CREATED,
        created_at_ns=created_at_ns,
        annotations=dict(config.annotations),
    )


class Records:
    """The folder of records. Methods raise OSError when the disk does."""

    def __init__(self, directory: Path, owner: Owner) -> None:
        self._directory = directory
        self._owner = owner
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def exists(self, container_id: str) -> bool:
        """Whether a container of this id was ever started and not removed, by whichever supervisor."""
        return (self._directory / container_id / "start.json").exists()

    def write_start(self, config: ContainerConfig, created_at_ns: int) -> int:
        """The open descriptor of the record, which is durable once that has been synced. Raises OSError."""
        folder = self._directory / config.id
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)  # noqa: PTH102 - this is the hot path of every start
        owner = dataclasses.asdict(self._owner)
        record = {"config": wire.dump_config(config), "created_at_ns": created_at_ns, "owner": owner}
        return _write(folder / "start.json", json.dumps(record).encode())

    def write_exit(self, status: ContainerStatus) -> None:
        """Outlives this process when it returns."""
        folder = self._directory / status.id
        os.close(_write(folder / "exit.json", json.dumps(wire.dump_status(status)).encode()))

    def remove(self, container_id: str) -> None:
        """Forget a container. The start record goes last: without it nothing stands in the way of a second start."""
        folder = self._directory / container_id
        with contextlib.suppress(FileNotFoundError):
            (folder / "exit.json").unlink()
        with contextlib.suppress(FileNotFoundError):
            (folder / "start.json").unlink()
        shutil.rmtree(folder, ignore_errors=True)

    def load(self) -> Iterator[tuple[StartRecord, ContainerStatus]]:
        """Containers of supervisors that are gone. Missing exits are written down as unknown; debris is removed."""
        for folder in sorted(self._directory.iterdir()):
            if not valid_id(folder.name):
                continue
            try:
                start = _read_start(folder / "start.json")
            except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            except (OSError, ValueError, KeyError, TypeError, wire.WireError) as error:
                logger.error("the start record of container %s cannot be read: %s", folder.name, error)  # noqa: TRY400
                continue
            if start.owner != self._owner and start.owner.alive():
                continue
            yield start, dataclasses.replace(self._exit_of(folder, start), inherited=True)

    def _exit_of(self, folder: Path, start: StartRecord) -> ContainerStatus:
        try:
            return wire.load_status(json.loads((folder / "exit.json").read_bytes()))
        except (OSError, ValueError, wire.WireError):
            status = dataclasses.replace(
                initial_status(start.config, start.created_at_ns),
                state=ContainerState.EXITED,
                started_at_ns=start.created_at_ns,
                finished_at_ns=time.time_ns(),
                exit_code=UNKNOWN_EXIT_CODE,
                reason=UNKNOWN_REASON,
                message=UNKNOWN_MESSAGE,
            )
        try:
            self.write_exit(status)
        except OSError as error:
            # The next caller finds the same, at another time; a full disk must not keep all others from running.
            logger.error("cannot write the exit record of container %s: %s", status.id, error)  # noqa: TRY400
        return status


def _read_start(path: Path) -> StartRecord:
    data = json.loads(path.read_bytes())
    return StartRecord(
        config=wire.load_config(data["config"]),
        created_at_ns=int(data["created_at_ns"]),
        owner=Owner(pid=int(data["owner"]["pid"]), start_time=int(data["owner"]["start_time"])),
    )


def _write(path: Path, data: bytes) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
