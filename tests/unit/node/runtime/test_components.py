"""Components as the supervisor runs them without a component host: exit codes, refusals, and no network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from wasilet_node.runtime.protocol import GuestKind, StartError
from wasilet_node.settings import NodePaths

from tests.unit.node.runtime.component_guests import ACCESS_DENIED, component_guest, socket_guest
from tests.unit.node.runtime.guests import Rig, connected, end_supervisors

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("components") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WASILET_COMPONENT_HOST", str(path / "none"))  # test_component_host.py has the other way
        yield path
        asyncio.run(end_supervisors(NodePaths(data=path)))


@pytest.fixture
async def rig(data: Path) -> AsyncIterator[Rig]:
    async with connected(data) as running:
        yield running


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("(i32.const 0)", 0),
        ("(i32.const 1)", 1),
        ("(call $exit (i32.const 0)) (i32.const 1)", 0),
        ("(call $exit (i32.const 1)) (i32.const 0)", 1),
        ("(call $exit_code (i32.const 77)) (i32.const 0)", 77),
        ("(call $exit_code (i32.const 255)) (i32.const 0)", 255),
    ],
)
async def test_a_component_runs_with_the_codes_of_wasi_cli_exit(rig: Rig, body: str, code: int) -> None:
    status = await rig.run(component_guest(body), kind=GuestKind.COMPONENT)
    assert (status.exit_code, status.message) == (code, "")


@pytest.mark.parametrize("version", ["0.2.0", "0.2.12"])
async def test_each_version_of_wasi_has_exit_codes(rig: Rig, version: str) -> None:
    source = component_guest("(call $exit_code (i32.const 42)) (i32.const 0)").replace("@0.2.3", f"@{version}")
    assert (await rig.run(source, kind=GuestKind.COMPONENT)).exit_code == 42


async def test_a_component_may_exit_while_it_is_instantiated(rig: Rig) -> None:
    for start, code in (("(call $exit_code (i32.const 7))", 7), ("(call $exit (i32.const 1))", 1)):
        status = await rig.run(component_guest("(i32.const 0)", start=start), kind=GuestKind.COMPONENT)
        assert (status.exit_code, status.reason, status.message) == (code, "Error", "")


async def test_a_component_that_traps_is_134(rig: Rig) -> None:
    for source in (component_guest("(unreachable)"), component_guest("(i32.const 0)", start="(unreachable)")):
        status = await rig.run(source, kind=GuestKind.COMPONENT)
        assert (status.exit_code, status.reason) == (134, "Error")
        assert "unreachable" in status.message


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (component_guest("(i32.const 0)", export="wasi:http/incoming-handler@0.2.3"), "exports wasi:http/incoming"),
        (component_guest("(i32.const 0)", export="wasi:cli/run@0.3.0"), "no wasi:cli/run of WASI 0.2.*@0.3.0"),
        (
            component_guest("(i32.const 0)", imports='(import "cats:shelter/door" (instance (export "open" (func))))'),
            "^the component imports what this node does not offer: .*`cats:shelter/door`",
        ),
        (
            component_guest(
                "(i32.const 0)",
                imports='(import "wasi:http/outgoing-handler@0.2.3" (instance (export "handle" (func))))',
            ),
            r"what this node does not offer \(wasi:http needs the component host.*`wasi:http/outgoing-handler@0.2.3`",
        ),
        (
            component_guest("(i32.const 0)").replace("(func $run (result (result))", "(func $run (result u32)"),
            r"wasi:cli/run@0.2.3 is not of WASI's type: func\(\) -> result",
        ),
        (
            component_guest("(i32.const 0)")
            .replace("(func $run (result (result))", '(func $run (param "x" u32) (result (result))')
            .replace('(export "run") (result i32)', '(export "run") (param i32) (result i32)'),
            "is not of WASI's type",
        ),
    ],
)
async def test_a_component_that_cannot_run_is_refused_with_the_reason(rig: Rig, source: str, why: str) -> None:
    config = rig.config(rig.artifact(source, GuestKind.COMPONENT), kind=GuestKind.COMPONENT)
    with pytest.raises(StartError, match=why):
        await rig.client.start(config)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_a_component_gets_no_sockets(rig: Rig, protocol: str) -> None:
    status = await rig.run(socket_guest(protocol), kind=GuestKind.COMPONENT)
    assert (status.exit_code, status.message) == (100 + ACCESS_DENIED, "")
