"""Where a setting comes from, and which values are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.errors import UsageError
from wasilet.settings import PortSettings, Settings, TimeoutSettings, cache_root, load, state_root

pytestmark = pytest.mark.unit


def test_the_command_line_wins_over_the_environment_over_the_file() -> None:
    config = {"name": "file", "provider": "file"}
    environ = {"WASILET_NAME": "environment", "WASILET_PROVIDER": "environment"}
    settings = load(config, environ=environ, name="typed", provider="")
    assert (settings.name, settings.provider) == ("typed", "environment")
    assert load(config, environ={}).name == "file"


def test_the_shipped_file_says_what_the_defaults_are() -> None:
    text = (Path(__file__).parents[3] / "invoke.yaml").read_text()
    assert load(yaml.safe_load(text)["wasilet"], environ={}) == load(environ={})


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "../x", "x" * 64, "ä", "a\n"])
def test_a_name_that_is_no_dns_label_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a cluster"):
        load({"name": name}, environ={})


@pytest.mark.parametrize("name", ["a", "0", "a-b", "x" * 63])
def test_a_dns_label_is_a_name(name: str) -> None:
    assert load(environ={}, name=name).name == name


@pytest.mark.parametrize(
    "config",
    [
        {"nodes": 51},
        {"nodes": "many"},
        {"ports": {"apiserver": 65536}},
        {"ports": {"apiserver": "x"}},
        {"ports": {"unknown": 1}},
        {"ports": 7},
        {"unknown": 1},
        {"taints": ["key"]},
        {"taints": ["key=value:Never"]},
        {"token_ttl_seconds": 5},
    ],
)
def test_a_value_that_makes_no_sense_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        load(config, environ={})


def test_sections_are_typed() -> None:
    settings = load({"ports": {"registry": "5001"}, "timeouts": {"ready_seconds": 5}, "download": "no"}, environ={})
    assert settings.ports == PortSettings(registry=5001)
    assert settings.timeouts == TimeoutSettings(ready_seconds=5.0)
    assert settings.download is False


def test_contexts_are_ours_by_name() -> None:
    assert Settings().context_name == "wasilet"
    assert Settings(name="two").context_name == "wasilet-two"


def test_roots_follow_our_variables_then_the_platform() -> None:
    assert cache_root({"WASILET_CACHE": "/c"}) == Path("/c")
    assert state_root({"WASILET_STATE_HOME": "/s"}) == Path("/s")
    assert cache_root({"XDG_CACHE_HOME": "/x"}) == Path("/x/wasilet")
    assert state_root({"XDG_STATE_HOME": "/x"}) == Path("/x/wasilet")
