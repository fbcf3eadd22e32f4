"""The local registry: CNCF distribution on loopback, with its blobs in the cluster's folder.

It wants a login, since any process of the machine can speak to loopback, and any client that may push to it chooses
what the pods of all namespaces run. The password is random; the nodes hold it (``--registry-config``), ``push`` and
``pull`` find it, and for other tools it is in a file as ``docker login`` writes one. Nothing can be deleted by the API.

Its settings are a file, because an environment variable would be inherited and a command line be seen by everyone.
"""

from __future__ import annotations

import base64
import http.client
import json
import secrets
from collections.abc import Iterable
from pathlib import Path

from wasilet.controlplane.components import Component
from wasilet.controlplane.health import LOOPBACK, PROBE_TIMEOUT_SECONDS, Probe
from wasilet.errors import StateError
from wasilet.state import CLUSTER_LOGIN, State
from wasilet.storage import read_json, storage_errors, write_file, write_json

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
    enabled: false
  maintenance:
    uploadpurging:
      enabled: false
    readonly:
      enabled: {readonly}
http:
  addr: {address}
  secret: {secret}
"""

_AUTH = """\
auth:
  htpasswd:
    realm: wasilet
    path: {passwords}
"""

_USER = "wasilet"


def registry_address(port: int) -> str:
    """``host:port``, as image references name it."""
    return f"localhost:{port}"


def registry_component(
    *,
    binary: str,
    port: int,
    state: State,
    name: str = COMPONENT,
    address: str = LOOPBACK,
    readonly: bool = False,
    login: tuple[Path, Iterable[str]] | None = None,
) -> Component:
    """The process. Writes its configuration file when that is missing or different. A second one of another ``name``
    shares the blobs: distribution keeps no state of its own beside them. ``login``: the folder of the login that it
    wants, and the names by which it is known; None: none."""
    passwords = write_login(*login) if login is not None else None
    config = _write_config(f"{address}:{port}", state=state, name=name, passwords=passwords, readonly=readonly)
    return Component(
        name=name,
        argv=(binary, "serve", str(config)),
        ports={"HTTP": port},
        inputs=(config,) if passwords is None else (config, passwords),
        # Distribution 3 sends traces to a collector on this machine unless it is told that there is none.
        environ={"OTEL_TRACES_EXPORTER": "none"},
        addresses=(address,),
        ready=Probe(port=port, path="/v2/", host=address) if passwords is None else lambda: answers(address, port),
    )


def main_registry(*, binary: str, port: int, state: State) -> Component:
    """The one on loopback, which can be pushed to."""
    login = (state.path / Path(CLUSTER_LOGIN).parent, addresses_of(port))
    return registry_component(binary=binary, port=port, state=state, login=login)


def login_file(state: State) -> Path:
    """The login of the cluster's registry, as docker writes one."""
    return state.path / CLUSTER_LOGIN


def addresses_of(port: int) -> tuple[str, ...]:
    """Every name by which an image of a registry on loopback may be referred to."""
    return f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"


def write_login(folder: Path, names: Iterable[str]) -> Path:
    """A random login, made once, as docker's ``config.json`` for the registry's ``names``; the registry's own file of
    passwords. Raises StateError, HarnessError (no bcrypt here)."""
    from wasilet.controlplane.htpasswd import RANDOM_COST, entry

    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    passwords, remembered, config = folder / "passwords", folder / "login.json", folder / "config.json"
    password = str(read_json(remembered).get("password") or "")
    if not password or not passwords.is_file():
        password = secrets.token_urlsafe(24)
        write_file(passwords, entry(_USER, password, cost=RANDOM_COST).encode() + b"\n")
        # Last: a run that dies in between makes both again.
        write_json(remembered, {"password": password})
    auth = base64.b64encode(f"{_USER}:{password}".encode()).decode()
    text = json.dumps({"auths": {name: {"auth": auth} for name in names}}).encode()
    if not config.is_file() or config.read_bytes() != text:
        write_file(config, text)
    return passwords


def answers(address: str, port: int) -> bool:
    """Whether a registry answers, be it with 401 for want of a login."""
    connection = http.client.HTTPConnection(address, port, timeout=PROBE_TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status in {200, 401}
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _write_config(address: str, *, state: State, name: str, passwords: Path | None, readonly: bool) -> Path:
    path = state.etc / f"{name}.yml"
    root = state.path / "registry"
    with_secret = state.cluster.registry_secret
    if not with_secret:
        with_secret = secrets.token_hex(16)
        state.update(registry_secret=with_secret)
    text = _CONFIG.format(
        root=json.dumps(str(root)), address=address, secret=with_secret, readonly=str(readonly).lower()
    )
    if passwords is not None:
        text += _AUTH.format(passwords=json.dumps(str(passwords)))
    try:
        current = path.read_text()
    except FileNotFoundError:
        current = ""
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if current != text:
        write_file(path, text.encode())
    return path
