"""A module in the node's own sandbox on this machine, without a cluster: ``invoke run``, and the check before a push.

:func:`run` is the task's: the guest has this process's own stdin, stdout and stderr, and its exit code is the task's.
:func:`check` runs ``python -P -m wasilet.demo.local_run`` as a separate program, whose process group can be ended as
soon as the expected lines are there, since most services never end by themselves. What to run goes through stdin,
because an environment may hold secrets, which are not to be seen on a command line."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from wasilet import process
from wasilet.apps.samples import LocalSpec
from wasilet.demo.expect import judge_of, lacking
from wasilet.errors import HarnessError, UsageError
from wasilet.settings import cache_root
from wasilet.storage import NO_ROOM, storage_errors

Say = Callable[[str], None]

SHOWN_LINES = 15
LOCAL_ANSWER_SECONDS = 10.0
"""For each of the answers that are wanted; the first request may find the server at its start."""

START_ERROR_EXIT_CODE = 126
"""Of ``wasilet_node.runtime.foreground``: the module cannot be started at all."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What is run, and what it gets."""

    module: str
    """Path of the wasm file."""

    argv: tuple[str, ...] = ()
    """Arguments after the program's own name."""

    env: dict[str, str]
    dirs: tuple[tuple[str, str, bool], ...] = ()
    """Host folder, guest folder, whether it is for reading only."""

    allow: tuple[str, ...] = ()
    """Origins for wasi-experimental-http."""

    port: int = 0
    """Where a component that answers HTTP requests listens, on loopback; 0: where there is room."""


def make_spec(
    module: Path,
    *,
    args: Sequence[str] = (),
    env: Sequence[str] = (),
    dirs: Sequence[str] = (),
    allow: Sequence[str] = (),
    port: int = 0,
    environ: Mapping[str, str] = os.environ,
) -> RunSpec:
    """From what was typed: ``K=V`` (or ``K``, taken from this environment), ``HOST::GUEST`` (``HOST::GUEST::ro``), and
    origins. Raises UsageError for what makes no sense, and for host folders that are not there."""
    return RunSpec(
        module=str(module),
        argv=tuple(args),
        env=dict(_variable(text, environ) for text in env),
        dirs=tuple(_folder(text, environ) for text in dirs),
        allow=tuple(_origin(text) for text in allow),
        port=_port(port),
    )


def run(spec: RunSpec, *, environ: Mapping[str, str] = os.environ) -> int:
    """Run in the foreground; the guest's exit code (134 for a trap). Raises HarnessError when it cannot be compiled."""
    from wasilet_node.runtime.compile import CompileError
    from wasilet_node.runtime.foreground import run_local
    from wasilet_node.runtime.protocol import Mount

    module, cache = Path(spec.module), cache_root(environ) / "compiled"
    try:
        return run_local(
            module,
            argv=(module.stem, *spec.argv),
            env=spec.env,
            mounts=[Mount(host=host, guest=guest, read_only=read_only) for host, guest, read_only in spec.dirs],
            allowed_origins=spec.allow,
            cache_dir=cache,
            port=spec.port,
        )
    except CompileError as error:
        raise HarnessError(f"{module.name} cannot be compiled: {error}") from error
    except OSError as error:
        if error.errno in NO_ROOM:
            with storage_errors(cache):
                raise
        raise UsageError(f"{module} cannot be read: {error.strerror}") from error


def check(module: Path, local: LocalSpec, *, say: Say, environ: Mapping[str, str] = os.environ) -> str:
    """Run ``module`` as ``local`` states and compare; a line about what was seen.

    Raises HarnessError with what the program wrote when a line is missing, it ends with another code, or it takes
    longer than ``local.timeout_seconds``.
    """
    from wasilet_node.runtime.foreground import SERVING

    said = _Output(local)
    answered: list[str] = []
    with tempfile.TemporaryDirectory(prefix="wasilet-run-") as folder:
        spec = RunSpec(
            module=str(module),
            argv=local.args,
            env=local.env,
            dirs=_make_folders(local, Path(folder)),
            allow=local.allow,
        )

        def on_line(line: str) -> None:
            said.take(line)
            say(line)
            if local.http and not answered and line.startswith(SERVING):
                url = line.removeprefix(SERVING).split()[0]
                answered.extend(_ask(url, local, said))
            if local.exit_code is None and not said.missing and len(answered) == len(local.http):
                raise _SeenError

        try:
            done = process.run(
                [sys.executable, "-P", "-m", "wasilet.demo.local_run"],
                timeout_seconds=local.timeout_seconds,
                env={**environ, "PYTHONUNBUFFERED": "1"},
                cwd=Path(folder),
                input=json.dumps(asdict(spec)),
                check=False,
                on_line=on_line,
            )
        except _SeenError:
            return answered[-1] if answered else f"{said.count} lines: {said.shown[-1]}"
        except process.CommandError as error:
            if error.returncode is None and not said.missing and not local.http and local.exit_code is None:
                return "runs"
            raise HarnessError(_difference(f"it did not end within {local.timeout_seconds:g} s", said)) from error
    if said.missing:
        raise HarnessError(_difference(f"it ended with exit code {done.returncode} and without {said.missing}", said))
    if local.exit_code is None:
        raise HarnessError(_difference(f"it ended with exit code {done.returncode}, and should run on", said))
    if done.returncode != local.exit_code:
        raise HarnessError(_difference(f"its exit code is {done.returncode}, not {local.exit_code}", said))
    return f"exit code {done.returncode}, {said.count} lines"


class _Output:
    """What the program wrote, judged line by line; its end is kept to be shown."""

    def __init__(self, local: LocalSpec) -> None:
        self._judge = judge_of(local.log)
        self.count = 0
        self.shown: deque[str] = deque(maxlen=SHOWN_LINES)

    def take(self, line: str) -> None:
        """The next line."""
        self.count += 1
        self.shown.append(line)
        if self._judge is not None:
            self._judge.feed([line])

    @property
    def missing(self) -> str:
        """The first of the wanted lines that has not come, or what came and must not; empty when all is well."""
        return lacking(self._judge)


def _ask(url: str, local: LocalSpec, said: _Output) -> list[str]:
    """The answers as text. Raises HarnessError for the first that is not as it must be."""
    from wasilet.demo.http_check import exchange
    from wasilet.testing.http import ask

    answers = []
    for wanted in local.http:
        asked = exchange(
            wanted,
            lambda seconds, wanted=wanted: ask(  # type: ignore[misc]
                url + wanted.path, method=wanted.method, body=wanted.body or None, timeout_seconds=seconds
            ),
            within_seconds=LOCAL_ANSWER_SECONDS,
        )
        if asked.lacks:
            raise HarnessError("\n".join([_difference(f"{wanted}: {'; '.join(asked.lacks)}", said), *asked.describe()]))
        answers.append(f"{wanted}: {asked.answer.status if asked.answer else 0}")
    return answers


class _SeenError(Exception):
    """Raised in the reader to end a program that has shown what it should."""


def _difference(what: str, said: _Output) -> str:
    shown = "\n".join(f"  | {line}" for line in said.shown) or "  | (it wrote nothing)"
    return f"the module does not do locally what it should: {what}\n{shown}"


def _make_folders(local: LocalSpec, root: Path) -> tuple[tuple[str, str, bool], ...]:
    """Folders with the files that ``local.dirs`` lists."""
    mounts = []
    for number, (guest, files) in enumerate(local.dirs.items()):
        host = root / f"mount-{number}"
        host.mkdir()
        for name, content in (files or {}).items():
            if Path(name).name != name:
                raise UsageError(f"demo.yaml: local.dirs: {name!r} is no file name")
            (host / name).write_text(content)
        path, read_only = (guest.removesuffix("::ro"), guest.endswith("::ro"))
        mounts.append((str(host), path, read_only))
    return tuple(mounts)


def _variable(text: str, environ: Mapping[str, str]) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or "\0" in text:
        raise UsageError(f"{text!r} sets no variable", hint="write -e NAME=VALUE")
    if not equals:
        if name not in environ:
            raise UsageError(f"-e {name}: this environment has no such variable", hint="write -e NAME=VALUE")
        value = environ[name]
    return name, value


def _folder(text: str, environ: Mapping[str, str]) -> tuple[str, str, bool]:
    parts = text.split("::")
    read_only = len(parts) == 3 and parts[2] == "ro"
    if len(parts) not in {2, 3} or (len(parts) == 3 and not read_only) or not all(parts):
        raise UsageError(f"--dir {text!r} is not understood", hint="write --dir HOST::GUEST, or HOST::GUEST::ro")
    host = Path(environ.get("WASILET_INVOCATION_DIR") or Path.cwd()) / Path(parts[0]).expanduser()
    if not host.is_dir():
        raise UsageError(f"--dir {text!r}: there is no folder {host}")
    return str(host.resolve()), parts[1], read_only


def _origin(text: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path.strip("/") or parts.query:
        raise UsageError(f"--allow {text!r} is no origin", hint="write scheme and host, as https://api.example")
    return f"{parts.scheme}://{parts.netloc}"


def _port(number: int) -> int:
    if not 0 <= number <= 65535:
        raise UsageError(f"--port {number} is no port", hint="0 to 65535; 0 takes any that is free")
    return number


def main() -> int:
    """Run what stdin describes; the guest itself gets an empty stdin."""
    data = json.loads(sys.stdin.buffer.read())
    data["argv"], data["allow"] = tuple(data["argv"]), tuple(data["allow"])
    data["dirs"] = tuple(tuple(entry) for entry in data["dirs"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    try:
        return run(RunSpec(**data))
    except HarnessError as error:
        print(error, file=sys.stderr)  # noqa: T201  (a command line)
        return START_ERROR_EXIT_CODE


if __name__ == "__main__":
    raise SystemExit(main())
