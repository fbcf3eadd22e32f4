"""A demo from its beginning: what cannot be built needs no cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import apps
from harness.console import SilentReporter
from harness.errors import HarnessError
from harness.play import Finding, Play, Progress, Step
from harness.settings import load

pytestmark = pytest.mark.unit


def test_what_cannot_be_built_makes_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Progress) -> str:
        raise HarnessError("Rust is not installed", hint="type: apt-get install rustc")

    step = Step(name="build", look=lambda: Finding.differs("compile"), change=refuse)
    monkeypatch.setattr("harness.publish.build_app", lambda *_, **__: (Play("build", [step]).run(), None))
    settings = load({}, environ={"WASILET_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)})
    result = apps.demo("hello-world", settings, options=apps.DemoOptions(), reporter=SilentReporter())
    (failure,) = result.recap.failures
    assert failure.detail == "Rust is not installed"
    assert apps.log_lines(result) == []
    assert not apps.next_words(result)
    assert not (tmp_path / "state").exists()
