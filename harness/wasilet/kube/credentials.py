"""How to reach an API server, and what a kubeconfig says of it.

client-go's rules: relative names are relative to the file, embedded data wins over named files, a token file is read
when there is no token, and an exec plugin is run for what it answers.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasilet.errors import UsageError

EXEC_PLUGIN_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """How to reach an API server; PEM bytes throughout."""

    server: str
    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    token: str = ""
    verify: bool = True
    server_name: str = ""
    """Checked against the server's certificate in place of the host of ``server``."""


def load_yaml(text: str | bytes) -> Any:
    """Parse YAML safely, by libyaml where it is there (ten times as fast)."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(text, Loader=loader)  # noqa: S506  (both are safe loaders)


def read_credentials(path: Path, *, context: str = "") -> Credentials:
    """What a context of a kubeconfig file says, exec plugins and token files included. Raises UsageError."""
    import yaml

    try:
        data = load_yaml(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read kubeconfig {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"kubeconfig {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"kubeconfig {path} is empty")
    name = context or str(data.get("current-context") or "")
    chosen = _entry(data, "contexts", name, path).get("context") or {}
    cluster = _entry(data, "clusters", str(chosen.get("cluster")), path).get("cluster") or {}
    user = _entry(data, "users", str(chosen.get("user")), path).get("user") or {}
    user = user | _exec_credential(user["exec"], path) if user.get("exec") else user
    token = str(user.get("token") or "")
    if not token and user.get("tokenFile"):
        token = _file(str(user["tokenFile"]), path).decode().strip()
    return Credentials(
        server=str(cluster.get("server") or ""),
        ca=_bytes(cluster, "certificate-authority", path),
        certificate=_bytes(user, "client-certificate", path),
        key=_bytes(user, "client-key", path),
        token=token,
        verify=not cluster.get("insecure-skip-tls-verify"),
        server_name=str(cluster.get("tls-server-name") or ""),
    )


def _entry(data: dict[str, Any], section: str, name: str, path: Path) -> dict[str, Any]:
    for entry in data.get(section) or []:
        if isinstance(entry, dict) and entry.get("name") == name:
            return entry
    names = ", ".join(str(e.get("name")) for e in data.get("contexts") or [] if isinstance(e, dict))
    raise UsageError(
        f"kubeconfig {path} has no {section.removesuffix('s')} {name!r}", hint=f"its contexts: {names or 'none'}"
    )


def _bytes(data: dict[str, Any], key: str, path: Path) -> bytes | None:
    if embedded := data.get(f"{key}-data"):
        try:
            return base64.b64decode(embedded, validate=False)
        except ValueError as error:
            raise UsageError(f"kubeconfig {path}: {key}-data is not base64") from error
    return _file(str(data[key]), path) if data.get(key) else None


def _file(name: str, kubeconfig: Path) -> bytes:
    """Relative names are relative to the kubeconfig, as kubectl has it."""
    target = kubeconfig.parent / name
    try:
        return target.read_bytes()
    except OSError as error:
        raise UsageError(f"kubeconfig {kubeconfig} names {target}, which cannot be read: {error.strerror}") from error


def _exec_credential(plugin: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run a client-go credential plugin (client.authentication.k8s.io ExecCredential)."""
    from wasilet.process import run

    version = str(plugin.get("apiVersion") or "client.authentication.k8s.io/v1")
    info = json.dumps({"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}})
    extra = {str(e["name"]): str(e["value"]) for e in plugin.get("env") or []}
    done = run(
        [str(plugin["command"]), *map(str, plugin.get("args") or [])],
        timeout_seconds=EXEC_PLUGIN_TIMEOUT_SECONDS,
        env=os.environ | extra | {"KUBERNETES_EXEC_INFO": info},
    )
    try:
        status = json.loads(done.stdout)["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the credential plugin of kubeconfig {path} gave no ExecCredential") from error
    answer: dict[str, Any] = {}
    if status.get("token"):
        answer["token"] = status["token"]
    for ours, theirs in (("client-certificate", "clientCertificateData"), ("client-key", "clientKeyData")):
        if status.get(theirs):
            answer[f"{ours}-data"] = base64.b64encode(str(status[theirs]).encode()).decode()
    return answer
