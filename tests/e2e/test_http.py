"""What a module may ask over HTTP, seen from the server: what the pod's annotations allow arrives, all else never does.

The guest is the sample ``cat-facts``, which goes through the host calls of wasi-experimental-http and logs what it got.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from wasilet.apps.samples import find_app
from wasilet.build.application import build
from wasilet.kube.client import KubeObject, api_path

from tests.clusters import TestCluster
from tests.e2e.guests import Guests
from tests.e2e.runner import read_log
from tests.e2e.stage import Stage

pytestmark = pytest.mark.e2e

ALLOWED = "alpha.wasi.krustlet.dev/allowed-domains"
CONCURRENT = "alpha.wasi.krustlet.dev/max-concurrent-requests"
SECONDS = 60.0
NOT_ALLOWED = "Wasi error 7"
TOO_MANY_SESSIONS = "Wasi error 13"
"""How the crate of the guest shows what the host answered."""


@dataclass
class Api:
    """A server on loopback, and the paths that it was asked for."""

    origin: str = ""
    elsewhere: str = ""
    """Where ``/redirect`` leads."""

    paths: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serving(port: int = 0) -> Iterator[Api]:
    """A server for the length of a ``with``."""
    api = Api()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            api.paths.append(self.path)
            moved = self.path == "/redirect"
            body = b"" if moved else json.dumps({"fact": "seen"}).encode()
            self.send_response(302 if moved else 200)
            if moved:
                self.send_header("Location", api.elsewhere)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    api.origin = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def api(cluster: TestCluster) -> Iterator[Api]:
    """At the origin that the node's operator allows."""
    with serving(int(cluster.settings.local_origins[0].rpartition(":")[2])) as found:
        yield found


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Pods of the guest, and what they logged."""

    stage: Stage
    image: str
    namespace: str

    def log_of(self, url: str, annotations: dict[str, str]) -> str:
        """Run a pod that asks ``url``; its log, once there is a line in it."""
        self._create(url, annotations)
        path = api_path("pods", "asking", namespace=self.namespace, sub="log")
        found = ""

        def missing() -> list[str]:
            nonlocal found
            status = (self.stage.pod(self.namespace, "asking") or {}).get("status") or {}
            if status.get("phase") != "Running":
                return [f"the pod is {status}"]
            found = read_log(self.stage, path, {}).decode()
            return [] if "\n" in found else ["its log is empty"]

        self.stage.wait(missing, within=SECONDS, poll=0.3)
        return found

    def refusal_of(self, url: str, annotations: dict[str, str]) -> str:
        """Run a pod that asks ``url``; why its container does not start."""
        self._create(url, annotations)
        message = ""

        def missing() -> list[str]:
            nonlocal message
            status = (self.stage.pod(self.namespace, "asking") or {}).get("status") or {}
            waiting = (status.get("containerStatuses") or [{}])[0].get("state", {}).get("waiting") or {}
            message = str(waiting.get("message", ""))
            return [] if waiting.get("reason") == "CreateContainerConfigError" else [f"the pod is {status}"]

        self.stage.wait(missing, within=SECONDS, poll=0.3)
        return message

    def _create(self, url: str, annotations: dict[str, str]) -> None:
        pod: KubeObject = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "asking", "annotations": annotations},
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "containers": [
                    {
                        "name": "main",
                        "image": self.image,
                        "env": [
                            {"name": "RUST_LOG", "value": "rust_wasm=info"},
                            {"name": "CAT_FACTS_URL", "value": url},
                        ],
                    }
                ],
                "tolerations": [{"operator": "Exists"}],
            },
        }
        with self.stage.kube() as kube:
            self.stage.create(kube, self.namespace, pod)


@pytest.fixture(scope="module")
def guest(cluster: TestCluster) -> str:
    guests = Guests(str(cluster.status()["registry"]), cluster.settings.environ)
    module = build(find_app("cat-facts"), say=lambda _: None, environ=os.environ).module.read_bytes()
    return guests.add_bytes("asking", module)


@pytest.fixture
def asking(cluster: TestCluster, guest: str) -> Iterator[Asking]:
    stage = Stage(cluster.cluster.admin_credentials())
    try:
        with stage.namespace("http") as namespace:
            yield Asking(stage=stage, image=guest, namespace=namespace)
    finally:
        stage.close()


def test_an_origin_that_the_annotation_names_is_reached(api: Api, asking: Asking) -> None:
    log = asking.log_of(f"{api.origin}/fact", {ALLOWED: json.dumps([api.origin]), CONCURRENT: "1"})
    assert "Cat Fact: seen" in log
    assert api.paths == ["/fact"]


@pytest.mark.parametrize("listed", [None, "[]", '["http://192.0.2.1:1"]'])
def test_any_other_is_not(api: Api, asking: Asking, listed: str | None) -> None:
    log = asking.log_of(f"{api.origin}/fact", {} if listed is None else {ALLOWED: listed})
    assert f"No cat fact from {api.origin}/fact: {NOT_ALLOWED}" in log
    assert api.paths == []


def test_an_origin_of_the_node_itself_that_its_operator_does_not_allow_fails_the_container(asking: Asking) -> None:
    """With PodSecurity or without: the annotation is the pod author's, the loopback is not."""
    with serving() as secret:
        message = asking.refusal_of(f"{secret.origin}/fact", {ALLOWED: json.dumps([secret.origin])})
        assert f"{secret.origin} is refused, since it is the node itself (loopback)" in message
        assert secret.paths == []


def test_a_redirect_leads_nowhere_else(api: Api, asking: Asking) -> None:
    with serving() as secret:
        api.elsewhere = f"{secret.origin}/fact"
        log = asking.log_of(f"{api.origin}/redirect", {ALLOWED: json.dumps([api.origin])})
        assert NOT_ALLOWED in log
        assert api.paths == ["/redirect"]
        assert secret.paths == []


def test_more_requests_at_a_time_than_the_annotation_says_are_refused(api: Api, asking: Asking) -> None:
    log = asking.log_of(f"{api.origin}/fact", {ALLOWED: json.dumps([api.origin]), CONCURRENT: "0"})
    assert TOO_MANY_SESSIONS in log
    assert api.paths == []
