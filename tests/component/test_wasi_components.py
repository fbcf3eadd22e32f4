"""A component made from a sample: pushed and pulled as one, and run on this machine as ``invoke run`` does."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from wasilet.apps.samples import LocalSpec, find_app
from wasilet.console import PlainReporter
from wasilet.demo.local_run import check
from wasilet.oci.publish import pull_artifact, push_app

from tests.clusters import temporary_settings
from tests.component.registry_rig import running_registry
from tests.e2e import componentize
from tests.e2e.guests import build_guest, build_toolbox

pytestmark = [pytest.mark.component, pytest.mark.skipif(bool(componentize.why_not()), reason=componentize.why_not())]


@pytest.fixture(scope="module")
def hello(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("hello") / "hello.wasm"
    file.write_bytes(componentize.as_component(build_guest("hello-world")))
    return file


def test_a_component_is_pushed_as_wasip2_with_its_interfaces(tmp_path: Path, hello: Path) -> None:
    with running_registry(tmp_path) as registry, temporary_settings("components") as settings:
        _, pushed = push_app(
            str(hello), settings, reporter=PlainReporter(io.StringIO()), to=f"{registry}/cats/hello:v1"
        )
        assert pushed is not None
        pulled = pull_artifact(pushed.pinned, settings, output=str(tmp_path / "back.wasm"))
    assert (pulled.config["os"], pulled.config["architecture"]) == ("wasip2", "wasm")
    assert pulled.config["component"]["exports"] == ["wasi:cli/run@0.2.3"]
    assert "wasi:filesystem/preopens@0.2.3" in pulled.config["component"]["imports"]
    assert (tmp_path / "back.wasm").read_bytes() == hello.read_bytes()


def test_a_sample_does_as_a_component_what_its_demo_says(hello: Path) -> None:
    local = find_app("hello-world").demo.local
    assert local is not None
    check(hello, local, say=lambda _: None)


def test_a_component_runs_here_with_folders_variables_and_arguments(tmp_path: Path) -> None:
    toolbox = tmp_path / "toolbox.wasm"
    toolbox.write_bytes(componentize.as_component(build_toolbox()))
    seen: list[str] = []
    script = ("args", "env COLOUR", "cat /a/x", "cat /b/x", "write /c/x mine", "cat /c/x", "write /b/x no")
    local = LocalSpec(
        args=script,
        env={"COLOUR": "red"},
        dirs={"/a": {"x": "one"}, "/b::ro": {"x": "two"}, "/c": {}},
        exit_code=1,
    )
    check(toolbox, local, say=seen.append)
    assert seen[:2] == ["argv[0]=toolbox", "argv[1]=args"]
    assert seen[len(script) + 1 :][:4] == ["COLOUR=red", "one", "two", "mine"]
    assert "Operation not permitted" in seen[-1]
