"""k3s as it is configured: what its servers were started with, and the registries that its nodes pull from.

k3s reads ``config.yaml``, then the files of ``config.yaml.d`` in the order of their names, then its command line; of a
flag that is given several times the last one counts (pkg/configfilearg of k3s).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wasilet.errors import CommandError, UsageError
from wasilet.kube.credentials import load_yaml
from wasilet.providers.docker import Container, Docker

EGRESS_FLAG = "egress-selector-mode"
CONFIG_FILE = "/etc/rancher/k3s/config.yaml"


def egress_disabled(docker: Docker, server: Container) -> bool:
    """Whether a server reaches nodes without k3s's own tunnel."""
    if given := _flag_values(server.command, f"--{EGRESS_FLAG}"):
        return given[-1] == "disabled"
    mode = ""
    for text in _config_texts(docker, server):
        try:
            data = load_yaml(text)
        except UsageError:
            continue
        if isinstance(data, dict) and data.get(EGRESS_FLAG) is not None:
            mode = str(data[EGRESS_FLAG])
    return mode == "disabled"


def _flag_values(words: Sequence[str], *flags: str) -> list[str]:
    values = []
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        # Go's flags take one dash or two.
        if name in flags or f"-{name}" in flags:
            values.append(value if equals else "".join(words[index + 1 : index + 2]))
    return values


def _config_texts(docker: Docker, server: Container) -> Iterator[str]:
    named = [word.partition("=")[2] for word in server.environment if word.startswith("K3S_CONFIG_FILE=")]
    main = [*named, *_flag_values(server.command, "--config", "-c")][-1:] or [CONFIG_FILE]
    folder = f"{main[0]}.d"
    try:
        parts = [name for name in docker.names(server.id, folder) if name.lower().endswith((".yaml", ".yml"))]
        for path in (*main, *(f"{folder}/{name}" for name in parts)):
            yield docker.read(server.id, path)
    except CommandError:
        return


def registries_with(mirror: str, endpoint: str, *, config: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """A registries file in which ``mirror`` leads to ``endpoint``, beside what the user's k3d configuration says under
    ``registries.config``: k3d takes one file only, and a flag would replace the user's. Raises UsageError."""
    registries = _user_registries(config, environ) if config is not None else {}
    mirrors = registries.get("mirrors") or {}
    if not isinstance(mirrors, dict):
        raise UsageError(f"{config}: registries.config has no mapping under mirrors")
    return {**registries, "mirrors": {**mirrors, mirror: {"endpoint": [endpoint]}}}


def _user_registries(config: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """The registries that a k3d configuration file embeds (a text of several lines) or names (one line)."""
    data = _read(config)
    section = data.get("registries") if isinstance(data, dict) else None
    given = section.get("config") if isinstance(section, dict) else None
    if not given:
        return {}
    if not isinstance(given, str):
        raise UsageError(f"{config}: registries.config must be a text or a path, not {type(given).__name__}")
    given = _expanded(given, environ)
    if "\n" in given:
        try:
            found = load_yaml(given)
        except UsageError as error:
            raise UsageError(f"{config}: registries.config is {error.message}") from error
    else:
        base = Path(environ.get("WASILET_INVOCATION_DIR") or Path.cwd())
        found = _read(base / given)
    if not isinstance(found, dict | None):
        raise UsageError(f"{config}: registries.config is no mapping")
    return found or {}


def _read(path: Path) -> Any:
    try:
        return load_yaml(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except UsageError as error:
        raise UsageError(f"{path} is {error.message}") from error


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    """As k3d does it to its configuration files (Go's os.ExpandEnv): what is not set is empty."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: environ.get(found[1] or found[2], ""), text)
