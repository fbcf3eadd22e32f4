"""How to reach an API server, and what a kubeconfig states about it.

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

from wasilet_common import kube_yaml, kubeconfig
from wasilet_common.kubeconfig import Entry, KubeconfigError, KubeconfigFile

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
    """The first document of a YAML text, as kubectl reads it. Raises UsageError."""
    try:
        return kube_yaml.load(text)
    except kube_yaml.YamlError as error:
        raise UsageError(f"not YAML: {error}") from error


def read_credentials(path: Path, *, context: str = "") -> Credentials:
    """What a context of a kubeconfig file says, exec plugins and token files included. Raises UsageError."""
    try:
        file = kubeconfig.read(path)
        if not file.data:
            raise UsageError(f"kubeconfig {path} is empty")
        return _credentials(file, context or file.current_context)
    except OSError as error:
        raise UsageError(f"cannot read kubeconfig {path}: {error.strerror}") from error
    except KubeconfigError as error:
        raise UsageError(str(error)) from error


def _credentials(file: KubeconfigFile, context: str) -> Credentials:
    contexts = file.entries("contexts")
    if context not in contexts:
        raise UsageError(
            f"kubeconfig {file.origin} has no context {context!r}",
            hint=f"its contexts: {', '.join(contexts) or 'none'}",
        )
    cluster, user = file.resolve(context)
    if user.values.get("exec"):
        user = Entry(file.origin, {**user.values, **_exec_credential(user.values["exec"], file.origin)})
    return Credentials(
        server=cluster.text("server") or "",
        ca=cluster.data("certificate-authority"),
        certificate=user.data("client-certificate"),
        key=user.data("client-key"),
        token=user.token() or "",
        verify=not cluster.values.get("insecure-skip-tls-verify"),
        server_name=cluster.text("tls-server-name") or "",
    )


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
