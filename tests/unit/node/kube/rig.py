"""A scripted API server on loopback, for tests of the client: each test gives the handler."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from wasilet_node.kube.client import KubeClient
from wasilet_node.kube.kubeconfig import Cluster, Credentials
from wasilet_node.kube.turns import Turns
from wasilet_node.kube.watch import Pace

QUICK = Pace(first_delay_seconds=0.01, longest_delay_seconds=0.02)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def status_response(code: int, reason: str, message: str = "", **details: Any) -> web.Response:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message or reason,
        "details": details,
    }
    return web.json_response(body, status=code)


@asynccontextmanager
async def api_server(
    handler: Handler, *, tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[tuple[str, web.AppRunner]]:
    """The URL and the runner."""

    async def dispatch(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", dispatch)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls, reuse_address=True)
    await site.start()
    scheme = "https" if tls is not None else "http"
    try:
        yield f"{scheme}://127.0.0.1:{runner.addresses[0][1]}", runner
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client_of(
    handler: Handler,
    *,
    credentials: Credentials | None = None,
    watch_pace: Pace = QUICK,
    turns: Turns | None = None,
) -> AsyncIterator[KubeClient]:
    """A client of a scripted server."""
    async with api_server(handler) as (url, _):
        client = KubeClient(
            Cluster(server=url),
            credentials or Credentials(token="t"),
            user_agent="test",
            watch_pace=watch_pace,
            turns=turns,
        )
        try:
            yield client
        finally:
            await client.close()
            await asyncio.sleep(0)


class WatchScript:
    """Answers lists and watches of one path from a script.

    ``lists``: bodies of successive lists, the last one repeated; ``watches``: successive watches, each a list of events
    (or a response to give instead). After the last one watches stay silent.
    """

    def __init__(self, lists: list[Any], watches: list[Any]) -> None:
        self.lists = lists
        self.watches = watches
        self.queries: list[dict[str, str]] = []
        self._asked = asyncio.Condition()

    async def until_asked(self, times: int) -> None:
        """Wait for that many requests."""
        async with asyncio.timeout(5), self._asked:
            await self._asked.wait_for(lambda: len(self.queries) >= times)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        async with self._asked:
            self.queries.append(query)
            self._asked.notify_all()
        if query.get("watch") != "true":
            body = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
            return body if isinstance(body, web.StreamResponse) else web.json_response(body)
        script: Any = self.watches.pop(0) if self.watches else None
        if isinstance(script, web.StreamResponse):
            return script
        response = web.StreamResponse()
        await response.prepare(request)
        if script is None:
            await asyncio.sleep(3600)
        for event in script or ():
            if callable(event):
                await event(response)
            else:
                await response.write(json.dumps(event).encode() + b"\n")
        return response


def answer(**more: Any) -> web.Response:
    """Some object, which is what every success is."""
    return web.json_response({"kind": "Pod", "metadata": {}, **more})


def item(name: str, version: int, **more: Any) -> dict[str, Any]:
    return {"kind": "Pod", "metadata": {"name": name, "resourceVersion": str(version)}, **more}


def listed(*items: dict[str, Any], version: int) -> dict[str, Any]:
    return {
        "kind": "PodList",
        "apiVersion": "v1",
        "metadata": {"resourceVersion": str(version)},
        # As the API server lists them.
        "items": [{field: value for field, value in each.items() if field != "kind"} for each in items],
    }
