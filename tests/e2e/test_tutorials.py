"""The pages that people type along: every command of them is typed here, and must print what the page says.

Each page has a home folder, ports and a cluster of its own. What the page leaves running is ended afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from wasilet.controlplane.acquire import locate
from wasilet.settings import cache_root

from tests.docs_pages import DOCS, Command, File, begins, items, matches
from tests.e2e.guests import needs_a_component_host, needs_rust_for_bindings

pytestmark = pytest.mark.e2e

COMMAND_LIMIT_SECONDS = 900.0
"""The first build of an app with dependencies fetches and compiles them."""

INTERRUPT_LIMIT_SECONDS = 10.0
RUNS_ON_SECONDS = 0.5
"""A command that the page interrupts is still there after this time."""

PROGRESS = "  ...      "
"""What `./run` says of a step that takes long, without a terminal: more on a slow machine, and in no page."""

CHECKOUT = DOCS.parent
PORTS = {"localhost:5000": "registry", "--port 3000": "node", "127.0.0.1:8090": "api", "--port 8090": "api"}
"""What the pages call them, and what stands for it in a test: another program may have these ports."""

PAGES = (
    "quickstart.md",
    "tutorials/hello-world-2020.md",
    "tutorials/hello-wasm-2022.md",
    "tutorials/cat-facts.md",
    "tutorials/web-service.md",
)
SERVES = ("tutorials/web-service.md",)
"""Its app is a component in Rust that answers HTTP requests."""


class Shell:
    """A shell as the page's reader has it. Each command is a bash of its own, so that each can be interrupted and timed
    by itself; variables and the folder go on from one to the next."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._groups: list[int] = []
        self._state = home / ".state"
        self._state.write_text("")
        self._env = environment(home)
        self._ports = {name: str(port) for name, port in zip(("registry", "node", "api"), free_ports(3), strict=True)}
        (home / ".invoke.yaml").write_text(f"wasilet:\n  ports:\n    registry: {self._ports['registry']}\n")

    def real(self, text: str) -> str:
        """With this test's ports in place of the page's."""
        for printed, name in PORTS.items():
            text = text.replace(printed, printed[: -len("0000")] + self._ports[name])
        return text

    def write(self, file: File) -> None:
        """As an editor does."""
        path = Path(file.path.replace("~", str(self.home), 1))
        assert path.is_relative_to(self.home), f"the page writes to {file.path}, which is the reader's own"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.real(file.content))

    def type(self, command: Command) -> None:
        """Run one command and compare."""
        script = (
            f"source {self._state}\n{self.real(command.text)}\n__code=$?\n"
            f"{{ export -p; declare -p | grep '^declare -- [a-z]'; printf 'cd %q\\n' \"$PWD\"; }} > {self._state}\n"
            "exit $__code\n"
        )
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=CHECKOUT,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._groups.append(process.pid)
        expected = tuple(map(self.real, command.expected))
        try:
            lines, problem = self._follow(process, expected, command)
        finally:
            # A background job that was given the pipe would hold it open; the pages send such output to a file.
            if process.stdout is not None:
                process.stdout.close()
        shown = "\n".join(lines[-60:])
        said = f"line {command.line}: $ {command.text}\n--- the page says\n" + "\n".join(expected)
        assert not problem, f"{said}\n--- {problem}; it printed\n{shown}"

    def _follow(
        self, process: subprocess.Popen[str], expected: tuple[str, ...], command: Command
    ) -> tuple[list[str], str]:
        incoming: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process, incoming), daemon=True)
        reader.start()
        lines: list[str] = []
        deadline = time.monotonic() + COMMAND_LIMIT_SECONDS
        while process.poll() is None or not incoming.empty():
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return lines, f"it did not end within {COMMAND_LIMIT_SECONDS:g} s"
            with contextlib.suppress(queue.Empty):
                lines.append(incoming.get(timeout=0.05))
            if command.interrupted and begins(expected, lines):
                time.sleep(RUNS_ON_SECONDS)
                if process.poll() is not None:
                    break
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(INTERRUPT_LIMIT_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return lines, "Ctrl-C did not end it"
                return lines, ""
        reader.join(0.5)
        while not incoming.empty():
            lines.append(incoming.get())
        if command.interrupted:
            return lines, f"it ended by itself with exit code {process.returncode}"
        if process.returncode != command.exit_code:
            return lines, f"its exit code is {process.returncode}, not {command.exit_code}"
        return lines, "" if not expected or matches(expected, lines) else "that differs"

    def close(self) -> None:
        """End what the page left: background jobs, its cluster, nodes that joined it by hand."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGTERM)
        subprocess.run(
            [CHECKOUT / "run", "down", "--purge"], cwd=CHECKOUT, env=self._env, capture_output=True, check=False
        )
        # Supervisors leave the session of their agent; what they have in common with the page is its home folder.
        left = [process for process in psutil.process_iter() if str(self.home) in " ".join(_words(process))]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(left, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    # ValueError: closed, since no one reads it any more.
    with contextlib.suppress(ValueError):
        for line in process.stdout or ():
            if not line.startswith(PROGRESS):
                lines.put(line.rstrip("\n"))


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def environment(home: Path) -> dict[str, str]:
    """A newcomer's: nothing of this user's but what was downloaded and compiled before."""
    own = ("WASILET_", "XDG_", "INVOKE_", "KUBE", "DOCKER_", "PYTEST_", "NO_COLOR", "KRUSTLET_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    user = Path.home()
    for name, folder in (("CARGO_HOME", user / ".cargo"), ("RUSTUP_HOME", user / ".rustup")):
        if folder.is_dir():
            env.setdefault(name, str(folder))
    kubectl = locate("kubectl", cache=cache_root(), environ=os.environ)
    assert kubectl is not None, "`./run test` brings kubectl"
    # A reader's shell has no virtual environment on its PATH: `./run` must do without.
    path = [part for part in env.get("PATH", "").split(":") if ".venv" not in part]
    env["PATH"] = ":".join([str(kubectl.path.parent), *path])
    env.pop("VIRTUAL_ENV", None)
    return env | {
        "HOME": str(home),
        "WASILET_CACHE": str(cache_root()),
        # Where it is anyway; said, so that ports are chosen away from those of this user's own cluster.
        "WASILET_STATE_HOME": str(home / ".local/state/wasilet"),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }


def free_ports(count: int) -> list[int]:
    """Five digits each, so that they can stand where the page's stand."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextlib.contextmanager
def home_folder(name: str) -> Iterator[Path]:
    """An empty private folder with a short path, the same each time: what was compiled for an app is kept by the app's
    path, so that the dependencies of cat-facts are compiled once per machine, and not once per run."""
    root = Path(f"/tmp/wasilet-docs-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    assert root.lstat().st_uid == os.getuid(), f"{root} belongs to somebody else"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        home = root / name
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(mode=0o700)
        yield home
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def shell(request: pytest.FixtureRequest) -> Iterator[Shell]:
    page = getattr(request.node, "callspec", None)
    with home_folder(Path(page.params["page"]).stem if page else "shell") as home:
        made = Shell(home)
        yield made
        made.close()


@pytest.mark.parametrize("page", PAGES)
def test_the_page_works_as_it_is_printed(shell: Shell, page: str) -> None:
    if page in SERVES:
        needs_a_component_host()
        needs_rust_for_bindings()
    done = items((DOCS / page).read_text(), name=page)
    assert done
    for number, item in enumerate(done):
        if isinstance(item, File):
            shell.write(item)
            continue
        try:
            shell.type(item)
        except AssertionError as error:
            raise AssertionError(f"{page} ({number} of {len(done)}), {error}") from None


def test_a_command_that_prints_something_else_is_noticed(shell: Shell) -> None:
    right = Command(line=1, text="word=blue; printf 'a  b\\n'", expected=("a  ...",))
    shell.type(right)
    shell.type(dataclasses.replace(right, text="echo $word; pwd", expected=("blue", str(CHECKOUT))))
    for wrong in (
        dataclasses.replace(right, expected=("a  c",)),
        dataclasses.replace(right, text="exit 3"),
        dataclasses.replace(right, text="echo seen", expected=("seen",), interrupted=True),
    ):
        with pytest.raises(AssertionError, match="line 1"):
            shell.type(wrong)
    shell.type(Command(line=1, text="echo seen; sleep 60", expected=("seen",), interrupted=True))
