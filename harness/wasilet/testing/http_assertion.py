"""``assert_http``: a URL, a pod or a Service is asked until its answer is as it must be, and what a failure shows."""

from __future__ import annotations

from collections.abc import Mapping

from wasilet.errors import UsageError
from wasilet.testing.http import Answer, Ask, WantedAnswer, ask, ask_until
from wasilet.testing.log_match import printable
from wasilet.testing.observe import PodView
from wasilet.testing.pod_status import describe
from wasilet.testing.service import Service
from wasilet.testing.test_namespace import Pod, TestNamespace

SHOWN_LOG_LINES = 20
SHOWN_PODS = 3
LOG_SECONDS = 1.0


def sender(
    target: str | Pod | Service,
    path: str,
    *,
    port: int = 0,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: bytes | str | None = None,
) -> Ask:
    """Sends a request to a URL, a pod or a Service. Raises UsageError for what does not say where to."""
    data = body.encode() if isinstance(body, str) else body
    if isinstance(target, Service):
        return lambda seconds: target.send(method, path, port=port, headers=headers, body=data, timeout_seconds=seconds)
    if isinstance(target, Pod):
        if not port:
            raise UsageError(f"pod/{target.name} is asked without a port", hint="give port=8080")
        url = target.url(port, path)
    else:
        if port:
            raise UsageError(f"{target!r} has its port in the URL, and port={port} beside it")
        url = target if path == "/" else target.rstrip("/") + path
    return lambda seconds: ask(url, method=method, send_headers=headers, body=data, timeout_seconds=seconds)


def assert_answer(
    test_namespace: TestNamespace,
    target: str | Pod | Service,
    send: Ask,
    wanted: WantedAnswer,
    *,
    within_seconds: float | None = None,
) -> Answer:
    """Ask until the answer is as wanted. Raises AssertionError with all that helps to see why it is not."""
    __tracebackhide__ = True
    limit = test_namespace.within_seconds if within_seconds is None else within_seconds
    asked = ask_until(send, wanted, within_seconds=limit)
    if asked.answer is not None and not asked.lacks:
        return asked.answer
    name = target if isinstance(target, str) else repr(target)
    said = [f"{name}: {'; '.join(asked.lacks)} ({asked.times} requests in {asked.seconds:.1f} s)"]
    said += ["", "last answer:", *asked.describe()]
    for view in _views_behind(test_namespace, target):
        said += ["", f"pod/{view.name}:", *map(printable, describe(view.name, view.object))]
        said += [f"  event  {printable(line)}" for line in test_namespace.events_of(view)]
        logs = [log for log in view.logs.values() if log.count]
        said += [f"  | {printable(line.text)}" for log in logs for line in log.tail(SHOWN_LOG_LINES)]
    raise AssertionError("\n".join(said))


def _views_behind(test_namespace: TestNamespace, target: str | Pod | Service) -> list[PodView]:
    """The pods that answer there, with their logs as far as they come at once."""
    if isinstance(target, Pod):
        views = [view for view in test_namespace.observer.pods.values() if view.uid == target.uid]
    elif isinstance(target, Service) and target.selector:
        wanted = target.selector.items()
        views = [
            view for view in list(test_namespace.observer.pods.values())
            if not view.deleted and wanted <= (view.object["metadata"].get("labels") or {}).items()
        ]  # fmt: skip
    else:
        views = []
    views = views[:SHOWN_PODS]
    for view in views:
        test_namespace.observer.follow(view)
    test_namespace.observer.wait(
        lambda: all(log.count or log.ended for view in views for log in view.logs.values()) or None,
        within_seconds=LOG_SECONDS,
    )
    return views
