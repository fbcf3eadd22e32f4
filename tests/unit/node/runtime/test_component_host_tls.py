"""Outgoing HTTPS of a component, against a TLS server with its own certificate authority.

The authority is trusted as an operator has it trusted: by ``SSL_CERT_FILE`` of the agent. Needs the component host,
which is found or skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from wasilet_node.runtime.component_host import locate
from wasilet_node.runtime.component_host.library import HostUnavailableError
from wasilet_node.runtime.engine import make_engine
from wasilet_node.runtime.protocol import HttpPolicy
from wasilet_node.settings import NodePaths
from wasmtime import component as wasmtime_component

from tests.unit.node.runtime.guests import Rig, connected, end_supervisors
from tests.unit.node.runtime.test_component_host import GUESTS, serving
from tests.unit.node.server.rig import Authority

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("trusted")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Path]:
    """Of a supervisor that trusts ``authority`` and no other."""
    try:
        locate.load()
    except HostUnavailableError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("tls")
    roots = folder / "roots.pem"
    roots.write_bytes(authority.pem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(roots))
        yield folder / "data"
        asyncio.run(end_supervisors(NodePaths(data=folder / "data")))


@pytest.fixture
async def rig(data: Path) -> AsyncIterator[Rig]:
    async with connected(data) as running:
        yield running


@pytest.fixture
def artifact(rig: Rig) -> str:
    compiled = rig.paths.compiled / "http_p2"
    if not compiled.exists():
        compiled.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        guest = (GUESTS / "http_p2.wasm").read_bytes()
        compiled.write_bytes(wasmtime_component.Component(make_engine(server=True), guest).serialize())
    return str(compiled)


@contextlib.asynccontextmanager
async def answering(authority: Authority, folder: Path, *, name: str = "localhost") -> AsyncIterator[str]:
    """A TLS server on loopback; its origin, by the name ``localhost``."""
    pair = authority.issue(name, names=(name,), server=True)
    (folder / "pair.pem").write_bytes(pair.key + pair.certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "pair.pem")

    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="over TLS")

    app = web.Application()
    app.router.add_get("/hello", hello)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        yield f"https://localhost:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def fetched(rig: Rig, artifact: str, origin: str, policy: HttpPolicy) -> str:
    async with serving(rig, artifact, http=policy) as server:
        return (await server.get(f"/fetch?{origin}/hello"))[1]


async def test_https_is_spoken_with_whom_the_system_trusts(
    rig: Rig, artifact: str, authority: Authority, tmp_path: Path
) -> None:
    async with answering(authority, tmp_path) as origin:
        policy = HttpPolicy(allowed_origins=(origin,), local_origins=(origin,))
        assert await fetched(rig, artifact, origin, policy) == "200 8 over TLS"
        # The annotation names it, and the operator does not: loopback stays the node's own.
        assert "DestinationIpProhibited" in await fetched(rig, artifact, origin, HttpPolicy(allowed_origins=(origin,)))


async def test_a_certificate_of_another_authority_is_refused(rig: Rig, artifact: str, tmp_path: Path) -> None:
    async with answering(Authority("unknown"), tmp_path) as origin:
        policy = HttpPolicy(allowed_origins=(origin,), local_origins=(origin,))
        assert "TlsCertificateError" in await fetched(rig, artifact, origin, policy)


async def test_a_certificate_for_another_name_is_refused(
    rig: Rig, artifact: str, authority: Authority, tmp_path: Path
) -> None:
    async with answering(authority, tmp_path, name="elsewhere.example") as origin:
        policy = HttpPolicy(allowed_origins=(origin,), local_origins=(origin,))
        assert "TlsCertificateError" in await fetched(rig, artifact, origin, policy)


async def test_plain_http_behind_an_https_origin_is_an_error_and_not_an_answer(rig: Rig, artifact: str) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nplain")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with server:
        origin = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        policy = HttpPolicy(allowed_origins=(origin,), local_origins=(origin,))
        assert "TlsProtocolError" in await fetched(rig, artifact, origin, policy)
