"""Which PodSecurity level a cluster has: by its record, its provider and what was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.controlplane import pod_security
from wasilet.errors import UsageError
from wasilet.providers.base import check_options
from wasilet.providers.kind import KindProvider
from wasilet.settings import Settings, load
from wasilet.state import State

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("provider", "asked", "record", "expected"),
    [
        ("host", "", {}, "baseline"),
        ("host", "privileged", {}, "privileged"),
        ("host", "", {"run_id": "x"}, "baseline"),  # the pytest plugin makes one before the cluster
        ("host", "", {"ports": {"apiserver": 1}}, ""),
        ("host", "baseline", {"ports": {"apiserver": 1}}, "baseline"),
        ("host", "", {"ports": {"apiserver": 1}, "pod_security": "restricted"}, "restricted"),
        ("host", "baseline", {"ports": {"apiserver": 1}, "pod_security": "restricted"}, "baseline"),
        ("kind", "", {}, ""),
    ],
)
def test_the_level_is_the_one_asked_for_or_the_one_that_the_cluster_has(
    tmp_path: Path, provider: str, asked: str, record: dict[str, Any], expected: str
) -> None:
    state = State(tmp_path, "c")
    if record:
        state.update(**record)
    assert pod_security.decide(Settings(pod_security=asked), state, provider=provider) == expected


def test_the_configuration_says_the_level_and_a_cluster_without_one_has_none(tmp_path: Path) -> None:
    state = State(tmp_path, "c")
    state.create()
    assert pod_security.write_config(state) is None
    for level in ("restricted", "privileged"):
        state.update(pod_security=level)
        path = pod_security.write_config(state)
        assert path is not None
        assert path.stat().st_mode & 0o077 == 0
        (plugin,) = yaml.safe_load(path.read_text())["plugins"]
        defaults = plugin["configuration"]["defaults"]
        assert (plugin["name"], defaults["enforce"], defaults["warn"]) == ("PodSecurity", level, level)


def test_a_level_that_does_not_exist_or_means_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="'open' is no level of the Pod Security Standards"):
        load({"pod_security": "open"}, environ={})
    assert load(environ={"WASILET_POD_SECURITY": "privileged"}).pod_security == "privileged"
    with pytest.raises(UsageError, match="--pod-security means nothing to provider 'kind'"):
        check_options(KindProvider(), Settings(provider="kind", pod_security="baseline"))
