"""The demos, for real: from source to an asserted log line on a cluster with a wasm node."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wasilet.apps.new_app import new_app
from wasilet.apps.samples import sample_names
from wasilet.console import PlainReporter
from wasilet.demo import demo as apps
from wasilet.kube.client import api_path
from wasilet.settings import Settings
from wasilet.testing.served import served

from tests.clusters import TestCluster
from tests.e2e.guests import needs_a_component_host, needs_node, needs_rust_for_bindings

pytestmark = pytest.mark.e2e


@pytest.fixture
def settings(cluster: TestCluster) -> Settings:
    """The cluster's, without the internet: a fact more or less must not decide a test."""
    return replace(cluster.settings, environ={**cluster.settings.environ, "WASILET_OFFLINE": "1"})


@pytest.fixture
def namespace(cluster: TestCluster, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"demo-{abs(hash(request.node.name)):x}-{time.monotonic_ns() % 100000}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    cluster.kube.create(api_path("namespaces"), body)
    deadline = time.monotonic() + 20
    while cluster.kube.find(api_path("serviceaccounts", "default", namespace=name)) is None:
        assert time.monotonic() < deadline, "the namespace got no ServiceAccount"
        time.sleep(0.02)
    yield name
    cluster.kube.delete(api_path("namespaces", name))


def demo(name: str, settings: Settings, **options: Any) -> apps.DemoResult:
    log = io.StringIO()
    result = apps.demo(name, settings, options=apps.DemoOptions(**options), reporter=PlainReporter(log))
    assert result.recap.succeeded, log.getvalue()
    return result


def needs_what_it_is_built_with(name: str) -> None:
    if name.startswith("http-"):
        needs_a_component_host()
    if name in {"http-rust", "tcp-echo"}:
        needs_rust_for_bindings()
    if name in {"hello-ts", "http-js"}:
        needs_node()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.smoke if name == "hello-world" else ()) for name in sample_names()]
)
def test_the_sample_does_what_its_demo_promises(
    settings: Settings, namespace: str, name: str, cluster: TestCluster
) -> None:
    needs_what_it_is_built_with(name)
    result = demo(name, settings, namespace=namespace)
    assert any(result.logs.values())
    if name.startswith("http-"):
        answered = {pod: found for (where, pod), found in served(cluster.kube).items() if where == namespace}
        assert answered
        assert all(found.requests and found.seconds > 0 and not found.failed for found in answered.values()), answered
    removed = apps.remove(name, settings, options=apps.DemoOptions(namespace=namespace))
    assert removed
    assert apps.remove(name, settings, options=apps.DemoOptions(namespace=namespace)) == []


def test_a_second_demo_replaces_the_pod_and_makes_nothing_again(
    settings: Settings, namespace: str, cluster: TestCluster
) -> None:
    demo("hello-world", settings, namespace=namespace)
    path = api_path("pods", "wasi-hello-world", namespace=namespace)
    first = cluster.kube.get(path)["metadata"]["uid"]
    result = demo("hello-world", settings, namespace=namespace)
    assert cluster.kube.get(path)["metadata"]["uid"] != first
    statuses = {outcome.name: outcome.status.value for outcome in result.recap.outcomes}
    assert statuses["build"] == statuses["local run"] == statuses["push"] == "ok"


def test_a_registry_with_a_login_is_pulled_from_by_a_pull_secret(
    settings: Settings, namespace: str, cluster: TestCluster
) -> None:
    demo("hello-world", settings, namespace=namespace, private=True)
    pod = cluster.kube.get(api_path("pods", "wasi-hello-world", namespace=namespace))
    image = pod["spec"]["containers"][0]["image"]
    assert not image.startswith(f"localhost:{cluster.cluster.ports()['registry']}/")
    removed = apps.remove("hello-world", settings, options=apps.DemoOptions(namespace=namespace))
    assert sorted(removed) == ["pod/wasi-hello-world", "secret/hello-world-pull"]


@pytest.mark.parametrize("layout", ["krustlet", "runwasi", "image"])
def test_every_layout_that_is_pushed_is_run(settings: Settings, namespace: str, layout: str) -> None:
    demo("hello-wasm", settings, namespace=namespace, layout=layout)


def test_what_is_promised_and_not_kept_is_shown(settings: Settings, namespace: str, tmp_path: Path) -> None:
    new_app("liar", str(tmp_path))
    file = tmp_path / "liar" / "demo.yaml"
    file.write_text(file.read_text().replace("Hello, Kubernetes", "Good bye, Kubernetes"))
    log = io.StringIO()
    options = apps.DemoOptions(namespace=namespace)
    result = apps.demo(str(tmp_path / "liar"), settings, options=options, reporter=PlainReporter(log))
    assert not result.recap.succeeded
    assert "without a line with 'Good bye, Kubernetes, from liar!'" in log.getvalue()
    assert "| Hello, Kubernetes, from liar!" in log.getvalue()


def test_a_new_app_runs_as_it_is_made(settings: Settings, namespace: str, tmp_path: Path) -> None:
    new_app("my-own", str(tmp_path))
    result = demo(str(tmp_path / "my-own"), settings, namespace=namespace)
    assert result.logs["pod/my-own"] == ("Hello, Kubernetes, from my-own!",)
