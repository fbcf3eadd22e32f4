"""``invoke report``: a page of what pods did, from create to the first line of their logs, in one HTML file.

Nothing is loaded from anywhere, no script runs, and the page's own policy forbids both: names, events and logs are what
untrusted modules wrote. Everything passes through the template's escaping.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from wasilet.kube.client import KubeObject
from wasilet.testing.observe import Observer, PodView, event_time
from wasilet.testing.pod_status import event_order
from wasilet.testing.served import Key, Served

MAX_SHOWN_LINES = 500
MAX_SHOWN_EVENTS = 100
_STAGES = (
    ("created", "scheduled", "waiting for a node"),
    ("scheduled", "started", "pulling and starting"),
    ("started", "first line", "until its first line"),
    ("first line", "finished", "running"),
)
"""From a mark, to a mark, what happens in between: each is a bar."""

_AFTER = {
    "created": ("started", "first line", "finished", "deleted"),
    "scheduled": ("first line", "finished", "deleted"),
    "started": ("finished", "deleted"),
    "first line": ("deleted",),
}


@dataclass(frozen=True, kw_only=True)
class PodStory:
    """A pod, as the page shows it."""

    name: str
    namespace: str
    node: str
    phase: str
    image: str
    marks: dict[str, float]
    """Seconds since the epoch, by what happened: see wasilet.testing.observe.PodView, and ``first line``."""

    containers: list[dict[str, Any]]
    """``name, state, restarts``."""

    logs: list[dict[str, Any]]
    """``container, dropped, error, lines``: each line a time and a text."""

    served: str = ""
    """What it has answered over HTTP; empty: nothing."""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A test, or a demo."""

    title: str
    outcome: str
    """``passed``, ``failed`` or empty."""

    began: float
    ended: float
    pods: list[PodStory] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """``at, type, reason, about, message, count``."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Of a demo: ``name, status, detail, seconds``."""

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Chapter:
        """Raises KeyError and TypeError when it is none."""
        return cls(**{**data, "pods": [PodStory(**pod) for pod in data["pods"]]})


def chapter_of(
    title: str,
    observer: Observer,
    events: Iterable[KubeObject],
    *,
    outcome: str = "",
    steps: Sequence[dict[str, Any]] = (),
    names: frozenset[str] | None = None,
    answered: Mapping[Key, Served] | None = None,
) -> Chapter:
    """What an observer has seen. ``names``: only these pods, and their owners' events. ``answered``: of pods that
    serve HTTP."""
    answered = answered or {}
    with observer.changed:
        views = [v for v in observer.pods.values() if names is None or v.name in names]
        pods = [_story(view, answered.get((view.namespace, view.name))) for view in views]
    known = {view.uid for view in views}
    told = [
        _event(event)
        for event in sorted(events, key=event_order)
        if names is None or (event.get("involvedObject") or {}).get("uid") in known
    ]
    times = [at for pod in pods for at in pod.marks.values()] + [event["at"] for event in told if event["at"]]
    began = min((pod.marks["created"] for pod in pods), default=min(times, default=0.0))
    return Chapter(
        title=title,
        outcome=outcome,
        began=began,
        ended=max(times, default=began),
        pods=sorted(pods, key=lambda pod: pod.marks["created"]),
        events=told[-MAX_SHOWN_EVENTS:],
        steps=list(steps),
    )


def _story(view: PodView, answered: Served | None) -> PodStory:
    marks = dict(view.marks)
    first = view.first_line_at()
    if first is not None:
        marks["first line"] = first
    spec = view.object.get("spec") or {}
    images = [str(entry.get("image")) for entry in spec.get("containers") or []]
    return PodStory(
        name=view.name,
        namespace=view.namespace,
        node=str(spec.get("nodeName") or ""),
        phase="deleted" if view.deleted and view.phase == "Running" else view.phase or "Pending",
        image=", ".join(images),
        marks=marks,
        containers=[
            {"name": str(entry.get("name")), "state": _state(entry), "restarts": int(entry.get("restartCount") or 0)}
            for entry in view.containers()
        ],
        logs=[
            {
                "container": log.container,
                "dropped": max(0, log.count - MAX_SHOWN_LINES),
                "error": log.error,
                "lines": [[line.at, line.text] for line in log.tail(MAX_SHOWN_LINES)],
            }
            for log in view.logs.values()
        ],
        served=str(answered or ""),
    )


def _state(entry: KubeObject) -> str:
    for kind, detail in (entry.get("state") or {}).items():
        words = [str(detail[key]) for key in ("reason", "message") if (detail or {}).get(key)]
        code = f", exit code {detail['exitCode']}" if "exitCode" in (detail or {}) else ""
        return f"{kind}{code}" + (f": {', '.join(words)}" if words else "")
    return "unknown"


def _event(event: KubeObject) -> dict[str, Any]:
    about = event.get("involvedObject") or {}
    return {
        "at": event_time(event),
        "type": str(event.get("type") or ""),
        "reason": str(event.get("reason") or ""),
        "about": f"{str(about.get('kind') or '').lower()}/{about.get('name')}",
        "message": str(event.get("message") or ""),
        "count": int(event.get("count") or 1),
    }


# --- the page --------------------------------------------------------------------------------------------------------


def page(title: str, chapters: Sequence[Chapter], *, cluster: str = "") -> str:
    """The HTML of it all. Raises HarnessError when the installation lacks its template."""
    import jinja2

    from wasilet.kube.manifests import manifests_folder

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(manifests_folder()),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clock": _clock, "duration": duration, "visible": _visible}
    return environment.get_template("report.html.j2").render(
        title=title,
        cluster=cluster,
        made=dt.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        chapters=[{"chapter": chapter, "rows": _rows(chapter), "ticks": _ticks(chapter)} for chapter in chapters],
        passed=sum(chapter.outcome == "passed" for chapter in chapters),
        failed=sum(chapter.outcome == "failed" for chapter in chapters),
        pods=sum(len(chapter.pods) for chapter in chapters),
        first_lines=_quartiles(chapters),
    )


def _span(chapter: Chapter) -> tuple[float, float]:
    """Begin and length of the time axis; a little room at the end, and never nothing."""
    times = [at for pod in chapter.pods for at in pod.marks.values()]
    began = min(times, default=chapter.began)
    return began, max(max(times, default=began) - began, 0.01) * 1.04


def _rows(chapter: Chapter) -> list[dict[str, Any]]:
    """For each pod its bars, in per cent of the time axis."""
    began, length = _span(chapter)
    rows = []
    for pod in chapter.pods:
        bars = []
        for begin, end, words in _STAGES:
            start = pod.marks.get(begin)
            if start is None:
                continue
            stop = pod.marks.get(end)
            ongoing = stop is None
            if stop is None:
                # A stage may have been skipped (a pod that printed nothing ends without a first line): then it lasted
                # until the next thing that did happen; else it lasts still.
                later = [at for mark, at in pod.marks.items() if mark in _AFTER[begin] and at >= start]
                stop, ongoing = (min(later), False) if later else (began + length, True)
            if stop >= start:
                bars.append(
                    {
                        "stage": begin.replace(" ", "-"),
                        "left": 100 * (start - began) / length,
                        "width": max(100 * (stop - start) / length, 0.25),
                        "words": f"{words}: {duration(stop - start)}" + (", and on" if ongoing else ""),
                    }
                )
        first = pod.marks.get("first line")
        rows.append(
            {
                "pod": pod,
                "bars": bars,
                "first": None if first is None else 100 * (first - began) / length,
                "first_words": "" if first is None else duration(first - pod.marks["created"]),
            }
        )
    return rows


def _ticks(chapter: Chapter) -> list[dict[str, Any]]:
    """Four to eight round places of the time axis."""
    _, length = _span(chapter)
    step = 10.0**-3
    for candidate in (c * 10.0**e for e in range(-3, 6) for c in (1, 2, 5)):
        step = candidate
        if length / step <= 8:
            break
    return [
        {"left": 100 * number * step / length, "words": duration(number * step)}
        for number in range(int(length / step) + 1)
    ]


def _quartiles(chapters: Sequence[Chapter]) -> dict[str, str]:
    """Median and longest time from create to first line."""
    times = sorted(
        pod.marks["first line"] - pod.marks["created"]
        for chapter in chapters
        for pod in chapter.pods
        if "first line" in pod.marks
    )
    if not times:
        return {}
    return {"median": duration(times[len(times) // 2]), "longest": duration(times[-1])}


def duration(seconds: float) -> str:
    """``38 ms``, ``1.24 s``, ``3 min 5 s``."""
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s".replace(".00 s", " s")
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _clock(at: float) -> str:
    return dt.datetime.fromtimestamp(at).astimezone().strftime("%H:%M:%S.%f")[:-3] if at else ""


def _visible(text: str) -> str:
    """Control characters and those that turn the direction of writing, made visible."""
    return "".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in text)
