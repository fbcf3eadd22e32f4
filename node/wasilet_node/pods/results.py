"""The outcome of probes, by container instance: what the plan and the status read, and the probers write."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Result(StrEnum):
    """Where a probe stands once its thresholds are counted in."""

    UNKNOWN = "unknown"
    SUCCESS = "success"
    FAILURE = "failure"


class ProbeKind(StrEnum):
    """The three probes; the value is the word that kubelet's events begin with."""

    STARTUP = "Startup"
    READINESS = "Readiness"
    LIVENESS = "Liveness"

    @property
    def field(self) -> str:
        """The container's field that holds the probe."""
        return f"{self.value.lower()}Probe"


@dataclass
class ProbeResults:
    """The results of one pod. An instance without an entry has no such probe, or none has run yet."""

    by_instance: dict[tuple[str, ProbeKind], Result] = field(default_factory=dict)

    def get(self, container_id: str, kind: ProbeKind) -> Result | None:
        """None: no probe of that kind watches this instance."""
        return self.by_instance.get((container_id, kind))

    def started(self, container_id: str, *, has_probe: bool) -> bool:
        """A running container counts as started when it has no startup probe, or that probe has succeeded."""
        result = self.get(container_id, ProbeKind.STARTUP)
        return result is Result.SUCCESS if result is not None else not has_probe

    def ready(self, container_id: str, *, has_probe: bool) -> bool:
        """A started container counts as ready when it has no readiness probe, or that probe has succeeded."""
        result = self.get(container_id, ProbeKind.READINESS)
        return result is Result.SUCCESS if result is not None else not has_probe

    def failed(self, container_id: str, kind: ProbeKind) -> bool:
        """The probe's failure threshold was reached."""
        return self.get(container_id, kind) is Result.FAILURE

    def forget(self, container_id: str) -> None:
        """The instance is gone."""
        for kind in ProbeKind:
            self.by_instance.pop((container_id, kind), None)
