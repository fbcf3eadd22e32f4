"""A demo from its beginning: what cannot be built needs no cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasilet.demo import demo
from wasilet.errors import HarnessError
from wasilet.settings import load
from wasilet.steps import Finding, Play, Progress, SilentReporter, Step

pytestmark = pytest.mark.unit


def test_what_cannot_be_built_makes_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Progress) -> str:
        raise HarnessError("Rust is not installed", hint="type: apt-get install rustc")

    step = Step(name="build", look=lambda: Finding.differs("compile"), change=refuse)
    monkeypatch.setattr("wasilet.oci.publish.build_app", lambda *_, **__: (Play("build", [step]).run(), None))
    settings = load({}, environ={"WASILET_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)})
    result = demo.demo("hello-world", settings, options=demo.DemoOptions(), reporter=SilentReporter())
    (failure,) = result.recap.failures
    assert failure.detail == "Rust is not installed"
    assert demo.log_lines(result) == []
    assert not demo.next_text(result)
    assert not (tmp_path / "state").exists()
