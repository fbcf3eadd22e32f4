"""``kubectl run -i`` and ``attach -i``: what is typed reaches the module."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from wasilet.controlplane.acquire import locate
from wasilet.kube.client import api_path

from tests.e2e.conftest import Roomy
from tests.e2e.matching import mismatches

pytestmark = pytest.mark.e2e

SECONDS = 90.0


@pytest.fixture
def namespace(roomy: Roomy) -> Iterator[str]:
    with roomy.stage.namespace("stdin") as made:
        yield made


def kubectl(roomy: Roomy, namespace: str, *words: str, stdin: bytes = b"") -> tuple[str, str]:
    settings = roomy.cluster.settings
    found = locate("kubectl", cache=settings.cache, environ=settings.environ)
    assert found is not None
    argv = [str(found.path), "--kubeconfig", str(roomy.cluster.admin_kubeconfig), "-n", namespace, *words]
    done = subprocess.run(argv, input=stdin, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_run_i_gives_the_module_what_is_piped_into_kubectl(roomy: Roomy, namespace: str) -> None:
    account = api_path("serviceaccounts", "default", namespace=namespace)
    roomy.stage.wait(lambda: [] if roomy.kube.find(account) else ["no ServiceAccount"], within=SECONDS, poll=0.2)
    text = b"piped\n" * 40_000
    argv = ("run", "reader", f"--image={roomy.image}", "--restart=Never", "-i", "--quiet", "--", "input")
    kubectl(roomy, namespace, *argv, stdin=text)
    path = api_path("pods", "reader", namespace=namespace)
    roomy.stage.wait(
        lambda: mismatches({"status": {"phase": "Succeeded"}}, roomy.kube.find(path) or {}, "reader"), within=SECONDS
    )
    log = roomy.kube.body(api_path("pods", "reader", namespace=namespace, sub="log"))
    assert log == b"read %d bytes\n" % len(text)


def test_attach_i_feeds_a_container_that_asks_for_stdin(roomy: Roomy, namespace: str) -> None:
    container = {"name": "main", "image": roomy.image, "args": ["input"], "stdin": True, "stdinOnce": True}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "reader"},
        "spec": {"restartPolicy": "Never", "containers": [container]},
    }
    with roomy.stage.kube() as kube:
        roomy.stage.create(kube, namespace, pod)
    kubectl(roomy, namespace, "wait", "--for=condition=Ready", "pod/reader", f"--timeout={SECONDS:g}s")
    output, _ = kubectl(roomy, namespace, "attach", "-i", "reader", "--quiet", stdin=b"twelve bytes")
    assert "read 12 bytes" in output
