"""Clients of the kubelet API that mean harm, in a process of their own.

A JSON job comes on stdin, a JSON list of counts, one object per row, goes to stdout. They send as fast as the server
takes it, and begin again when it hangs up."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from wasilet_node.server.streams import frames
from wasilet_node.server.streams.frames import FrameEncoder

CHUNK = 48 * 1024
RECONNECT_SECONDS = 0.05


def repeated(frame: bytes) -> Iterator[bytes]:
    chunk = frame * max(1, CHUNK // len(frame))
    while True:
        yield chunk


def refused_streams(encoder: FrameEncoder) -> Iterator[bytes]:
    number = 101
    while True:
        chunk = b""
        for _ in range(500):
            chunk += encoder.syn_stream(number, {"streamType": "none"})
            number += 2
        yield chunk


def masked(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """With a mask of zeros, which is one as good as any."""
    return bytes([(0x80 if fin else 0) | opcode, 0x80 | len(payload)]) + bytes(4) + payload


def fragments() -> Iterator[bytes]:
    yield masked(2, b"", fin=False)
    yield from repeated(masked(0, b"", fin=False))


def attack(name: str, encoder: FrameEncoder) -> Iterator[bytes]:
    """The bytes of an attack, without end."""
    unknown = struct.pack("!HHI", 0x8003, 99, 3) + b"abc"
    simple = {
        "unopened_data": frames.data_frame(999_999, b"x"),
        "even_data": frames.data_frame(2, b"x"),
        "spdy_pings": frames.ping(1),
        "spdy_pings_unread": frames.ping(1),
        "tiny_data": frames.data_frame(3, b"x"),
        "ignored_data": frames.data_frame(1, b"x"),
        "unknown_frames": unknown,
        "garbage": b"\xff" * 64,
        "websocket_pings": masked(9),
        "websocket_pongs": masked(10),
        "empty_messages": masked(2),
        "tiny_messages": masked(2, b"\x00x"),
        "unmasked": b"\x82\x02\x00x",
        "huge_frame": b"\x82\xff" + (1 << 60).to_bytes(8, "big") + bytes(4),
    }
    if name == "refused_streams":
        return refused_streams(encoder)
    if name == "fragments":
        return fragments()
    return repeated(simple[name])


def head(row: dict[str, Any], path: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: node", "Connection: Upgrade"]
    if row["by"] == "spdy":
        lines += ["Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: v4.channel.k8s.io"]
    else:
        lines += ["Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]
        lines += ["Sec-WebSocket-Protocol: v5.channel.k8s.io"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def assail(row: dict[str, Any], job: dict[str, Any], context: ssl.SSLContext, counts: Counter[str]) -> None:
    """One connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", job["port"], ssl=context)
    counts["connections"] += 1
    try:
        writer.write(head(row, job["path"]))
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 101 " not in answer.partition(b"\r\n")[0]:
            counts["turned away"] += 1
            return
        encoder = FrameEncoder()
        for index, kind in enumerate(row.get("open", [])):
            writer.write(encoder.syn_stream(2 * index + 1, {"streamType": kind}))
        drinking = None if row["sends"].endswith("_unread") else asyncio.create_task(drink(reader, counts))
        try:
            for chunk in attack(row["sends"], encoder):
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(0)  # a connection that was cut is learned of only by giving the loop a turn
                counts["bytes sent"] += len(chunk)
                if writer.transport.is_closing() or (drinking is not None and drinking.done()):
                    break
        finally:
            if drinking is not None:
                drinking.cancel()
        counts["closed"] += 1
    except (OSError, asyncio.IncompleteReadError):
        counts["closed"] += 1
    finally:
        writer.transport.abort()


async def drink(reader: asyncio.StreamReader, counts: Counter[str]) -> None:
    while data := await reader.read(65536):
        counts["bytes received"] += len(data)


async def again_and_again(row: dict[str, Any], job: dict[str, Any], context: ssl.SSLContext, counts: Any) -> None:
    while True:
        try:
            await assail(row, job, context, counts)
        except (OSError, asyncio.IncompleteReadError):
            counts["turned away"] += 1
        await asyncio.sleep(RECONNECT_SECONDS)


async def main() -> None:
    job = json.load(sys.stdin)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(job["certificate"])
    counts: list[Counter[str]] = [Counter() for _ in job["rows"]]
    tasks = [
        asyncio.create_task(again_and_again(job["rows"][n % len(counts)], job, context, counts[n % len(counts)]))
        for n in range(job["connections"])
    ]
    await asyncio.sleep(job["seconds"])
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    json.dump(counts, sys.stdout)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
