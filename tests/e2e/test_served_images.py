"""Images that others' tools push and that answer HTTP: they are served, not only pulled.

As `spin registry push` lays out an application of one HTTP component, and as `wkg oci push` lays out a component. The
component is the same, so what differs is what the image says of it: Spin's gives it an environment.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wasilet.kube.client import KubeObject
from wasilet.oci.artifact import Artifact, Blob
from wasilet.testing.http import Answer, NoAnswerError, ask
from wasilet_common.oci import mediatypes

from tests.clusters import TestCluster
from tests.e2e.guests import Guests, artifact, needs_a_component_host
from tests.e2e.stage import Stage

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="a pod network needs root and nft"),
]

COMPONENT = Path(__file__).resolve().parents[1] / "guests" / "http_p2.wasm"
SECONDS = 60.0
ASK_SECONDS = 5.0
PORT = 8080
"""Where a server listens whose container names no port, as none does that was made for Spin."""


def as_spin_pushes(component: bytes) -> Artifact:
    """The locked application is the config; the component is a layer that it names by digest."""
    layer = Blob(media_type=mediatypes.CNCF_WASM_LAYER, data=component)
    application = {
        "spin_lock_version": 1,
        "metadata": {"name": "hello", "description": "", "version": "0.1.0", "authors": ["A <a@example.com>"]},
        "triggers": [
            {"id": "trigger--hello", "trigger_type": "http", "trigger_config": {"component": "hello", "route": "/..."}}
        ],
        "components": [
            {
                "id": "hello",
                "metadata": {"allowed_outbound_hosts": []},
                "source": {"content_type": "application/wasm", "digest": layer.digest},
                "env": {"GREETING": "from the application"},
            }
        ],
    }
    return artifact(layer, Blob(media_type=mediatypes.SPIN_CONFIG, data=json.dumps(application).encode()))


def as_wkg_pushes(component: bytes) -> Artifact:
    """The CNCF layout, its config with what the component imports and exports."""
    layer = Blob(media_type=mediatypes.CNCF_WASM_LAYER, data=component)
    config = {
        "created": "2026-01-01T00:00:00Z",
        "author": None,
        "architecture": "wasm",
        "os": "wasip2",
        "layerDigests": [layer.digest],
        "component": {
            "exports": ["wasi:http/incoming-handler@0.2.0"],
            "imports": ["wasi:http/types@0.2.0", "wasi:io/streams@0.2.0"],
            "target": None,
        },
    }
    return artifact(layer, Blob(media_type=mediatypes.CNCF_WASM_CONFIG, data=json.dumps(config).encode()))


@pytest.fixture
def stage(cluster: TestCluster) -> Iterator[Stage]:
    needs_a_component_host()
    found = Stage(cluster.cluster.admin_credentials())
    yield found
    found.close()


@pytest.mark.parametrize(
    ("name", "make", "greeting"),
    [("spin", as_spin_pushes, "from the application"), ("wkg", as_wkg_pushes, "")],
)
def test_an_image_of_another_tool_serves(
    cluster: TestCluster, stage: Stage, name: str, make: Any, greeting: str
) -> None:
    guests = Guests(str(cluster.status()["registry"]), cluster.settings.environ)
    image = guests.add(f"served-by-{name}", make(COMPONENT.read_bytes()))
    with stage.namespace("served") as namespace:
        pod: KubeObject = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name},
            "spec": {"terminationGracePeriodSeconds": 0, "containers": [{"name": "main", "image": image}]},
        }
        with stage.kube() as kube:
            stage.create(kube, namespace, pod)
        assert answer_of(stage, namespace, name, "/hello").text == "hello\n"
        assert answer_of(stage, namespace, name, "/env?GREETING").text == greeting


def answer_of(stage: Stage, namespace: str, name: str, path: str) -> Answer:
    """The first that comes. Raises AssertionError with what came instead."""
    found: list[Answer] = []

    def missing() -> list[str]:
        status = (stage.pod(namespace, name) or {}).get("status") or {}
        if not status.get("podIP"):
            return [f"the pod is {status}"]
        try:
            found.append(ask(f"http://{status['podIP']}:{PORT}{path}", timeout_seconds=ASK_SECONDS))
        except NoAnswerError as error:
            return [f"{error}; the pod is {status}"]
        return []

    stage.wait(missing, within=SECONDS, poll=0.2)
    return found[-1]
