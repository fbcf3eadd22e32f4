"""Precompiled modules: made in worker processes, kept by what they depend on.

A file is named ``<module digest>-<engine key>.cwasm``; the engine key covers wasmtime's version, the engine's settings
and the processor's features. Loading a precompiled file is trusting it with this process's address space, so the folder
is 0700, a file never comes from elsewhere, and its SHA-256 beside it is checked once before this process hands it out:
a file that a crash or a disk spoiled is compiled again. The supervisor deletes one that does not load.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from wasilet_node.runtime.compile_worker import EXIT_MEMORY, SERVER
from wasilet_node.runtime.engine import engine_key
from wasilet_node.runtime.fair_slots import FairSlots
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import ImageSettings

SUFFIX = ".cwasm"
WORK_PREFIX = ".compile-"
MAX_MESSAGE_BYTES = 4096
MAX_PRINTED_BYTES = 1024 * 1024
"""By the compiler; one that prints more is not itself any more, and the agent holds the end of it alone."""


Begins = Callable[[], Awaitable[None]]


class CompileError(Exception):
    """A module cannot be compiled; the message is the compiler's, for status and event."""


Worker = Callable[[Path, Path, str], Awaitable[None]]
"""Takes the module, where the compiled one goes, and its kind; raises CompileError."""


class Compiler:
    """The compile cache. One for a directory and process."""

    def __init__(self, directory: Path, settings: ImageSettings, *, worker: Worker | None = None) -> None:
        """``worker``: compiles a file into another; by default a process with the settings' limits."""
        self._worker = worker or self._run_worker
        self._directory = directory
        self._settings = settings
        self._slots = FairSlots(max(settings.max_parallel_compiles, 1))
        self._running: dict[str, asyncio.Task[Path]] = {}
        self._verified: dict[Path, tuple[int, int, int]] = {}
        self._keys = {server: engine_key(server=server) for server in (False, True)}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)

    async def compile(
        self,
        module_path: Path,
        module_digest: str,
        kind: GuestKind,
        *,
        server: bool = False,
        owner: str = "",
        begins: Begins | None = None,
    ) -> Path:
        """The precompiled file of a module (``sha256:<hex>``), compiled once for however many callers. ``server``: it
        is a component that answers requests. ``owner``: the namespace that asks first; those that wait take turns.
        ``begins``: awaited before the compiler starts, of the caller that starts it.

        Raises CompileError.
        """
        target = self._target(module_digest, server=server)
        if self._is_verified(target) or await asyncio.to_thread(self._usable, target):
            return target
        task = self._running.get(module_digest)
        if task is None:
            worker_kind = SERVER if server else kind.value
            compiling = self._compile(module_path, target, worker_kind, owner, begins)
            task = asyncio.create_task(compiling, name=f"compile {module_digest}")
            self._running[module_digest] = task
            task.add_done_callback(lambda task: self._ended(module_digest, task))
        # Shielded: a pod that is deleted meanwhile must not take the compilation from the others.
        return await asyncio.shield(task)

    def _ended(self, module_digest: str, task: asyncio.Task[Path]) -> None:
        self._running.pop(module_digest, None)
        if not task.cancelled():
            # Looked at even when all who waited are gone, or asyncio reports it as forgotten.
            task.exception()

    async def prune(self, keep_digests: Collection[str]) -> None:
        """Remove what no module in ``keep_digests`` needs, older engines' files included. Running guests keep their
        modules: a file that is mapped lives on without its name."""
        keep = {self._target(digest, server=server).name for digest in keep_digests for server in (False, True)}
        await asyncio.to_thread(self._prune, keep)

    async def close(self) -> None:
        """End the compilations under way."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _target(self, module_digest: str, *, server: bool = False) -> Path:
        hexadecimal = module_digest.removeprefix("sha256:")
        if not hexadecimal.isalnum():
            raise CompileError(f"{module_digest!r} is no digest")
        return self._directory / f"{hexadecimal}-{self._keys[server]}{SUFFIX}"

    def _is_verified(self, target: Path) -> bool:
        """Whether it is the very file that was looked at before: one ``stat``, which needs no thread."""
        try:
            return target in self._verified and self._verified[target] == _identity(target)
        except OSError:
            return False

    def _usable(self, target: Path) -> bool:
        try:
            identity = _identity(target)
            if self._verified.get(target) == identity:
                return True
            wanted = _digest_file(target).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return False
        if _digest(target) != wanted:
            target.unlink(missing_ok=True)
            return False
        self._verified[target] = identity
        return True

    async def _compile(self, module_path: Path, target: Path, kind: str, owner: str, begins: Begins | None) -> Path:
        async with self._slots.slot(owner):
            if await asyncio.to_thread(self._usable, target):
                return target
            if begins is not None:
                await begins()
            try:
                with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=self._directory) as folder:
                    output = Path(folder) / "out"
                    await self._worker(module_path, output, kind)
                    await asyncio.to_thread(_publish, output, target)
            except OSError as error:
                raise CompileError(f"the compiled module cannot be kept: {error.strerror or error}") from error
            return target

    async def _run_worker(self, module_path: Path, output: Path, kind: str) -> None:
        memory = self._settings.compile_memory_bytes
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "wasilet_node.runtime.compile_worker",
                str(module_path),
                str(output),
                kind,
                str(memory),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=self._environment(),
            )
        except OSError as error:
            raise CompileError(f"cannot start the compiler: {error}") from error
        try:
            async with asyncio.timeout(self._settings.compile_timeout_seconds):
                errors = await _last_printed(process.stderr)
                await process.wait()
        except TimeoutError:
            raise CompileError(f"the compiler did not finish in {self._settings.compile_timeout_seconds:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode == 0:
            return
        text = errors.decode(errors="replace").strip()
        if process.returncode in (EXIT_MEMORY, -signal.SIGKILL) or "memory allocation of" in text:
            raise CompileError(f"the compiler needs more than its {memory // 2**20} MiB of memory")
        raise CompileError(text or f"the compiler ended with {process.returncode}")

    def _environment(self) -> dict[str, str]:
        threads = max((os.cpu_count() or 1) // max(self._settings.max_parallel_compiles, 1), 1)
        names = ("PATH", "HOME", "LANG", "PYTHONPATH")
        return {
            **{name: os.environ[name] for name in names if name in os.environ},
            "RAYON_NUM_THREADS": str(threads),
            "MALLOC_ARENA_MAX": "2",
        }

    def _prune(self, keep: set[str]) -> None:
        abandoned = time.time() - 2 * self._settings.compile_timeout_seconds
        for path in self._directory.iterdir():
            if path.name.startswith(WORK_PREFIX) and path.stat().st_mtime < abandoned:
                shutil.rmtree(path, ignore_errors=True)
            name = path.name.removesuffix(".sha256")
            if name.endswith(SUFFIX) and name not in keep:
                path.unlink(missing_ok=True)
                self._verified.pop(path, None)


async def _last_printed(stream: asyncio.StreamReader | None) -> bytes:
    """The end of it. Raises CompileError when there is too much."""
    kept, total = b"", 0
    while stream and (data := await stream.read(64 * 1024)):
        total += len(data)
        if total > MAX_PRINTED_BYTES:
            raise CompileError(f"the compiler printed more than {MAX_PRINTED_BYTES // 2**20} MiB and was ended")
        kept = (kept + data)[-MAX_MESSAGE_BYTES:]
    return kept


def _publish(output: Path, target: Path) -> None:
    """The digest first, then the file: a file without a digest is never used."""
    digest_file = _digest_file(target)
    temporary = output.with_name("digest")
    temporary.write_text(_digest(output) + "\n", encoding="ascii")
    temporary.replace(digest_file)
    output.replace(target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _digest_file(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
