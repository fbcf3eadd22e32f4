"""What a demo needs beside a cluster, started on this machine when it is asked for and ended by ``invoke down``.

``cat-facts``: the public API where it can be reached, else Wasilet's own on loopback. The private registry: a second
registry with a login, for the tutorials that push to one; the password is random and never leaves private files.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from wasilet.controlplane.components import Component, cat_facts_origin, ensure_running, wait_ready
from wasilet.controlplane.health import LOOPBACK, Probe
from wasilet.errors import UsageError
from wasilet.kube.client import KubeObject
from wasilet.providers.base import Cluster
from wasilet.settings import environment_flag
from wasilet.storage import write_file

CAT_FACTS_URL = "https://catfact.ninja/fact"
OFFLINE = "WASILET_OFFLINE"
"""Environment name: set it to anything, and demos use nothing outside this machine."""

_REACH_TIMEOUT_SECONDS = 2.0

Say = Callable[[str], None]


def start(name: str, cluster: Cluster, *, say: Say, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Have a service running; the template variables that it brings. Raises UsageError for an unknown name, and
    HarnessError when it does not start."""
    known = {"cat-facts": _cat_facts}
    if name not in known:
        raise UsageError(f"demo.yaml names an unknown service {name!r}", hint=f"known are {', '.join(known)}")
    return known[name](cluster, say, environ)


def _cat_facts(cluster: Cluster, say: Say, environ: Mapping[str, str]) -> dict[str, Any]:
    local = environment_flag(environ, OFFLINE) or not _answers(CAT_FACTS_URL)
    url = _local_cat_facts(cluster, say) if local else environ.get("CAT_FACTS_URL") or CAT_FACTS_URL
    parts = urlsplit(url)
    return {
        "cat_facts_url": url,
        "cat_facts_origin": f"{parts.scheme}://{parts.netloc}",
        "cat_facts_is_local": url != CAT_FACTS_URL,
    }


def _answers(url: str) -> bool:
    import urllib.request

    request = urllib.request.Request(url, headers={"Accept": "application/json", "User-Agent": "wasilet"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_REACH_TIMEOUT_SECONDS) as response:  # noqa: S310  (a constant)
            return isinstance(json.loads(response.read(65536)).get("fact"), str)
    except (OSError, ValueError, AttributeError):
        return False


def _local_cat_facts(cluster: Cluster, say: Say) -> str:
    port = cluster.state.allocate_ports({"cat_facts": 0})["cat_facts"]
    component = Component(
        name="cat-facts",
        argv=(sys.executable, "-P", "-m", "wasilet.demo.catfacts", "--port", str(port)),
        ports={"HTTP": port},
        ready=Probe(port=port, path="/healthz"),
    )
    _run(component, cluster, say)
    return f"{cat_facts_origin(port)}/fact"


def pull_secret_name(app: str) -> str:
    """The name of an app's pull secret: its own, so that removing one demo leaves the others their login."""
    return f"{app}-pull"


def private_registry(cluster: Cluster, app: str, *, say: Say) -> tuple[str, Mapping[str, str], KubeObject]:
    """A registry with a login: ``host:port``, an environment for pushing (``DOCKER_CONFIG``), and the pull secret.

    Raises HarnessError when there is no registry binary or it does not start.
    """
    from wasilet.controlplane.acquire import acquire
    from wasilet.controlplane.local_registry import answers, write_login

    state, settings = cluster.state, cluster.settings
    port = state.allocate_ports({"private_registry": 0})["private_registry"]
    folder = state.etc / "private-registry"
    address = f"localhost:{port}"
    passwords = write_login(folder, (address,))
    config = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(state.path / "private-registry")}},
        "http": {"addr": f"{LOOPBACK}:{port}"},
        "auth": {"htpasswd": {"realm": "wasilet", "path": str(passwords)}},
    }
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    file = folder / "config.yml"
    if not file.is_file() or file.read_bytes() != text:
        write_file(file, text)
    binary = acquire(
        ["registry"],
        cache=settings.cache,
        environ=settings.environ,
        progress=say,
        mirror=settings.mirror,
        allow_download=settings.download,
    )["registry"].path
    component = Component(
        name="private-registry",
        argv=(str(binary), "serve", str(file)),
        ports={"HTTP": port},
        inputs=(file, passwords),
        # Without a login it answers 401: that it answers at all is what is asked.
        ready=lambda: answers(LOOPBACK, port),
    )
    _run(component, cluster, say)
    docker_config = (folder / "config.json").read_text()
    secret: KubeObject = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": pull_secret_name(app)},
        "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": base64.b64encode(docker_config.encode()).decode()},
    }
    return address, {**settings.environ, "DOCKER_CONFIG": str(folder)}, secret


def _run(component: Component, cluster: Cluster, say: Say) -> None:
    record = ensure_running(component, state=cluster.state, settings=cluster.settings)
    wait_ready(
        component,
        record,
        timeout_seconds=cluster.settings.timeouts.ready_seconds,
        settings=cluster.settings,
        say=say,
    )
