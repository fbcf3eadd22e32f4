"""Which file of settings wins, as docs/harness.md says it."""

from __future__ import annotations

from pathlib import Path

import pytest
from invoke.config import Config
from invoke.context import Context
from wasilet.terminal.cli import settings_of

pytestmark = pytest.mark.unit

CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """As Invoke makes it in the checkout, for a user whose file says two nodes and a registry's port."""
    monkeypatch.setenv("WASILET_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("WASILET_NODES", raising=False)
    (tmp_path / "invoke.yaml").write_text("wasilet:\n  nodes: 2\n  ports:\n    registry: 5001\n")
    config = Config(user_prefix=f"{tmp_path}/", project_location=CHECKOUT, lazy=True)
    config.load_user()
    config.load_project()
    config.load_shell_env()
    return Context(config)


def test_the_users_file_wins_over_the_checkouts(context: Context) -> None:
    settings = settings_of(context)
    assert (settings.nodes, settings.ports.registry) == (2, 5001)
    assert settings.timeouts.ready_seconds == 60, "what the user's file does not say is the default"


def test_the_environment_wins_over_the_users_file(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOKE_WASILET_NODES", "3")
    context.config.load_shell_env()
    assert settings_of(context).nodes == 3
    monkeypatch.setenv("WASILET_NODES", "4")
    assert settings_of(context).nodes == 4


def test_the_command_line_wins_over_all(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WASILET_NODES", "4")
    assert settings_of(context, nodes=5).nodes == 5
