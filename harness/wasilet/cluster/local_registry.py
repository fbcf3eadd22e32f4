"""The local registry: CNCF distribution on loopback, with its blobs in the cluster's folder.

Its settings are a file, because an environment variable would be inherited and a command line be seen by everybody.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from wasilet.cluster.state import State, write_file
from wasilet.controlplane.components import LOOPBACK, Component, Probe
from wasilet.errors import StateError

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
    readonly:
      enabled: {readonly}
http:
  addr: {address}
  secret: {secret}
"""


def registry_address(port: int) -> str:
    """``host:port``, as image references name it."""
    return f"localhost:{port}"


def registry_component(
    *, binary: str, port: int, state: State, name: str = COMPONENT, address: str = LOOPBACK, readonly: bool = False
) -> Component:
    """The process. Writes its configuration file when that is missing or different. A second one of another ``name``
    shares the blobs: distribution keeps no state of its own beside them."""
    config = _write_config(f"{address}:{port}", state=state, name=name, readonly=readonly)
    return Component(
        name=name,
        argv=(binary, "serve", str(config)),
        ports={"HTTP": port},
        inputs=(config,),
        # Distribution 3 sends traces to a collector on this machine unless it is told that there is none.
        environ={"OTEL_TRACES_EXPORTER": "none"},
        addresses=(address,),
        ready=Probe(port=port, path="/v2/", host=address),
    )


def _write_config(address: str, *, state: State, name: str, readonly: bool) -> Path:
    import json

    path = state.etc / f"{name}.yml"
    root = state.path / "registry"
    with_secret = str(state.read().get("registry_secret") or "")
    if not with_secret:
        with_secret = secrets.token_hex(16)
        state.update(registry_secret=with_secret)
    text = _CONFIG.format(
        root=json.dumps(str(root)), address=address, secret=with_secret, readonly=str(readonly).lower()
    )
    try:
        current = path.read_text()
    except FileNotFoundError:
        current = ""
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if current != text:
        write_file(path, text.encode())
    return path
