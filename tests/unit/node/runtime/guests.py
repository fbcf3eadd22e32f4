"""Small guests in WebAssembly text, and a running supervisor, for the tests of the runtime."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import wasmtime
from wasilet_node.runtime import supervisor_registry
from wasilet_node.runtime.client import RuntimeClient, ensure_supervisor, shutdown
from wasilet_node.runtime.engine import make_engine
from wasilet_node.runtime.protocol import ContainerConfig, ContainerState, ContainerStatus, GuestKind
from wasilet_node.runtime.stale_cleanup import remove_traces_of_the_dead
from wasilet_node.settings import LogSettings, NodePaths
from wasmtime import component as wasmtime_component

_T = TypeVar("_T")
_IMPORTS = """
(import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
(import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_open"
  (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
"""
_HELPERS = """
(func $say (param $fd i32) (param $at i32) (param $len i32)
  (i32.store (i32.const 0) (local.get $at)) (i32.store (i32.const 4) (local.get $len))
  (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
(func $sleep_ms (param $ms i64)
  (i64.store (i32.const 512) (i64.const 0)) (i32.store8 (i32.const 520) (i32.const 0))
  (i32.store (i32.const 528) (i32.const 1))
  (i64.store (i32.const 536) (i64.mul (local.get $ms) (i64.const 1000000)))
  (i64.store (i32.const 544) (i64.const 0)) (i32.store16 (i32.const 552) (i32.const 0))
  (drop (call $poll (i32.const 512) (i32.const 600) (i32.const 1) (i32.const 8))))
(func $dump_args
  (drop (call $args_sizes (i32.const 16) (i32.const 20)))
  (drop (call $args_get (i32.const 4096) (i32.const 8192)))
  (call $say (i32.const 1) (i32.const 8192) (i32.load (i32.const 20))))
(func $dump_environ
  (drop (call $environ_sizes (i32.const 16) (i32.const 20)))
  (drop (call $environ_get (i32.const 4096) (i32.const 8192)))
  (call $say (i32.const 1) (i32.const 8192) (i32.load (i32.const 20))))
(func $echo (local $n i32)
  (block $end (loop $again
    (i32.store (i32.const 0) (i32.const 8192)) (i32.store (i32.const 4) (i32.const 4096))
    (br_if $end (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (local.set $n (i32.load (i32.const 8)))
    (br_if $end (i32.eqz (local.get $n)))
    (call $say (i32.const 1) (i32.const 8192) (local.get $n))
    (br $again))))
(func $touch_memory (local $at i32)
  (loop $again
    (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then (unreachable)))
    (local.set $at (i32.mul (i32.sub (memory.size) (i32.const 16)) (i32.const 65536)))
    (loop $page
      (i32.store (local.get $at) (i32.const 1))
      (local.set $at (i32.add (local.get $at) (i32.const 4096)))
      (br_if $page (i32.lt_u (local.get $at) (i32.mul (memory.size) (i32.const 65536)))))
    (br $again)))
"""


def guest(body: str, *, text: str = "", pages: int = 2, extra: str = "") -> str:
    """A command. ``body`` may call ``$say fd at len`` (``text`` lies at 1024), ``$sleep_ms``, ``$echo`` and others."""
    data = "".join(f"\\{byte:02x}" for byte in text.encode())
    memory = f'(memory (export "memory") {pages}) (data (i32.const 1024) "{data}")'
    return f'(module {_IMPORTS} {memory} {_HELPERS} {extra} (func (export "_start") (local $i i32) {body}))'


def say(text: str, *, stream: int = 1, offset: int = 0) -> str:
    """A call of ``$say`` for the first bytes of ``text``."""
    return f"(call $say (i32.const {stream}) (i32.const {1024 + offset}) (i32.const {len(text.encode())}))"


HELLO = guest(say("hello world\n"), text="hello world\n")
SLEEPER = guest(say("asleep\n") + "(call $sleep_ms (i64.const 3600000))", text="asleep\n")
SPINNER = guest("(loop $for_ever (br $for_ever))")
TRAP = guest(say("doomed\n") + "(unreachable)", text="doomed\n")
MEMORY_HOG = guest("(call $touch_memory)")
ARGUMENTS = guest("(call $dump_args)")
ENVIRONMENT = guest("(call $dump_environ)")
ECHO = guest("(call $echo)")


def exit_with(code: int) -> str:
    """A guest that exits with ``code``."""
    return guest(f"(call $proc_exit (i32.const {code}))")


@dataclass
class Rig:
    """A data folder with a supervisor and a client."""

    paths: NodePaths
    logs: LogSettings
    client: RuntimeClient
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(secrets.randbits(48) << 16))

    def artifact(self, source: str | bytes, kind: GuestKind = GuestKind.MODULE) -> str:
        """A precompiled file, made in this process."""
        self.paths.compiled.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.paths.compiled / f"{next(self._numbers)}.cwasm"
        engine = make_engine()
        made: Any = wasmtime_component.Component if kind is GuestKind.COMPONENT else wasmtime.Module
        path.write_bytes(made(engine, source).serialize())
        return str(path)

    def config(self, artifact: str, **fields: Any) -> ContainerConfig:
        """A config with defaults."""
        number = next(self._numbers)
        values: dict[str, Any] = {
            "id": f"{number:064x}",
            "pod_uid": "uid",
            "pod_namespace": "default",
            "pod_name": "pod",
            "container_name": "main",
            "attempt": 0,
            "artifact": artifact,
            "kind": GuestKind.MODULE,
            "argv": ("guest",),
            "env": (),
            "mounts": (),
            "log_path": str(self.paths.logs / "pods" / f"default_pod_{number}" / "main" / "0.log"),
        }
        return ContainerConfig(**{**values, **fields})

    async def run(self, source: str, **fields: Any) -> ContainerStatus:
        """Start a guest and wait for its end."""
        config = self.config(self.artifact(source, fields.get("kind", GuestKind.MODULE)), **fields)
        await self.client.start(config)
        return await self.ended(config.id)

    async def ended(self, container_id: str, *, timeout_seconds: float = 20.0) -> ContainerStatus:
        """The status of a container once it has exited."""

        async def exited() -> ContainerStatus | None:
            for status in await self.client.list():
                if status.id == container_id and status.state is ContainerState.EXITED:
                    return status
            return None

        return await eventually(exited, timeout_seconds=timeout_seconds)

    def pid(self) -> int:
        """The supervisor's."""
        pointer = supervisor_registry.current(self.paths.data)
        assert pointer is not None
        return pointer.pid


async def eventually(probe: Callable[[], Awaitable[_T | None]], *, timeout_seconds: float = 10.0) -> _T:
    """What ``probe`` gives once it is not None."""
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    while True:
        found = await probe()
        if found is not None:
            return found
        assert asyncio.get_running_loop().time() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running_supervisor(data: Path, *, logs: LogSettings | None = None) -> AsyncIterator[Rig]:
    """A supervisor for ``data``; nothing of it is left afterwards, whatever happened."""
    paths = NodePaths(data=data)
    settings = logs or LogSettings()
    try:
        async with connected(data, logs=settings) as rig:
            yield rig
    finally:
        await end_supervisors(paths)


@contextlib.asynccontextmanager
async def connected(data: Path, *, logs: LogSettings | None = None) -> AsyncIterator[Rig]:
    """A client of the supervisor of ``data``, which is started when it is missing and left running."""
    paths = NodePaths(data=data)
    settings = logs or LogSettings()
    rig = Rig(paths=paths, logs=settings, client=await ensure_supervisor(paths, settings))
    try:
        yield rig
    finally:
        await rig.client.close()


async def gone(pointer: supervisor_registry.Pointer) -> None:
    """Wait for the end of a supervisor."""

    async def ended() -> bool | None:
        return None if pointer.alive() else True

    await eventually(ended)


async def end_supervisors(paths: NodePaths) -> None:
    """Whatever happened: none of them is left."""
    found = [pointer for _, pointer in supervisor_registry.pointers(paths.data)]
    with contextlib.suppress(Exception):
        await shutdown(paths)
    for pointer in found:
        if pointer.alive():
            os.kill(pointer.pid, signal.SIGKILL)
            await gone(pointer)
    remove_traces_of_the_dead(paths.data)
