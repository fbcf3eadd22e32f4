"""Hundreds of hostile images, modules and manifests: each pod alone gets the error, in words; all else goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
import wasmtime
from wasilet.errors import ApiError
from wasilet.kube.client import KubeObject, api_path

from tests.e2e.conftest import Roomy
from tests.e2e.guests import Guests, build_toolbox, wasm_artifact
from tests.e2e.hostile import LyingRegistry, modules, odd_annotations, pod_spec
from tests.e2e.stage import is_ready, phase
from tests.e2e.test_cases import agent_pid, unexpected_lines
from tests.unit.node.runtime.guests import HELLO

pytestmark = pytest.mark.e2e

SEED = int(os.environ.get("WASILET_FUZZ_SEED", "20"))
COUNT = int(os.environ.get("WASILET_FUZZ_COUNT", "120"))
AT_ONCE = 30
JUDGED_SECONDS = 150.0
_UNDECIDED = {"", "ContainerCreating", "PodInitializing"}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A namespace with a pod that must go on ticking."""

    roomy: Roomy
    namespace: str

    def create(self, name: str, spec: KubeObject, notes: dict[str, str] | None = None) -> bool:
        """Whether the API server took it."""
        metadata = {"name": name, "annotations": notes or {}}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        try:
            # A lone surrogate and the like is not even JSON for Go.
            json.dumps(pod).encode()
            self.roomy.stage.create(self.roomy.kube, self.namespace, pod)
        except ApiError as error:
            if error.code in {400, 422, 403}:
                return False
            raise
        return True

    def judge(self, names: Iterable[str]) -> None:
        """Wait until each pod has an outcome, that is an end, a reason to wait, or an event that says why not."""
        left = set(names)

        def undecided() -> list[str]:
            for name in list(left):
                if self._decided(name):
                    left.discard(name)
            return [f"nothing was said of {', '.join(sorted(left)[:5])} ({len(left)} in all)"] if left else []

        self.roomy.stage.wait(undecided, within=JUDGED_SECONDS)

    def _decided(self, name: str) -> bool:
        pod = self.roomy.stage.pod(self.namespace, name)
        if pod is None:
            return False
        if phase(pod) in {"Succeeded", "Failed"} or is_ready(pod):
            return True
        for status in (pod.get("status") or {}).get("containerStatuses") or ():
            waiting = status["state"].get("waiting")
            if waiting is None or waiting.get("reason") not in _UNDECIDED:
                return True
        events = self.roomy.stage.events(self.namespace, name)
        return any(e["type"] == "Warning" and e["reason"] in {"FailedMount", "FailedScheduling"} for e in events)

    def remove(self, names: Iterable[str]) -> None:
        """Delete, and wait until they are gone, whatever state they were in."""
        left = list(names)
        for name in left:
            with contextlib.suppress(ApiError):
                path = api_path("pods", name, namespace=self.namespace)
                self.roomy.kube.request("DELETE", path, body={"kind": "DeleteOptions", "gracePeriodSeconds": 1})

        def there() -> list[str]:
            stay = [name for name in left if self.roomy.stage.pod(self.namespace, name) is not None]
            return [f"{len(stay)} pods are still there, as {stay[0]}"] if stay else []

        self.roomy.stage.wait(there, within=JUDGED_SECONDS)

    def in_batches(self, pods: Iterable[tuple[str, KubeObject, dict[str, str] | None]]) -> None:
        """Create, judge and remove, some at a time."""
        batch: list[str] = []
        for name, spec, notes in pods:
            if self.create(name, spec, notes):
                batch.append(name)
            if len(batch) >= AT_ONCE:
                self.judge(batch)
                self.remove(batch)
                batch = []
        self.judge(batch)
        self.remove(batch)


@pytest.fixture
def scene(roomy: Roomy) -> Iterator[Scene]:
    pid = agent_pid(roomy.cluster)
    seen = len(unexpected_lines(roomy.cluster))
    with roomy.stage.namespace("fuzz", pod_security="privileged") as namespace:
        scene = Scene(roomy=roomy, namespace=namespace)
        container = {"name": "main", "image": roomy.image, "args": ["tick 0.2"]}
        assert scene.create("canary", {"containers": [container], "terminationGracePeriodSeconds": 1})
        scene.judge(["canary"])
        yield scene
        assert agent_pid(roomy.cluster) == pid
        surprised = unexpected_lines(roomy.cluster)[seen:]
        assert not surprised, f"{len(surprised)} times, first:\n{surprised[0]}"
        canary = roomy.stage.pod(namespace, "canary")
        assert canary is not None
        assert canary["status"]["containerStatuses"][0]["restartCount"] == 0
        path = api_path("pods", "canary", namespace=namespace, sub="log")
        before = roomy.kube.body(path, tailLines="1")
        time.sleep(1)
        assert roomy.kube.body(path, tailLines="1") != before


def test_damaged_modules_harm_their_own_pods_alone(scene: Scene) -> None:
    rng = random.Random(SEED)
    guests = Guests(str(scene.roomy.cluster.status()["registry"]), scene.roomy.cluster.settings.environ)

    def pods() -> Iterator[tuple[str, KubeObject, None]]:
        for number, module in enumerate(modules(rng, build_toolbox(), COUNT)):
            image = guests.add(f"damaged-{number}", wasm_artifact(module))
            container = {"name": "main", "image": image, "resources": {"limits": {"memory": "64Mi"}}}
            spec = {"restartPolicy": "Never", "activeDeadlineSeconds": 20, "containers": [container]}
            yield f"damaged-{number}", spec, None

    scene.in_batches(pods())


def test_a_registry_that_lies_harms_its_own_pods_alone(scene: Scene) -> None:
    registry = LyingRegistry(bytes(wasmtime.wat2wasm(HELLO)))

    def pods() -> Iterator[tuple[str, KubeObject, None]]:
        for number in range(COUNT):
            container = {"name": "main", "image": f"{registry.address}/n{number}:v1"}
            yield f"lied-to-{number}", {"restartPolicy": "Never", "containers": [container]}, None

    try:
        scene.in_batches(pods())
    finally:
        registry.close()


def test_hostile_manifests_harm_their_own_pods_alone(scene: Scene) -> None:
    rng = random.Random(SEED)
    scene.in_batches(
        (f"odd-{number}", pod_spec(rng, scene.roomy.image), odd_annotations(rng)) for number in range(2 * COUNT)
    )
