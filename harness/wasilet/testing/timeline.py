"""What the pods of a test run did, for ``--wasilet-report``: each test writes a file, the end of the run one page."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from wasilet.errors import ApiError
from wasilet.kube.client import api_path
from wasilet.testing.report_page import Chapter, chapter_of, page
from wasilet.testing.test_namespace import TestNamespace


def save(test_namespace: TestNamespace, test: str, folder: Path, *, failed: bool) -> None:
    """Write down a test's pods, with their logs as far as they can be read, before its namespace goes."""
    observer = test_namespace.observer
    with observer.changed:
        views = list(observer.pods.values())
        for view in views:
            observer.follow(view)
    observer.wait(lambda: all(v.logs and all(log.count or log.ended for log in v.logs.values()) for v in views) or None,
                  within_seconds=0.5)  # fmt: skip
    try:
        events = (
            test_namespace.cluster.kube.get(api_path("events", namespace=test_namespace.namespace)).get("items") or []
        )
    except ApiError:
        events = []
    chapter = chapter_of(test, observer, events, outcome="failed" if failed else "passed")
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".json", delete=False) as file:
        json.dump(chapter.to_json(), file)


def write_report(folder: Path, target: Path) -> str:
    """The page of all the tests that wrote something; a text about it."""
    chapters = []
    for file in sorted(folder.glob("*.json")):
        try:
            chapters.append(Chapter.from_json(json.loads(file.read_text())))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of a worker that was killed while it wrote
    chapters.sort(key=lambda chapter: chapter.began)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page("test run", chapters))
    except OSError as error:
        return f"error: the report cannot be written: {error}"
    return f"report: {target}"
