"""``run_local``: the sandbox in the foreground."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wasmtime
from wasilet_node.runtime.compile import CompileError
from wasilet_node.runtime.foreground import run_local
from wasilet_node.runtime.protocol import Mount

from tests.unit.node.runtime.component_guests import component_guest
from tests.unit.node.runtime.guests import ARGUMENTS, ECHO, ENVIRONMENT, HELLO, SLEEPER, TRAP, exit_with

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(tmp_path: Path, cache: Path, source: str, *, stdin: bytes = b"", **fields: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    module = tmp_path / "app.wasm"
    module.write_bytes(wasmtime.wat2wasm(source))
    (tmp_path / "in").write_bytes(stdin)
    values: dict[str, Any] = {"argv": (), "env": {}, "mounts": (), "allowed_origins": (), **fields}
    with (
        (tmp_path / "in").open("rb") as into,
        (tmp_path / "out").open("wb") as out,
        (tmp_path / "err").open("wb") as err,
    ):
        code = run_local(
            module,
            stdin_fd=into.fileno(),
            stdout_fd=out.fileno(),
            stderr_fd=err.fileno(),
            cache_dir=cache,
            **values,
        )
    return code, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()


def test_output_goes_to_the_callers_descriptors(tmp_path: Path, cache: Path) -> None:
    assert run(tmp_path, cache, HELLO) == (0, "hello world\n", "")


def test_arguments_environment_and_stdin_arrive(tmp_path: Path, cache: Path) -> None:
    assert run(tmp_path, cache, ARGUMENTS)[1] == "app.wasm\0"
    assert run(tmp_path, cache, ARGUMENTS, argv=("a", "b c"))[1] == "a\0b c\0"
    assert run(tmp_path, cache, ENVIRONMENT, env={"K": "V"})[1] == "K=V\0"
    assert run(tmp_path, cache, ECHO, stdin=b"typed\n")[1] == "typed\n"


@pytest.mark.parametrize("code", [0, 3, 200, 255])
def test_the_exit_code_is_the_guests(tmp_path: Path, cache: Path, code: int) -> None:
    assert run(tmp_path, cache, exit_with(code))[0] == code


def test_a_trap_is_134_and_says_why(tmp_path: Path, cache: Path) -> None:
    code, out, err = run(tmp_path, cache, TRAP)
    assert (code, out) == (134, "doomed\n")
    assert "unreachable" in err


def test_components_run_too(tmp_path: Path, cache: Path) -> None:
    assert run(tmp_path, cache, component_guest("(call $exit_code (i32.const 9)) (i32.const 0)"))[0] == 9


def test_what_cannot_start_says_why(tmp_path: Path, cache: Path) -> None:
    code, _, err = run(tmp_path, cache, HELLO, mounts=(Mount(host="/no/such", guest="/x"),))
    assert code == 126
    assert "/x: No such file or directory: /no/such" in err
    code, _, err = run(tmp_path, cache, HELLO, env={"A": "x\0"})
    assert code == 126
    assert "NUL" in err
    (tmp_path / "script").write_text("#!/bin/sh")
    with (tmp_path / "err").open("wb") as file:
        code = run_local(
            tmp_path / "script",
            argv=(),
            env={},
            mounts=(),
            allowed_origins=(),
            stderr_fd=file.fileno(),
            cache_dir=cache,
        )
    assert code == 126
    assert "not a WebAssembly binary" in (tmp_path / "err").read_text()


def test_what_does_not_compile_is_a_compile_error(tmp_path: Path, cache: Path) -> None:
    module = tmp_path / "bad.wasm"
    module.write_bytes(b"\0asm\1\0\0\0\xff")
    with pytest.raises(CompileError):
        run_local(module, argv=(), env={}, mounts=(), allowed_origins=(), cache_dir=cache)


def test_a_time_limit_ends_it(tmp_path: Path, cache: Path) -> None:
    code, out, err = run(tmp_path, cache, SLEEPER, timeout_seconds=1.5)
    assert (code, out) == (124, "asleep\n")
    assert "1.5 s" in err


def test_ctrl_c_is_130(tmp_path: Path, cache: Path) -> None:
    module = tmp_path / "app.wasm"
    module.write_bytes(wasmtime.wat2wasm(SLEEPER))
    program = (
        "import pathlib, sys; from wasilet_node.runtime.foreground import run_local; "
        "sys.exit(run_local(pathlib.Path(sys.argv[1]), argv=(), env={}, mounts=(), allowed_origins=(), "
        "cache_dir=pathlib.Path(sys.argv[2])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program, str(module), str(cache)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"asleep\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.communicate()
