"""The local registry: CNCF distribution on loopback, with its blobs in the cluster's folder.

Its settings are a file, because an environment variable would be inherited and a command line be seen by everybody.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from harness.controlplane.components import LOOPBACK, Component, Probe
from harness.errors import StateError
from harness.state import State, write_file

COMPONENT = "registry"

_CONFIG = """\
version: 0.1
log:
  level: warn
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: {root}
  delete:
    enabled: true
  maintenance:
    uploadpurging:
      enabled: false
http:
  addr: {address}
  secret: {secret}
"""


def registry_address(port: int) -> str:
    """``host:port``, as image references name it."""
    return f"localhost:{port}"


def registry_component(*, binary: str, port: int, state: State) -> Component:
    """The process. Writes its configuration file when that is missing or different."""
    config = _write_config(port=port, state=state)
    return Component(
        name=COMPONENT,
        argv=(binary, "serve", str(config)),
        ports={"HTTP": port},
        inputs=(config,),
        # Distribution 3 sends traces to a collector on this machine unless it is told that there is none.
        environ={"OTEL_TRACES_EXPORTER": "none"},
        ready=Probe(port=port, path="/v2/"),
    )


def _write_config(*, port: int, state: State) -> Path:
    import json

    path = state.etc / "registry.yml"
    root = state.path / "registry"
    with_secret = str(state.read().get("registry_secret") or "")
    if not with_secret:
        with_secret = secrets.token_hex(16)
        state.update(registry_secret=with_secret)
    text = _CONFIG.format(root=json.dumps(str(root)), address=f"{LOOPBACK}:{port}", secret=with_secret)
    try:
        current = path.read_text()
    except FileNotFoundError:
        current = ""
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if current != text:
        write_file(path, text.encode())
    return path
