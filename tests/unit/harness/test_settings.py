"""Where a setting comes from, and which values are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.errors import UsageError
from wasilet.settings import (
    PortSettings,
    Settings,
    TimeoutSettings,
    cache_root,
    environment_flag,
    from_invoke_variables,
    load,
    state_root,
)

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
        {"nodes": True},
        {"nodes": 1.5},
        {"nodes": "1_0"},
        {"nodes": None},
        {"ports": {"apiserver": True}},
        {"timeouts": {"ready_seconds": -1}},
        {"timeouts": {"ready_seconds": "nan"}},
        {"timeouts": {"ready_seconds": "soon"}},
        {"name": 2026},
        {"provider": False},
        {"download": "maybe"},
        {"download": 2},
        {"yes": []},
        {"kubeconfig": 7},
        {"taints": [7]},
        {"environ": {}},
        7,
        ["nodes"],
    ],
)
def test_a_value_that_makes_no_sense_is_refused(config: Any) -> None:
    with pytest.raises(UsageError):
        load(config, environ={})


def test_a_rule_of_outbound_http_that_is_not_there_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path = tmp_path / "rule.yaml"
    with pytest.raises(UsageError, match="there is no file"):
        load(environ={"WASILET_OUTBOUND_POLICY": str(path)})
    path.write_text("{}")
    assert load(environ={"WASILET_OUTBOUND_POLICY": str(path)}).outbound_policy == path


def test_local_origins_come_as_a_list_or_by_commas() -> None:
    origins = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert load({"local_origins": list(origins)}, environ={}).local_origins == origins
    assert load(environ={"WASILET_LOCAL_ORIGINS": " , ".join(origins) + ","}).local_origins == origins
    for wrong in ({"local_origins": 7}, {"local_origins": [7]}, {"local_origins": "nonsense"}):
        with pytest.raises(UsageError, match="local_origins"):
            load(wrong, environ={})


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


def test_a_relative_xdg_folder_is_ignored_as_its_specification_says() -> None:
    for base in ("x", "./x", "~/x", ""):
        assert cache_root({"XDG_CACHE_HOME": base, "HOME": "/h"}) == Path("/h/.cache/wasilet")
        assert state_root({"XDG_STATE_HOME": base, "HOME": "/h"}) == Path("/h/.local/state/wasilet")


def test_a_root_that_is_typed_relative_counts_from_where_it_was_typed() -> None:
    assert state_root({"WASILET_STATE_HOME": "s", "WASILET_INVOCATION_DIR": "/w"}) == Path("/w/s")
    assert cache_root({"WASILET_CACHE": "./c"}) == Path.cwd() / "c"


@pytest.mark.parametrize("value", ["yes", "true", "ON", "1", " y ", True, 1])
def test_booleans_mean_what_they_say(value: object) -> None:
    assert load({"download": value}, environ={}).download is True
    assert load({"yes": value}, environ={}).yes is True


@pytest.mark.parametrize("value", ["no", "False", "off", "0", "N", False, 0])
def test_a_no_is_a_no(value: object) -> None:
    assert load({"download": value}, environ={}).download is False
    assert load({"yes": value}, environ={}).yes is False
    assert load(environ={"WASILET_INSTALL": str(value)}).install is False
    assert environment_flag({"X": str(value)}, "X", default=True) is False


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WASILET_NODES", "x", "WASILET_NODES must be a whole number, not 'x'"),
        ("WASILET_DOWNLOAD", "maybe", "WASILET_DOWNLOAD must be true or false, not 'maybe'"),
        ("WASILET_NODE_IP", "1.2.3", "'1.2.3' is no IP address"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(environ={variable: value})


def test_invokes_variables_are_read_as_the_settings_are() -> None:
    environ = {
        "INVOKE_WASILET_NODES": "2",
        "INVOKE_WASILET_DOWNLOAD": "false",
        "INVOKE_WASILET_PORTS_APISERVER": "7000",
        "INVOKE_WASILET_PORTS_ETCD_PEER": "7001",
        "INVOKE_WASILET_TIMEOUTS_READY_SECONDS": "5.5",
        "INVOKE_WASILET_MIRROR": "",
        "INVOKE_RUN_ECHO": "x",
    }
    settings = load(from_invoke_variables(environ), environ={})
    assert (settings.nodes, settings.download, settings.mirror) == (2, False, "")
    assert settings.ports == PortSettings(apiserver=7000, etcd_peer=7001)
    assert settings.timeouts == TimeoutSettings(ready_seconds=5.5)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("INVOKE_WASILET_NODES", "x"),
        ("INVOKE_WASILET_DOWNLOAD", "falsch"),
        ("INVOKE_WASILET_PORTS_APISERVER", "x"),
        ("INVOKE_WASILET_PORTS_NONSENSE", "1"),
        ("INVOKE_WASILET_TIMEOUTS_READY_SECONDS", "-1"),
        ("INVOKE_WASILET_NONSENSE", "1"),
        ("INVOKE_WASILET_PORTS", "1"),
    ],
)
def test_a_wrong_variable_of_invoke_is_named(variable: str, value: str) -> None:
    with pytest.raises(UsageError, match=variable if variable != "INVOKE_WASILET_PORTS" else "ports"):
        from_invoke_variables({variable: value})
