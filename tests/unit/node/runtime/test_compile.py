"""The compile cache: worker processes, limits, keys, spoiled files."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wasmtime
from wasilet_node.images.compile import CompileError, Compiler
from wasilet_node.runtime import engine, landlock, own_user, seccomp
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.settings import ImageSettings
from wasmtime import component as wasmtime_component

from tests.unit.node.runtime.component_guests import component_guest
from tests.unit.node.runtime.guests import HELLO, eventually

pytestmark = pytest.mark.unit

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "module.wasm"
    path.write_bytes(wasmtime.wat2wasm(HELLO))
    return path


def large_module(functions: int, steps: int = 300) -> bytes:
    """Takes Cranelift a while; many steps in one function take it memory too."""
    step = "(local.set 0 (i64.add (i64.mul (local.get 0) (local.get 0)) (i64.load (i32.wrap_i64 (local.get 0)))))"
    function = f"(func (param i64) (result i64) {step * steps} (local.get 0))"
    return bytes(wasmtime.wat2wasm(f"(module (memory 1) {function * functions})"))


async def test_a_module_is_compiled_once_for_all_who_ask(tmp_path: Path, module: Path) -> None:
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    paths = await asyncio.gather(*(compiler.compile(module, DIGEST, GuestKind.MODULE) for _ in range(4)))
    assert len(set(paths)) == 1
    wasmtime.Module.deserialize_file(engine.make_engine(), str(paths[0]))
    assert paths[0].name == f"{'ab' * 32}-{engine.engine_key()}.cwasm"
    assert paths[0].stat().st_mode & 0o777 == 0o600
    assert paths[0].parent.stat().st_mode & 0o777 == 0o700
    made = paths[0].stat().st_mtime_ns
    module.unlink()
    again = await Compiler(tmp_path / "compiled", ImageSettings()).compile(module, DIGEST, GuestKind.MODULE)
    assert again.stat().st_mtime_ns == made


async def test_who_starts_the_compiler_is_told_and_nobody_else(tmp_path: Path, module: Path) -> None:
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    told: list[int] = []

    async def compile_it(number: int) -> None:
        async def begins() -> None:
            told.append(number)

        await compiler.compile(module, DIGEST, GuestKind.MODULE, begins=begins)

    await asyncio.gather(*(compile_it(number) for number in range(4)))
    assert len(told) == 1
    await compile_it(9)
    assert len(told) == 1


async def test_the_compiler_runs_without_privileges_and_goes_first_when_memory_ends(tmp_path: Path) -> None:
    path = tmp_path / "large.wasm"
    path.write_bytes(large_module(400))
    command = (sys.executable, "-P", "-m", "wasilet_node.runtime.compile_worker", str(path), str(tmp_path / "out"))
    worker = await asyncio.create_subprocess_exec(*command, "module", str(2**31))
    try:
        folder = Path(f"/proc/{worker.pid}")

        async def loaded() -> bool | None:
            return "Seccomp:\t2" in (folder / "status").read_text() or not seccomp.available() or None

        await eventually(loaded)
        status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        uid = own_user.FIRST_UID + worker.pid if os.geteuid() == 0 else os.geteuid()
        assert set(status["Uid"].split()) == {str(uid)}
        assert (folder / "oom_score_adj").read_text() == "1000\n"
    finally:
        worker.kill()
        await worker.wait()


async def test_a_folder_that_cannot_be_written_is_the_compilers_error(tmp_path: Path, module: Path) -> None:
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    (tmp_path / "compiled").rmdir()
    with pytest.raises(CompileError, match="cannot be kept: No such file or directory"):
        await compiler.compile(module, DIGEST, GuestKind.MODULE)


async def test_a_component_is_compiled(tmp_path: Path) -> None:
    path = tmp_path / "component.wasm"
    path.write_bytes(wasmtime.wat2wasm(component_guest("(i32.const 0)")))
    compiled = await Compiler(tmp_path / "compiled", ImageSettings()).compile(path, DIGEST, GuestKind.COMPONENT)
    wasmtime_component.Component.deserialize_file(engine.make_engine(), str(compiled))


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"#!/bin/sh", GuestKind.MODULE, "not a WebAssembly binary"),
        (b"", GuestKind.MODULE, "not a WebAssembly binary"),
        (b"\0asm\1\0\0\0\1\1\xff", GuestKind.MODULE, "unexpected end|offset"),
        (b"\0asm\1\0\0\0", GuestKind.COMPONENT, "says it is a component, but the binary is a module"),
        (b"\0asm\x0d\0\1\0", GuestKind.MODULE, "says it is a module, but the binary is a component"),
    ],
)
async def test_the_compilers_own_words_are_the_error(
    tmp_path: Path, content: bytes, kind: GuestKind, message: str
) -> None:
    path = tmp_path / "bad.wasm"
    path.write_bytes(content)
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    with pytest.raises(CompileError, match=message):
        await compiler.compile(path, DIGEST, kind)
    assert list((tmp_path / "compiled").iterdir()) == []


async def test_text_is_not_compiled(tmp_path: Path) -> None:
    path = tmp_path / "text.wat"
    path.write_text("(module)")
    with pytest.raises(CompileError, match="not a WebAssembly binary"):
        await Compiler(tmp_path / "compiled", ImageSettings()).compile(path, DIGEST, GuestKind.MODULE)


async def test_a_spoiled_file_is_compiled_again(tmp_path: Path, module: Path) -> None:
    first = await Compiler(tmp_path / "compiled", ImageSettings()).compile(module, DIGEST, GuestKind.MODULE)
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 0xFF
    first.write_bytes(data)
    again = await Compiler(tmp_path / "compiled", ImageSettings()).compile(module, DIGEST, GuestKind.MODULE)
    assert again.read_bytes() != data
    wasmtime.Module.deserialize_file(engine.make_engine(), str(again))


async def test_a_file_that_vanished_is_compiled_again_by_the_same_compiler(tmp_path: Path, module: Path) -> None:
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    first = await compiler.compile(module, DIGEST, GuestKind.MODULE)
    first.unlink()
    assert (await compiler.compile(module, DIGEST, GuestKind.MODULE)).exists()


async def test_a_compilation_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "large.wasm"
    path.write_bytes(large_module(400))
    compiler = Compiler(tmp_path / "compiled", ImageSettings(compile_timeout_seconds=0.6))
    with pytest.raises(CompileError, match=r"did not finish in 0\.6 s"):
        await compiler.compile(path, DIGEST, GuestKind.MODULE)
    assert list((tmp_path / "compiled").iterdir()) == []


async def test_a_compilation_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "large.wasm"
    path.write_bytes(large_module(1, 20000))
    compiler = Compiler(tmp_path / "compiled", ImageSettings(compile_memory_bytes=64 * 1024 * 1024))
    with pytest.raises(CompileError, match="more than its 64 MiB"):
        await compiler.compile(path, DIGEST, GuestKind.MODULE)


async def test_no_more_compile_at_once_than_the_settings_allow(tmp_path: Path, module: Path) -> None:
    running = most = 0

    async def worker(_source: Path, output: Path, _kind: str) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        output.write_bytes(b"made")
        running -= 1

    compiler = Compiler(tmp_path / "compiled", ImageSettings(max_parallel_compiles=2), worker=worker)
    await asyncio.gather(*(compiler.compile(module, f"sha256:{number:064x}", GuestKind.MODULE) for number in range(6)))
    assert most == 2


async def test_one_who_stops_waiting_does_not_stop_the_others(tmp_path: Path, module: Path) -> None:
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    first = asyncio.create_task(compiler.compile(module, DIGEST, GuestKind.MODULE))
    second = asyncio.create_task(compiler.compile(module, DIGEST, GuestKind.MODULE))
    await asyncio.sleep(0.02)
    first.cancel()
    assert (await second).exists()


async def test_a_failure_that_nobody_waits_for_any_more_is_not_reported_as_forgotten(tmp_path: Path) -> None:
    bad = tmp_path / "bad.wasm"
    bad.write_bytes(b"\0asm\x01\0\0\0\xff")
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    waiter = asyncio.create_task(compiler.compile(bad, "sha256:" + "b" * 64, GuestKind.MODULE))

    async def running() -> asyncio.Task[Path] | None:
        return next(iter(compiler._running.values()), None)

    under_way = await eventually(running)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    await asyncio.wait({under_way}, timeout=20)
    # What decides whether asyncio complains when the task is collected.
    assert under_way._log_traceback is False
    assert isinstance(under_way.exception(), CompileError)
    await compiler.close()


async def test_close_ends_what_is_under_way(tmp_path: Path) -> None:
    path = tmp_path / "large.wasm"
    path.write_bytes(large_module(400))
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    task = asyncio.create_task(compiler.compile(path, DIGEST, GuestKind.MODULE))
    await asyncio.sleep(0.2)
    await compiler.close()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "compiled").iterdir()) == []


async def test_pruning_keeps_what_is_in_use(tmp_path: Path, module: Path) -> None:
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    kept = await compiler.compile(module, DIGEST, GuestKind.MODULE)
    gone = await compiler.compile(module, "sha256:" + "cd" * 32, GuestKind.MODULE)
    older = kept.with_name(f"{'ab' * 32}-0000000000000000.cwasm")
    older.touch()
    (tmp_path / "compiled" / "unrelated").touch()
    await compiler.prune({DIGEST})
    assert {path.name for path in kept.parent.iterdir()} == {kept.name, kept.name + ".sha256", "unrelated"}
    assert not gone.exists()


async def test_leftovers_of_a_crash_are_removed(tmp_path: Path, module: Path) -> None:
    left = tmp_path / "compiled" / ".compile-abc"
    left.mkdir(parents=True)
    (left / "out").touch()
    os.utime(left, (1, 1))
    compiler = Compiler(tmp_path / "compiled", ImageSettings())
    await compiler.prune(())
    assert list((tmp_path / "compiled").iterdir()) == []


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../x", "sha256:a/b"])
async def test_a_digest_that_is_none_is_refused(tmp_path: Path, module: Path, digest: str) -> None:
    with pytest.raises(CompileError, match="digest"):
        await Compiler(tmp_path / "compiled", ImageSettings()).compile(module, digest, GuestKind.MODULE)


def test_binaries_tell_what_they_are() -> None:
    assert not engine.is_component(bytes(wasmtime.wat2wasm("(module)")))
    assert engine.is_component(bytes(wasmtime.wat2wasm("(component)")))
    with pytest.raises(ValueError, match="layer 2"):
        engine.is_component(b"\0asm\x0d\0\2\0")


def test_the_key_depends_on_version_settings_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    key = engine.engine_key()
    assert key == engine.engine_key()
    monkeypatch.setattr(engine, "cpu_features", lambda: "another processor")
    other = engine.engine_key()
    monkeypatch.setattr(engine, "wasmtime_version", lambda: "0.0.1")
    assert len({key, other, engine.engine_key()}) == 3


@pytest.mark.skipif(landlock.abi() < landlock.LOWEST_ABI or not seccomp.available(), reason="a kernel without fences")
def test_the_compiler_reads_no_file_and_opens_no_socket(tmp_path: Path) -> None:
    """What Cranelift could be made to do by a hostile module, in place of the compilation."""
    script = """
import os, socket, sys
from pathlib import Path
from wasilet_node.runtime import compile_worker, engine

listener = socket.create_server(("127.0.0.1", 0))
found = {}

def attempt(name, function):
    try:
        function()
        found[name] = "ok"
    except OSError as error:
        found[name] = type(error).__name__

def instead_of_the_compiler(_binary):
    folder = Path(sys.argv[1])
    attempt("read", lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)))
    attempt("list", lambda: os.listdir("/"))
    attempt("write beside the output", lambda: os.open(folder / "new", os.O_WRONLY | os.O_CREAT))
    attempt("read the module again", lambda: os.open(folder / "module.wasm", os.O_RDONLY))
    attempt("connect", lambda: socket.create_connection(listener.getsockname(), timeout=5))
    attempt("run", lambda: os.execv("/bin/true", ["true"]))
    attempt("fork", os.fork)
    print(found, os.getuid(), os.getpid(), flush=True)
    raise ValueError("enough")

import encodings.idna
engine.is_component = instead_of_the_compiler
sys.exit(compile_worker.main([sys.argv[1] + "/module.wasm", sys.argv[1] + "/out", "module", str(2**31)]))
"""
    (tmp_path / "module.wasm").write_bytes(b"\0asm\1\0\0\0")
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "enough\n")
    names = ("read", "list", "write beside the output", "read the module again", "connect", "run", "fork")
    text, uid, pid = done.stdout.rsplit(maxsplit=2)
    assert text == str(dict.fromkeys(names, "PermissionError"))
    assert int(uid) == (own_user.FIRST_UID + int(pid) if os.geteuid() == 0 else os.geteuid())
