"""The agent's side of NetworkPolicies: a container starts once the rules know its pod's address, where there are any.

An address that the rules do not know is dropped until its pod's status names it, which would cost a guest's first TCP
connection the second until SYN is sent again, and fail a name lookup that comes before it. So the agent reports each
address as soon as a pod has it, and the policies' process answers when the rules hold it. They talk by a Unix socket at
which the agent listens, one JSON object per line: ``{"claimed": {uid: address}}`` and ``{"released": [uid]}`` one way,
``{"judging": bool, "known": {uid: address}}`` the other. Where no policy exists, nothing waits.

The wait has a limit and a pod that reaches it starts: what is not known is dropped all the same, so nothing depends on
this for safety.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wasilet_node.runtime import unix_sockets

logger = logging.getLogger(__name__)

SOCKET_NAME = "policies.sock"
WAIT_SECONDS = 1.0
"""After this the guest's own second try is as good."""

RETRY_SECONDS = 1.0
LINE_LIMIT_BYTES = 4 * 1024 * 1024
"""One line may name each pod of a node, twice over."""


class PolicyGate:
    """``run`` for as long as the network; the rest may be called at any time."""

    def __init__(self, path: Path, *, wait_seconds: float = WAIT_SECONDS) -> None:
        """``path``: of the socket, in a private folder."""
        self._path = path
        self._wait_seconds = wait_seconds
        self._claims: dict[str, str] = {}
        self._known: dict[str, str] = {}
        self._judging = False
        self._changed = asyncio.Condition()
        self._writer: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        """Listen for ever. Without a socket, containers do not wait."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            listener = unix_sockets.listen(self._path, 1)
        except OSError as error:
            logger.warning("containers start before NetworkPolicies know their pods: %s: %s", self._path, error)
            return
        try:
            while True:
                try:
                    await self._serve_one(listener)
                except OSError as error:
                    logger.warning("the policies' process cannot connect: %s", error)
                    await asyncio.sleep(RETRY_SECONDS)
        finally:
            listener.close()
            self._path.unlink(missing_ok=True)

    def claim(self, uid: str, address: str) -> None:
        """A pod has this address from now on; idempotent."""
        if self._claims.get(uid) != address:
            self._claims[uid] = address
            self._send({"claimed": {uid: address}})

    def release(self, uid: str) -> None:
        """A pod has none any more; idempotent."""
        self._known.pop(uid, None)
        if self._claims.pop(uid, None) is not None:
            self._send({"released": [uid]})

    async def passed(self, uid: str) -> bool:
        """Wait until the rules know a pod that has claimed an address, or judge no pod. False: not within the limit."""
        if not self._judging or self._knows(uid):
            return True
        try:
            async with asyncio.timeout(self._wait_seconds), self._changed:
                await self._changed.wait_for(lambda: not self._judging or self._knows(uid))
        except TimeoutError:
            return False
        return True

    def _knows(self, uid: str) -> bool:
        address = self._claims.get(uid)
        return address is None or self._known.get(uid) == address

    def _send(self, message: Mapping[str, object]) -> None:
        if self._writer is not None:
            self._writer.write(line(message))

    async def _serve_one(self, listener: socket.socket) -> None:
        """One connection to its end: one process is started after another has ended."""
        connected, _ = await asyncio.get_running_loop().sock_accept(listener)
        reader, writer = await asyncio.open_unix_connection(sock=connected, limit=LINE_LIMIT_BYTES)
        self._writer = writer
        self._send({"claimed": self._claims})
        try:
            while (message := await read(reader)) is not None:
                await self._take(message)
        finally:
            # What was known stays known: the rules stay, until the next process replaces them.
            self._writer = None
            writer.close()

    async def _take(self, message: Mapping[str, Any]) -> None:
        self._judging = bool(message.get("judging"))
        if not self._judging:
            self._known.clear()
        self._known.update({uid: address for uid, address in message.get("known", {}).items() if uid in self._claims})
        async with self._changed:
            self._changed.notify_all()


class PolicyReports:
    """The other side, in the policies' process: what addresses the agent reported, and what it was told of them."""

    def __init__(self) -> None:
        self.claims: dict[str, str] = {}
        """Addresses of this node's pods, by uid."""

        self._told: dict[str, str] = {}
        self._judging: bool | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def follow(self, path: Path, changed: asyncio.Event) -> None:
        """For ever; ``changed`` is set by each report. Where no one listens at ``path``, only statuses are known."""
        while True:
            try:
                await self._once(path, changed)
            except OSError as error:
                logger.warning("the agent cannot be reached: %s: %s", path, error)
            await asyncio.sleep(RETRY_SECONDS)

    async def _once(self, path: Path, changed: asyncio.Event) -> None:
        sock = unix_sockets.connect(path, timeout_seconds=WAIT_SECONDS)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=LINE_LIMIT_BYTES)
        self.claims.clear()
        self._told.clear()
        self._judging, self._writer = None, writer
        try:
            while (message := await read(reader)) is not None:
                self._take(message)
                changed.set()
        finally:
            self._writer = None
            writer.close()

    def applied(self, uids: Sequence[str], claims: Mapping[str, str], *, judging: bool) -> None:
        """The rules that hold now know these pods at the addresses that they had claimed."""
        fresh = {uid: claims[uid] for uid in uids if judging and self._told.get(uid) != claims[uid]}
        if self._writer is None or (judging == self._judging and not fresh):
            return
        if not judging:
            self._told.clear()
        self._told.update(fresh)
        self._judging = judging
        self._writer.write(line({"judging": judging, "known": fresh}))

    def _take(self, message: Mapping[str, Any]) -> None:
        self.claims.update(message.get("claimed", {}))
        for uid in message.get("released", ()):
            self.claims.pop(uid, None)
            self._told.pop(uid, None)


def line(message: Mapping[str, object]) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode() + b"\n"


async def read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message; None: the other side is gone, or sends what is none."""
    with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
        message = json.loads(await reader.readuntil(b"\n"))
        if isinstance(message, dict):
            return message
    return None
