"""Whether a Service answers as a demo promises, and goes on doing so while its pods are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from wasilet.apps.samples import Exchange, Expectation
from wasilet.demo.expect import ExpectationError, Seen
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.process import check_cancelled
from wasilet.testing.http import Ask, Asked, WantedAnswer, ask_until
from wasilet.testing.http_assertion import sender
from wasilet.testing.load import Load
from wasilet.testing.pod_status import describe, events_of
from wasilet.testing.service import Service

Say = Callable[[str], None]

SETTLE_SECONDS = 1.0
"""So long requests are sent before the first pod is replaced and after the last one was."""

_TURN_SECONDS = 2.0
"""An answer is waited for in turns of this length, to say what is lacking and to see a Ctrl-C of the play."""

_POLL_SECONDS = 0.1
_SHOWN_PODS = 3
_SHOWN_EVENTS = 10


def exchange(wanted: Exchange, send: Ask, *, within_seconds: float) -> Asked:
    """Send until the answer is as wanted, or the time is over."""
    return ask_until(send, _answer(wanted), within_seconds=within_seconds)


def wait_for_answers(
    kube: Kube, expectation: Expectation, *, namespace: str, say: Say = lambda _: None, keeper: Path | None = None
) -> Seen:
    """Ask the Service, and replace the pods of ``rolling_update`` meanwhile. ``keeper``: see ``Service``. Raises
    ExpectationError, and ApiError when the Service or the Deployment is not there."""
    began = time.monotonic()
    body = kube.get(api_path("services", expectation.service, namespace=namespace))
    service = Service(kube, body, within_seconds=expectation.within_seconds, keeper=keeper)
    lines: list[str] = []
    for wanted in expectation.http:
        lines += _answered(service, wanted, began + expectation.within_seconds, kube, say)
    if expectation.rolling_update:
        lines = _update(service, expectation, kube, say)
    return Seen(lines=lines, pod="", seconds=time.monotonic() - began)


def _answer(wanted: Exchange) -> WantedAnswer:
    return WantedAnswer(status=wanted.status, headers=wanted.headers, contains=wanted.contains, absent=wanted.absent)


def _send(service: Service, wanted: Exchange) -> Ask:
    return sender(service, wanted.path, method=wanted.method, body=wanted.body or None)


def _answered(service: Service, wanted: Exchange, deadline: float, kube: Kube, say: Say) -> list[str]:
    while True:
        check_cancelled()
        left = deadline - time.monotonic()
        asked = exchange(wanted, _send(service, wanted), within_seconds=max(0.0, min(_TURN_SECONDS, left)))
        if asked.answer is not None and not asked.lacks:
            said = f"{wanted}: {asked.answer.status}"
            say(said)
            return [said, *asked.answer.text.splitlines()]
        if left <= _TURN_SECONDS:
            raise _failure(service, f"{wanted}: {'; '.join(asked.lacks)}", ["last answer:", *asked.describe()], kube)
        say(f"{wanted}: {'; '.join(asked.lacks)}")


def _update(service: Service, expectation: Expectation, kube: Kube, say: Say) -> list[str]:
    wanted = expectation.http[0]
    load = Load(
        _send(service, wanted),
        per_second=expectation.requests_per_second,
        max_seconds=expectation.within_seconds + 2 * SETTLE_SECONDS,
        wanted=_answer(wanted),
    )
    with load:
        time.sleep(SETTLE_SECONDS)
        missing = _replace_pods(service, expectation, kube, say)
        time.sleep(SETTLE_SECONDS)
    shown = str(load.result).splitlines()
    if missing:
        reason = f"the update did not end within {expectation.within_seconds:g} s: {missing}"
        raise _failure(service, reason, shown, kube)
    if load.result.failed or not load.result.sent:
        raise _failure(service, f"the update lost requests ({wanted})", shown, kube)
    sent, slowest = load.result.sent, load.result.percentile(99) * 1000
    return [f"{sent} requests while its pods were replaced, 0 failed, 99 % within {slowest:.0f} ms"]


def _replace_pods(service: Service, expectation: Expectation, kube: Kube, say: Say) -> str:
    """What is still to be done when the time is over; empty: all pods are new ones."""
    path = api_path("deployments", expectation.rolling_update, group="apps", namespace=service.namespace)
    # As `kubectl rollout restart` does it.
    annotations = {"kubectl.kubernetes.io/restartedAt": datetime.now(UTC).isoformat(timespec="seconds")}
    change = {"spec": {"template": {"metadata": {"annotations": annotations}}}}
    generation = int(kube.patch(path, change)["metadata"]["generation"])
    deadline = time.monotonic() + expectation.within_seconds
    while missing := not_updated(kube.get(path), generation) or _leaving(service, kube):
        check_cancelled()
        if time.monotonic() > deadline:
            return missing
        say(missing)
        time.sleep(_POLL_SECONDS)
    return ""


def _leaving(service: Service, kube: Kube) -> str:
    """Pods that have not ended yet: until they have, requests may still be lost with them."""
    leaving = [pod["metadata"]["name"] for pod in _pods(service, kube) if "deletionTimestamp" in pod["metadata"]]
    return f"pod/{leaving[0]} has not ended yet" if leaving else ""


def not_updated(deployment: KubeObject, generation: int) -> str:
    """What a Deployment's status reports as still to be done; empty: all its pods are new and available."""
    status = deployment.get("status") or {}
    wanted = int(deployment["spec"].get("replicas", 1))
    if int(status.get("observedGeneration") or 0) < generation:
        return "the update was not seen yet"
    updated, available = int(status.get("updatedReplicas") or 0), int(status.get("availableReplicas") or 0)
    old = int(status.get("replicas") or 0) - updated
    if updated < wanted or available < wanted or old:
        return f"{updated} of {wanted} pods are new, {available} available, {old} old ones are left"
    return ""


def _pods(service: Service, kube: Kube) -> list[KubeObject]:
    selector = ",".join(f"{key}={value}" for key, value in sorted(service.selector.items()))
    found: list[KubeObject] = (
        kube.get(api_path("pods", namespace=service.namespace), labelSelector=selector).get("items") or []
    )
    return found


def _failure(service: Service, reason: str, shown: list[str], kube: Kube) -> ExpectationError:
    said = [f"service/{service.name}: {reason}", *(f"  {line}" for line in shown)]
    pods = _pods(service, kube)
    if not pods:
        said.append("  no pod has the labels that it selects")
    for pod in pods[:_SHOWN_PODS]:
        said += describe(pod["metadata"]["name"], pod)
        events = events_of(kube, service.namespace, pod["metadata"]["uid"])
        said += [f"  event  {text}" for text in events[-_SHOWN_EVENTS:]]
    return ExpectationError("\n".join(said))
