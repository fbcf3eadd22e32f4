"""The default PodSecurity level of the ``host`` provider's clusters: what pods may do where a namespace has no label.

Kubernetes' own default is ``privileged``: any user who may create a pod may mount any folder of the machine that the
node may read. The level is decided when a cluster is made and can be changed by ``up --pod-security``; a cluster that
was made before there was one keeps what it has. ``kube-system`` is left out: who may create pods there is an
administrator."""

from __future__ import annotations

from pathlib import Path

from wasilet.kube.manifests import render_text
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.storage import write_file

DEFAULT_LEVEL = "baseline"
_TEMPLATE = "admission.yaml.j2"


def decide(settings: Settings, state: State, *, provider: str) -> str:
    """The level to record: what was asked for, else what the cluster has, else the default of a new one. Empty where
    the API server is not Wasilet's to configure."""
    if provider != "host":
        return ""
    record = state.cluster
    return settings.pod_security or record.pod_security or ("" if record.ports else DEFAULT_LEVEL)


def write_config(state: State) -> Path | None:
    """The API server's admission configuration, written where it is missing or different; None: the cluster has no
    level of its own. Raises StateError."""
    level = state.cluster.pod_security
    if not level:
        return None
    path = state.etc / "admission.yaml"
    text = render_text(_TEMPLATE, level=level)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_file(path, text.encode())
    return path
