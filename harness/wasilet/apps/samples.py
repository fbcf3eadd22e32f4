"""Applications: the samples of this project and the folders of users, and what each ``demo.yaml`` states about them.

A demo is data, so that a new sample needs no code: what is checked locally, which templates are applied, what the
cluster must show within which time, and what a person may type next. An unknown key is an error: a misspelt assertion
that is silently skipped would make a demo that cannot fail.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from wasilet_common.kube_yaml import YamlError, load

from wasilet.errors import UsageError
from wasilet.package_data import data_path

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_T = TypeVar("_T")


_KINDS = ("pod", "job", "deployment", "service")


class DemoError(Exception):
    """A ``demo.yaml`` holds something that means nothing; turned into a UsageError with the file's name."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One assertion about a log: exactly one of the three is set."""

    contains: str = ""
    """A line holds this text."""

    matches: str = ""
    """A line matches this regular expression somewhere."""

    absent: str = ""
    """No line holds this text."""

    def __str__(self) -> str:
        """For messages."""
        if self.matches:
            return f"a line that matches {self.matches!r}"
        return f"no line with {self.absent!r}" if self.absent else f"a line with {self.contains!r}"


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One HTTP request with what its answer must be like. It is sent until the answer is so, or the time is over."""

    method: str = "GET"
    path: str = "/"
    body: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    """Of the answer."""

    contains: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``POST /``: for messages."""
        return f"{self.method} {self.path}"


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """How the source becomes a module, where the folder's files alone do not say."""

    binary: str | None = None
    """Which program of a crate with several."""

    flags: tuple[str, ...] = ()
    """Further flags for the C compiler."""


@dataclass(frozen=True, kw_only=True)
class LocalSpec:
    """The check before anything is pushed: the module runs in the node's own sandbox, here, without a cluster."""

    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    dirs: dict[str, dict[str, str]] = field(default_factory=dict)
    """Guest folder to its files, name to content: made in a temporary folder."""

    allow: tuple[str, ...] = ()
    """Origins for wasi-experimental-http."""

    log: tuple[Line, ...] = ()
    http: tuple[Exchange, ...] = ()
    """Of a component that answers HTTP requests: sent one after the other."""

    exit_code: int | None = None
    """None: the program runs for ever, and is stopped once ``log`` is seen and ``http`` was answered."""

    timeout_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the cluster must show. One of ``pod``, ``job``, ``deployment`` and ``service`` names the object."""

    pod: str = ""
    job: str = ""
    deployment: str = ""
    service: str = ""
    """What is asked by ``http``."""

    http: tuple[Exchange, ...] = ()
    rolling_update: str = ""
    """A Deployment behind ``service``: its pods are replaced while the first of ``http`` is sent all the time, and no
    request may fail."""

    requests_per_second: float = 50.0
    container: str = ""
    log: tuple[Line, ...] = ()
    previous: bool = False
    """The log of the instance before: of a container that was started again."""

    phase: str = ""
    exit_code: int | None = None
    """Of the container's last end, in ``state`` or, when it was started again, in ``lastState``."""

    reason: str = ""
    """``state.terminated.reason``, or that of ``lastState``."""

    restarts: int | None = None
    """At least this many."""

    within_seconds: float = 60.0

    @property
    def object_name(self) -> str:
        """``pod/x``, ``job/x``, ``deployment/x`` or ``service/x``: as kubectl takes it."""
        kind = next(kind for kind in _KINDS if getattr(self, kind))
        return f"{kind}/{getattr(self, kind)}"

    @property
    def title(self) -> str:
        """Of the step, and of its lines: each expectation of a demo has another one."""
        return f"rolling update of deployment/{self.rolling_update}" if self.rolling_update else self.object_name


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A ``demo.yaml``."""

    description: str = ""
    build: BuildSpec = BuildSpec()
    local: LocalSpec | None = None
    manifests: tuple[str, ...] = ("pod.yaml.j2",)
    variables: dict[str, Any] = field(default_factory=dict)
    """For the templates, beside ``image``, ``namespace`` and ``node_selector``."""

    services: tuple[str, ...] = ()
    """What the demo starts on this machine where the internet is absent; see ``wasilet.demo.demo_services``."""

    expect: tuple[Expectation, ...] = ()
    next: tuple[str, ...] = ()
    """Commands for the person to type, templates too."""


@dataclass(frozen=True, kw_only=True)
class App:
    """A folder that builds to one module."""

    name: str
    """A DNS label: names the repository in the registry too."""

    folder: Path
    demo: Demo
    is_sample: bool = False


def samples_root() -> Path:
    """The samples: beside this package in a checkout, inside it when installed from a wheel."""
    return data_path("samples")


def sample_names() -> list[str]:
    """Every sample, sorted."""
    return sorted(entry.name for entry in samples_root().iterdir() if (entry / "demo.yaml").is_file())


def find_app(given: str, *, environ: Mapping[str, str] = os.environ) -> App:
    """The app that a person means: a sample's name, or the path of a folder (relative to where they called from).

    Raises UsageError when there is no such sample or folder, or its ``demo.yaml`` is wrong.
    """
    samples = samples_root()
    if "/" not in given and given not in {".", ".."} and (samples / given).is_dir():
        return _load(samples / given, is_sample=True)
    folder = (Path(environ.get("WASILET_INVOCATION_DIR") or Path.cwd()) / Path(given).expanduser()).resolve()
    if not folder.is_dir():
        if "/" in given:
            raise UsageError(f"there is no folder {folder}")
        raise UsageError(
            f"there is no sample {given!r}", hint=f"there are {', '.join(sample_names())}; or give a folder: ./{given}"
        )
    return _load(folder, is_sample=folder.parent == samples)


def _load(folder: Path, *, is_sample: bool) -> App:
    name = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    if not _LABEL.fullmatch(name):
        raise UsageError(f"the folder's name {folder.name!r} makes no name for an app", hint="use letters and digits")
    return App(name=name, folder=folder, demo=_read_demo(folder / "demo.yaml"), is_sample=is_sample)


def _read_demo(file: Path) -> Demo:
    try:
        data = load(file.read_bytes())
    except FileNotFoundError:
        return Demo()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except YamlError as error:
        where = f"{file}, line {error.line}" if error.line else str(file)
        raise UsageError(f"{where} is not YAML: {error.message}") from error
    try:
        return _demo(data)
    except DemoError as error:
        raise UsageError(f"{file}: {error}") from error


def _demo(data: Any) -> Demo:
    values = _mapping(data, "the file")
    if "build" in values:
        values["build"] = _make(BuildSpec, values["build"], "build")
    if values.get("local") is not None:
        local = _mapping(values["local"], "local")
        local["log"] = _lines(local.get("log"), "local.log")
        local["http"] = _exchanges(local.get("http"), "local.http")
        values["local"] = _make(LocalSpec, local, "local")
        # YAML's 1 and true are numbers and booleans; a variable of the environment is a text.
        for name, value in values["local"].env.items():
            if not isinstance(value, str):
                raise DemoError(f"local.env.{name} must be a text: write it in quotes")
    expectations = values.get("expect") or []
    if not isinstance(expectations, list):
        raise DemoError("expect must be a list")
    values["expect"] = tuple(_expectation(item, f"expect[{index}]") for index, item in enumerate(expectations))
    return _make(Demo, values, "the file")


def _expectation(data: Any, where: str) -> Expectation:
    values = _mapping(data, where)
    values["log"] = _lines(values.get("log"), f"{where}.log")
    values["http"] = _exchanges(values.get("http"), f"{where}.http")
    expectation = _make(Expectation, values, where)
    if sum(bool(getattr(expectation, kind)) for kind in _KINDS) != 1:
        raise DemoError(f"{where} must name one {', '.join(_KINDS[:-1])} or {_KINDS[-1]}")
    if bool(expectation.service) != bool(expectation.http):
        raise DemoError(f"{where}: http says what a service is asked, and a service is asked nothing else")
    if expectation.rolling_update and not expectation.service:
        raise DemoError(f"{where}.rolling_update needs the service that is asked meanwhile")
    return expectation


def _exchanges(data: Any, where: str) -> tuple[Exchange, ...]:
    if data is None:
        return ()
    if not isinstance(data, list):
        raise DemoError(f"{where} must be a list")
    return tuple(_make(Exchange, item, f"{where}[{index}]") for index, item in enumerate(data))


def _lines(data: Any, where: str) -> tuple[Line, ...]:
    if data is None:
        return ()
    if not isinstance(data, list):
        raise DemoError(f"{where} must be a list")
    lines = []
    for item in data:
        line = Line(contains=item) if isinstance(item, str) else _make(Line, item, where)
        if sum(map(bool, (line.contains, line.matches, line.absent))) != 1:
            raise DemoError(f"{where}: each line is a text, or one of contains, matches and absent")
        if line.matches:
            try:
                re.compile(line.matches)
            except re.error as error:
                raise DemoError(f"{where}: {line.matches!r} is no regular expression: {error}") from error
        lines.append(line)
    return tuple(lines)


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise DemoError(f"{where} must be a mapping")
    return dict(data)


def _make(kind: type[_T], data: Any, where: str) -> _T:
    values = _mapping(data, where)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise DemoError(f"{where} has an unknown key {unknown[0]!r} (known are {', '.join(known)})")
    for name, value in values.items():
        default: Any = known[name].default
        factory: Any = known[name].default_factory
        if factory is not MISSING:
            default = factory()
        values[name] = _coerced(value, default, known[name].type, f"{where}.{name}")
    return kind(**values)


def _coerced(value: Any, default: Any, annotation: Any, where: str) -> Any:
    """YAML's scalars and lists as the field wants them; anything else is refused by name."""
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise DemoError(f"{where} must be a list")
        return tuple(value)
    if isinstance(default, bool) or annotation == "bool":
        wanted: tuple[type, ...] = (bool,)
    elif isinstance(default, float):
        wanted = (int, float)
    elif "int" in str(annotation):
        wanted = (int, type(None))
    elif isinstance(default, dict):
        wanted = (dict,)
    elif isinstance(default, str) or "str" in str(annotation):
        wanted = (str, type(None))
    else:
        return value
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise DemoError(f"{where} must be {' or '.join(kind.__name__ for kind in wanted)}, not {value!r}")
    return value
