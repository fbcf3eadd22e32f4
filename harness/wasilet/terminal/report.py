"""``invoke report``: runs a demo, or looks at a namespace, and writes the page of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from wasilet.cluster.down import unknown_cluster
from wasilet.cluster.opening import open_cluster
from wasilet.demo.demo import DemoOptions, demo, running_cluster
from wasilet.errors import ApiError
from wasilet.kube.client import api_path
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Recap, Reporter
from wasilet.storage import storage_errors
from wasilet.testing.observe import Observer
from wasilet.testing.report_page import chapter_of, page
from wasilet.testing.served import served

LIST_SECONDS = 10.0
LOG_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Written:
    """The page on disk."""

    file: Path
    recap: Recap | None
    """Of the demo, when one was run."""


def write_report(settings: Settings, *, app: str, namespace: str, file: Path, reporter: Reporter) -> Written:
    """Run the demo of ``app`` and report it; without ``app`` report what is in the namespace now.

    Raises UsageError when there is no such cluster or app, StateError when the file cannot be written."""
    if not app and not State.of(settings).exists():
        raise unknown_cluster(settings)
    recap: Recap | None = None
    with running_cluster(settings, reporter=reporter) if app else open_cluster(settings) as cluster:
        kube = cluster.admin()
        names = None
        with Observer(kube, namespace, follow=True) as observer:
            # The first list is what was there before the demo.
            observer.wait(lambda: True if observer.listed or observer.error else None, within_seconds=LIST_SECONDS)
            if observer.error:
                raise ApiError(f"the pods cannot be listed: {observer.error}", hint="`invoke up` repairs a cluster")
            before = frozenset(observer.pods)
            if app:
                recap = demo(app, settings, options=DemoOptions(namespace=namespace), reporter=reporter).recap
                with observer.changed:
                    names = frozenset(view.name for uid, view in observer.pods.items() if uid not in before)
                    for uid in before:
                        observer.pods.pop(uid, None)
            observer.wait(lambda: _quiet(observer), within_seconds=LOG_SECONDS)
            events = kube.get(api_path("events", namespace=namespace)).get("items") or []
            try:
                answered = served(kube)
            except ApiError:
                answered = {}  # the page is about more than that
            chapter = chapter_of(
                f"demo {app}" if app else f"namespace {namespace}",
                observer,
                events,
                outcome="" if recap is None else "passed" if recap.succeeded else "failed",
                steps=[outcome.to_json() for outcome in recap.outcomes] if recap else (),
                names=names,
                answered=answered,
            )
    text = page(chapter.title, [chapter], cluster=settings.name)
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Written(file=file, recap=recap)


def _quiet(observer: Observer) -> bool | None:
    """Whether every log that there is has been read so far: each has a line, or is over."""
    logs = [log for view in observer.pods.values() for log in view.logs.values()]
    return True if all(log.count or log.ended for log in logs) else None
