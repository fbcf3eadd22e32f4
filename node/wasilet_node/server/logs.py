"""``GET /containerLogs/{namespace}/{pod}/{container}``: what ``kubectl logs`` reads.

Query and checks are kubelet's (getContainerLogs in pkg/kubelet/server/server.go, validateContainerLogStatus in
pkg/kubelet/kubelet_pods.go), texts included, since users search for them. One thing differs: an answer that will fail
is known before its first byte is sent, so it has its status code instead of an error at the end of a 200.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from aiohttp import HttpVersion11, web
from wasilet_common import pod_fields
from wasilet_common.cri_log import layout
from wasilet_common.cri_log.reader import CHUNK_BYTES, Segment, open_log, open_segment, rotated_names, skip_to_tail
from wasilet_common.cri_log.render import Renderer, RenderOptions
from wasilet_common.pod_fields import Pod
from wasilet_common.time_format import parse_rfc3339_nano

from wasilet_node.server.logwatch import LogWatcher, Waiter
from wasilet_node.server.pods import PodSource, known_pod

logger = logging.getLogger(__name__)

COALESCE_SECONDS = 0.005
"""A log in which more is written within this time is read this much later: its lines are then sent in batches."""

_STREAMS = {"All": (True, True), "Stdout": (True, False), "Stderr": (False, True)}
_INT64 = range(-(1 << 63), 1 << 63)


class LogRequestError(Exception):
    """A request for logs that cannot be answered, with kubelet's status code and text."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """v1.PodLogOptions."""

    follow: bool = False
    previous: bool = False
    tail_lines: int | None = None
    render: RenderOptions = field(default_factory=RenderOptions)


@dataclass(frozen=True, kw_only=True)
class LogTarget:
    """The instance whose log is read."""

    path: Path
    container_id: str
    running: bool


def parse_options(query: Mapping[str, str], *, now_ns: int) -> LogOptions:
    """PodLogOptions from a query. Raises LogRequestError: 400 for what cannot be read, 422 for what makes no sense."""
    tail = query.get("tail") or query.get("tailLines")
    tail_lines = None if query.get("tail") == "all" or tail is None else _integer(tail)
    limit_bytes = _integer(query["limitBytes"]) if "limitBytes" in query else None
    since_seconds = _integer(query["sinceSeconds"]) if "sinceSeconds" in query else None
    since_ns = _since_time(query["sinceTime"]) if "sinceTime" in query else None
    stream = query.get("stream", "All")
    invalid = (
        (tail_lines is not None and tail_lines < 0)
        or (limit_bytes is not None and limit_bytes < 1)
        or (since_seconds is not None and (since_seconds < 1 or "sinceTime" in query))
        or stream not in _STREAMS
        or (stream != "All" and tail_lines is not None)
    )
    if invalid:
        raise LogRequestError(422, '{"message": "Invalid request."}')
    if since_seconds is not None:
        since_ns = max(now_ns - since_seconds * 1_000_000_000, 0)
    stdout, stderr = _STREAMS[stream]
    return LogOptions(
        follow=_boolean(query, "follow"),
        previous=_boolean(query, "previous"),
        tail_lines=tail_lines,
        render=RenderOptions(
            timestamps=_boolean(query, "timestamps"),
            since_ns=since_ns,
            limit_bytes=limit_bytes,
            stdout=stdout,
            stderr=stderr,
        ),
    )


def find_log(pod: Pod, container: str, *, previous: bool, log_root: Path) -> LogTarget:
    """The log of the right instance. Raises LogRequestError as kubelet's validateContainerLogStatus does.

    The file's number is the instance's attempt: ``restartCount`` for the latest instance that has started, one less
    for the one before it. A container that waits for its next start has not been counted up yet.
    """
    name = pod_fields.name(pod)
    status = pod_fields.container_status(pod, container)
    if status is None:
        raise LogRequestError(400, f'container "{container}" in pod "{name}" is not available')
    state, last = status.get("state") or {}, (status.get("lastState") or {}).get("terminated")
    last_id = (last or {}).get("containerID", "")
    latest = int(status.get("restartCount", 0))
    folder = layout.folder_of_pod(log_root, pod) / container
    if previous:
        if not last_id:
            raise LogRequestError(400, f'previous terminated container "{container}" in pod "{name}" not found')
        started = "running" in state or bool((state.get("terminated") or {}).get("containerID"))
        path = layout.attempt_file(folder, latest - 1) if started else _latest(folder, latest)
        return LogTarget(path=path, container_id=last_id, running=False)
    if "running" in state:
        return LogTarget(
            path=layout.attempt_file(folder, latest), container_id=status.get("containerID", ""), running=True
        )
    if "terminated" in state and (container_id := state["terminated"].get("containerID", "")):
        return LogTarget(path=layout.attempt_file(folder, latest), container_id=container_id, running=False)
    if "terminated" in state or last is not None:
        if not last_id:
            raise LogRequestError(400, f'container "{container}" in pod "{name}" is terminated')
        return LogTarget(path=_latest(folder, latest), container_id=last_id, running=False)
    prefix = f'container "{container}" in pod "{name}" is waiting to start'
    if "waiting" not in state:
        raise LogRequestError(400, f"{prefix} - no logs yet")
    reason = state["waiting"].get("reason", "")
    known = {
        "ErrImagePull": "image can't be pulled",
        "ImagePullBackOff": "trying and failing to pull image",
    }
    raise LogRequestError(400, f"{prefix}: {known.get(reason, reason)}")


class LogViews:
    """The handler of the route."""

    def __init__(
        self,
        *,
        pods: PodSource,
        log_root: Path,
        watcher: LogWatcher,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._pods = pods
        self._log_root = log_root
        self._watcher = watcher
        self._clock_ns = clock_ns

    async def container_logs(self, request: web.Request) -> web.StreamResponse:
        """Answer one request; a client that goes away cancels it."""
        namespace, name, container = (request.match_info[key] for key in ("namespace", "pod", "container"))
        try:
            options = parse_options(request.query, now_ns=self._clock_ns())
            pod = known_pod(self._pods, namespace, name)
            if pod is None:
                raise LogRequestError(404, f'pod "{name}" does not exist')
            if pod_fields.find_container(pod, container) is None:
                raise LogRequestError(404, f'container "{container}" not found in pod "{name}"')
            target = find_log(pod, container, previous=options.previous, log_root=self._log_root)
        except LogRequestError as error:
            return web.Response(status=error.code, text=error.message)
        with contextlib.ExitStack() as stack:
            segments = open_log(target.path, stack)
            if not segments and not target.running:
                return web.Response(status=400, text=f"unable to retrieve container logs for {target.container_id}")
            response = web.StreamResponse(headers={"Content-Type": "text/plain"})
            if request.version >= HttpVersion11:
                response.enable_chunked_encoding()
            await response.prepare(request)
            answer = _Answer(response, Renderer(options.render), options)
            if options.follow and target.running:
                ended = self._ended(pod, container, target.container_id)
                async with self._watcher.follow(target.path.parent, ended=ended) as waiter:
                    await answer.follow(target.path, segments, waiter)
            else:
                await answer.send(segments)
                await answer.finish()
            await response.write_eof()
        return response

    def _ended(self, pod: Pod, container: str, container_id: str) -> Callable[[], bool]:
        (namespace, name), uid = pod_fields.key(pod), pod_fields.uid(pod)

        def ended() -> bool:
            latest = self._pods.pod(namespace, name)
            if latest is None or pod_fields.uid(latest) != uid:
                return True
            status = pod_fields.container_status(latest, container) or {}
            return "running" not in (status.get("state") or {}) or status.get("containerID", "") != container_id

        return ended


class _Answer:
    """One response being written."""

    def __init__(self, response: web.StreamResponse, renderer: Renderer, options: LogOptions) -> None:
        self._response = response
        self._renderer = renderer
        self._options = options

    async def send(self, segments: list[Segment]) -> None:
        """What the files held when they were opened."""
        segments = self._recent(segments)
        if self._options.tail_lines is not None:
            segments = await asyncio.to_thread(skip_to_tail, segments, self._options.tail_lines)
        for segment in segments:
            await self._write_all(segment)

    async def finish(self) -> None:
        """A last line that was cut off: no more will come."""
        await self._write(self._renderer.finish())

    async def follow(self, path: Path, segments: list[Segment], waiter: Waiter) -> None:
        """What the files hold, then all that is written until the container ends."""
        seen = {segment.path.name.removesuffix(".gz") for segment in segments if segment.path != path}
        current = segments[-1] if segments and segments[-1].path == path else None
        await self.send(segments)
        for segment in segments:
            if segment is not current:
                segment.file.close()
        position = current.size if current is not None else 0
        clock = asyncio.get_running_loop().time
        try:
            while not self._renderer.done:
                ended = waiter.ended
                if current is not None:
                    position = await self._read_on(current.file, position)
                following = _next_file(path, current.inode if current is not None else None, seen)
                if following is not None:
                    if current is not None:
                        # written between the last read and the rotation
                        await self._read_on(current.file, position)
                        current.file.close()
                    current, position = following, 0
                    if current.path != path:
                        seen.add(current.path.name.removesuffix(".gz"))
                        await self._write_all(current)
                        position = current.size
                    continue
                if ended:
                    await self.finish()
                    return
                waited = clock()
                await waiter.wait()
                if not waiter.ended and clock() - waited < COALESCE_SECONDS:
                    await asyncio.sleep(COALESCE_SECONDS)
        finally:
            if current is not None:
                current.file.close()

    def _recent(self, segments: list[Segment]) -> list[Segment]:
        """Without the rotated files whose last line is older than what is asked for."""
        since_ns = self._options.render.since_ns
        if since_ns is None or self._options.tail_lines is not None:
            return segments
        return [each for each in segments if each is segments[-1] or each.modified_ns >= since_ns]

    async def _read_on(self, file: BinaryIO, position: int) -> int:
        while not self._renderer.done and (data := os.pread(file.fileno(), CHUNK_BYTES, position)):
            position += len(data)
            await self._write(self._renderer.feed(data))
            await asyncio.sleep(0)
        return position

    async def _write_all(self, segment: Segment) -> None:
        for chunk in segment.chunks():
            await self._write(self._renderer.feed(chunk))
            if self._renderer.done:
                return
            await asyncio.sleep(0)

    async def _write(self, data: bytes) -> None:
        if data:
            await self._response.write(data)


def _next_file(path: Path, inode: tuple[int, int] | None, seen: set[str]) -> Segment | None:
    """The file that follows the one being read, None while that is still the current one.

    When it was rotated, its new name is the first unknown one; whatever was rotated after it comes before the
    current file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if inode == (status.st_dev, status.st_ino):
        return None
    for name in rotated_names(path):
        if name in seen:
            continue
        segment = open_segment(path.with_name(name))
        if segment is None:
            continue
        if inode is not None and (segment.inode == inode or segment.compressed):
            segment.file.close()
            seen.add(name)
            inode = None
            continue
        return segment
    successor = open_segment(path)
    if successor is not None and successor.inode != (status.st_dev, status.st_ino):
        successor.file.close()  # rotated once more in between: that file comes first
        return _next_file(path, inode, seen)
    return successor


def _latest(folder: Path, attempt: int) -> Path:
    """The log of the last instance of a container that waits for its next start, should that be counted already."""
    path = layout.attempt_file(folder, attempt)
    before = layout.attempt_file(folder, attempt - 1)
    return before if attempt > 0 and not path.exists() and before.exists() else path


def _integer(text: str) -> int:
    try:
        value = int(text) if text.isascii() and "_" not in text and text.strip() == text else None
    except ValueError:
        value = None
    if value is None or value not in _INT64:
        raise LogRequestError(400, '{"message": "Unable to decode query."}')
    return value


def _boolean(query: Mapping[str, str], key: str) -> bool:
    """Only absence, ``0`` and ``false`` are false, as the API machinery reads it."""
    return key in query and query[key] != "0" and query[key].lower() != "false"


def _since_time(text: str) -> int | None:
    if text in {"", "null"}:
        return None
    nanoseconds = parse_rfc3339_nano(text.encode())
    if nanoseconds is None:
        raise LogRequestError(400, '{"message": "Unable to decode query."}')
    return nanoseconds
