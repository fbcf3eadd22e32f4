"""What pods that serve HTTP have answered: from the metrics of their nodes, by the API server's proxy.

The counters begin with a container, so rates are differences of two looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wasilet.errors import ApiError
from wasilet.kube.client import Kube, api_path

READ_SECONDS = 2.0
NODE_SELECTOR = "type=wasilet"
"""Other kubelets' metrics are large, and have none of this."""

_REQUESTS = "wasilet_http_requests_total"
_DURATION = "wasilet_http_request_duration_seconds"

Key = tuple[str, str]
"""Namespace and name of a pod."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """By one pod, all of its containers together."""

    requests: int = 0
    failed: int = 0
    """Answered by 5xx."""

    seconds: float = 0.0
    """Of all requests together."""

    buckets: tuple[tuple[float, int], ...] = ()
    """Seconds, and how many took at most that long; the last is infinite."""

    def since(self, earlier: Served) -> Served:
        """What came after ``earlier``; all of it where the counters have begun again."""
        if earlier.requests > self.requests:
            return self
        before = dict(earlier.buckets)
        return Served(
            requests=self.requests - earlier.requests,
            failed=self.failed - earlier.failed,
            seconds=self.seconds - earlier.seconds,
            buckets=tuple((end, count - before.get(end, 0)) for end, count in self.buckets),
        )

    @property
    def mean_seconds(self) -> float:
        """0 without requests."""
        return self.seconds / self.requests if self.requests else 0.0

    def within(self, share: float) -> float:
        """The end of the bucket in which ``share`` of the requests were answered: an upper bound."""
        total = self.buckets[-1][1] if self.buckets else 0
        return next((end for end, count in self.buckets if count >= share * total), 0.0) if total else 0.0

    def __str__(self) -> str:
        """For a report; empty where nothing was asked."""
        if not self.requests:
            return ""
        slowest = self.within(0.99)
        bound = f", 99 % within {slowest * 1000:g} ms" if slowest != float("inf") else ""
        plural = "s" if self.requests != 1 else ""
        mean = f"{self.mean_seconds * 1000:.1f} ms on average"
        return f"{self.requests:,} request{plural}, {mean}{bound}, {self.failed} failed"


def served(kube: Kube) -> dict[Key, Served]:
    """Of all pods on Wasilet's nodes that serve. A node that does not answer is left out. Raises ApiError when the
    nodes cannot be listed."""
    found: dict[Key, Served] = {}
    nodes = kube.get(api_path("nodes"), timeout_seconds=READ_SECONDS, labelSelector=NODE_SELECTOR).get("items") or []
    for node in nodes:
        path = api_path("nodes", str(node["metadata"]["name"]), sub="proxy") + "/metrics"
        try:
            text = kube.body(path, timeout_seconds=READ_SECONDS).decode(errors="replace")
        except ApiError:
            continue
        found |= read_metrics(text)
    return found


def read_metrics(text: str) -> dict[Key, Served]:
    """Of one node's ``/metrics``; nothing where that is not to be read."""
    from prometheus_client.parser import text_string_to_metric_families

    counts: dict[Key, dict[str, float]] = {}
    ends: dict[Key, dict[float, int]] = {}
    # Only what is of interest is parsed: there are thousands of other lines.
    lines = [line for line in text.splitlines() if line.startswith((_REQUESTS, _DURATION))]
    try:
        samples = [
            sample for family in text_string_to_metric_families("\n".join(lines) + "\n") for sample in family.samples
        ]
    except ValueError:
        return {}
    for sample in samples:
        key = (sample.labels.get("namespace", ""), sample.labels.get("pod", ""))
        count = counts.setdefault(key, {"requests": 0, "failed": 0, "seconds": 0.0})
        if sample.name == _REQUESTS:
            count["requests"] += sample.value
            count["failed"] += sample.value * sample.labels.get("code", "").startswith("5")
        elif sample.name == f"{_DURATION}_sum":
            count["seconds"] += sample.value
        elif sample.name == f"{_DURATION}_bucket":
            end = float(sample.labels.get("le", "inf"))
            of_pod = ends.setdefault(key, {})
            of_pod[end] = of_pod.get(end, 0) + int(sample.value)
    return {
        key: Served(
            requests=int(count["requests"]),
            failed=int(count["failed"]),
            seconds=count["seconds"],
            buckets=tuple(sorted(ends.get(key, {}).items())),
        )
        for key, count in counts.items()
    }


class Rates:
    """Requests per second and latency of each pod, from look to look."""

    def __init__(self, look: Callable[[], Mapping[Key, Served]], clock: Callable[[], float] = time.monotonic) -> None:
        self._look = look
        self._clock = clock
        self._before: Mapping[Key, Served] = {}
        self._at = 0.0
        self.words: dict[Key, str] = {}
        """Of each pod that serves: ``512/s 3.1 ms``; without a latency where nothing was asked meanwhile."""

    def look(self) -> None:
        """Raises ApiError."""
        found, now = self._look(), self._clock()
        passed = max(now - self._at, 0.001)
        self.words = {}
        for key, total in found.items():
            # What was counted before the first look has no time.
            earlier = self._before.get(key, total if not self._before else Served())
            new = total.since(earlier)
            latency = f" {new.mean_seconds * 1000:.1f} ms" if new.requests else ""
            self.words[key] = f"{new.requests / passed:.0f}/s{latency}"
        self._before, self._at = found, now
