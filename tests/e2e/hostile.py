"""Input that no client should send: damaged modules, a registry that lies, manifests at the edge of what is accepted.

All of it is made from a seed, so that a failure comes again.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import wasmtime
from wasilet_common.oci import mediatypes

from tests.unit.node.runtime.component_guests import component_guest
from tests.unit.node.runtime.guests import HELLO

MAX_STALL_SECONDS = 3.0


def modules(rng: random.Random, toolbox: bytes, count: int) -> Iterator[bytes]:
    """Modules and components with bytes changed, cut, repeated, moved or replaced."""
    good = [bytes(wasmtime.wat2wasm(HELLO)), bytes(wasmtime.wat2wasm(component_guest("(i32.const 0)")))]
    for number in range(count):
        source = toolbox if number % 10 == 0 else rng.choice(good)
        yield _damaged(rng, source)


def _damaged(rng: random.Random, source: bytes) -> bytes:
    data = bytearray(source)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if len(data) < 10:
            break
        at = rng.randrange(8, len(data))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice((0x00, 0x7F, 0x80, 0xFF))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 40)]
            case 4:
                data[at:at] = data[8 : 8 + rng.randrange(1, 200)]
            case _:
                data[at : at + 5] = b"\xff\xff\xff\xff\x0f"
    return bytes(data)


# --- a registry ------------------------------------------------------------------------------------------------------


class LyingRegistry:
    """``repository:tag`` chooses the lie: the repository is its number. Serves plain HTTP on loopback."""

    def __init__(self, module: bytes) -> None:
        self.module = module
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    registry.answer(self)

            do_HEAD = do_GET  # noqa: N815  (the handler's own convention)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="lying registry", daemon=True)
        self._thread.start()
        self._ended = threading.Event()
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop serving."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One request."""
        parts = request.path.split("/")
        if len(parts) < 5:
            self._send(request, b"{}", "application/json")
            return
        rng = random.Random(f"{parts[2]} {parts[3]}")
        lie = LIES[int(parts[2].removeprefix("n")) % len(LIES)]
        if parts[3] == "manifests":
            lie(self, request, rng)
        else:
            self._blob(request, parts[4], rng)

    def _blob(self, request: http.server.BaseHTTPRequestHandler, digest: str, rng: random.Random) -> None:
        known = {_digest(data): data for data in (self.module, CONFIG)}
        if digest in known and rng.random() < 0.7:
            self._send(request, known[digest], "application/octet-stream")
        else:
            self._send(request, rng.randbytes(rng.randrange(200)), "application/octet-stream")

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        body: bytes,
        media_type: str,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Type", media_type)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    # --- lies about manifests --------------------------------------------------------------------------------------

    def changed_manifest(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """A good one in which values were exchanged for others."""
        manifest = self._manifest()
        for _ in range(rng.randrange(1, 4)):
            _exchange(rng, manifest)
        self._send(request, json.dumps(manifest).encode(), mediatypes.OCI_MANIFEST)

    def changed_text(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """A good one with bytes damaged."""
        text = bytearray(json.dumps(self._manifest()).encode())
        for _ in range(rng.randrange(1, 5)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        self._send(request, bytes(text), rng.choice((mediatypes.OCI_MANIFEST, mediatypes.OCI_INDEX, "text/html", "")))

    def deep(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """Nested a hundred thousand times."""
        depth = 100_000
        body = b'{"layers":' + b"[" * depth + b"]" * depth + b"}"
        self._send(request, body, mediatypes.OCI_MANIFEST)

    def endless(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """A body far beyond any limit."""
        request.send_response(200)
        request.send_header("Content-Type", mediatypes.OCI_MANIFEST)
        request.send_header("Content-Length", str(1 << 40))
        request.end_headers()
        while not self._ended.is_set():
            request.wfile.write(b" " * 65536)

    def cut_short(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """Less than it says."""
        body = json.dumps(self._manifest()).encode()
        self._send(request, body[: len(body) // 2], mediatypes.OCI_MANIFEST, length=len(body))
        request.close_connection = True

    def stalled(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """Says nothing for a while, then hangs up."""
        self._ended.wait(MAX_STALL_SECONDS)
        request.close_connection = True

    def no_http(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """Bytes."""
        request.wfile.write(rng.randbytes(300))
        request.close_connection = True

    def refused(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """Any status, with a challenge that makes no sense."""
        status = rng.choice((400, 401, 403, 404, 418, 429, 500, 502, 503))
        challenge = rng.choice(
            ('Bearer realm="', 'Bearer realm="http://127.0.0.1:1/t"', "Basic", "\u00fcber x=,,=", "")
        )
        headers = {"WWW-Authenticate": challenge, "Retry-After": "100000"}
        self._send(request, rng.randbytes(50), "application/json", status=status, headers=headers)

    def redirected(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """To itself, to a file, to elsewhere."""
        target = rng.choice((request.path, "file:///etc/passwd", "http://169.254.169.254/", "//", "gopher://x/"))
        self._send(request, b"", "text/plain", status=rng.choice((301, 302, 307, 308)), headers={"Location": target})

    def circle(self, request: http.server.BaseHTTPRequestHandler, rng: random.Random) -> None:
        """An index whose wasm entry is an index."""
        entry = {
            "mediaType": mediatypes.OCI_INDEX,
            "digest": "sha256:" + "0" * 64,
            "size": 10,
            "platform": {"os": "wasi", "architecture": "wasm"},
        }
        index = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [entry] * rng.choice((1, 1000))}
        self._send(request, json.dumps(index).encode(), mediatypes.OCI_INDEX)

    def _manifest(self) -> dict[str, Any]:
        layer = {"mediaType": mediatypes.CNCF_WASM_LAYER, "digest": _digest(self.module), "size": len(self.module)}
        config = {"mediaType": mediatypes.CNCF_WASM_CONFIG, "digest": _digest(CONFIG), "size": len(CONFIG)}
        return {"schemaVersion": 2, "mediaType": mediatypes.OCI_MANIFEST, "config": config, "layers": [layer]}


Lie = Callable[[LyingRegistry, http.server.BaseHTTPRequestHandler, random.Random], None]
LIES: tuple[Lie, ...] = (
    LyingRegistry.changed_manifest,
    LyingRegistry.changed_text,
    LyingRegistry.changed_manifest,
    LyingRegistry.deep,
    LyingRegistry.endless,
    LyingRegistry.cut_short,
    LyingRegistry.stalled,
    LyingRegistry.no_http,
    LyingRegistry.refused,
    LyingRegistry.redirected,
    LyingRegistry.circle,
)
CONFIG = b'{"architecture":"wasm","os":"wasip1"}'
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "\0",
    "x" * 100_000,
    "sha256:../../../../etc/passwd",
    "sha256:" + "g" * 64,
    "sha512:" + "0" * 128,
    "md5:d41d8cd98f00b204e9800998ecf8427e",
    [],
    {},
    [[[]]],
    {"a": {"b": {}}},
)


def _exchange(rng: random.Random, value: Any) -> None:
    """Exchange one value somewhere below ``value``."""
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        below = value[key]
        if isinstance(below, dict | list) and below and rng.random() < 0.7:
            value = below
            continue
        value[key] = rng.choice(_VALUES)
        return


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# --- pods ------------------------------------------------------------------------------------------------------------

_PATHS = (
    "/",
    "//",
    "/.",
    "/proc/self",
    "/dev",
    "/dev/termination-log",
    "/a/../..",
    "/etc/hosts",
    "/\u00fc \n",
    "/x" * 500,
)
_TEXTS = ("", " ", "\n", "$(", "$()", "$($(X))", "$$$$", "\u202e", "\x7f", "a=b", "-" * 5000, "\ud7ff", "'\"`", "%s%n")


def pod_spec(rng: random.Random, image: str) -> dict[str, Any]:
    """A spec that the API server may take; what it refuses is none of the node's business."""
    container: dict[str, Any] = {
        "name": "main",
        "image": rng.choice((image, image, image, rng.choice(_TEXTS) or "x", image + "@sha256:" + "0" * 64)),
        "args": [rng.choice((*_TEXTS, "say x", "exit 3", "trap")) for _ in range(rng.randrange(4))],
        "env": [{"name": rng.choice(("A", "a.b", "PATH", "LD_PRELOAD")), "value": rng.choice(_TEXTS)}],
        "volumeMounts": [
            {"name": rng.choice(("v", "w")), "mountPath": rng.choice(_PATHS), "readOnly": rng.random() < 0.3}
            for _ in range(rng.randrange(3))
        ],
    }
    if rng.random() < 0.3:
        container["workingDir"] = rng.choice(_PATHS)
    if rng.random() < 0.3:
        container["terminationMessagePath"] = rng.choice(_PATHS)
    if rng.random() < 0.3:
        key = rng.choice(("subPath", "subPathExpr"))
        for mount in container["volumeMounts"]:
            mount[key] = rng.choice(("a", "a/b/c", "$(A)", "a" * 300, "\u00fc", "a//b", "$(NONE)", "./a"))
    if rng.random() < 0.2:
        container["command"] = [rng.choice(_TEXTS)]
    if rng.random() < 0.2:
        container["resources"] = {"limits": {"memory": rng.choice(("1", "1Ki", "100Mi", "1Ei"))}}
    if rng.random() < 0.2:
        probe = {"exec": {"command": [rng.choice((*_TEXTS, "t"))]}, "periodSeconds": 1}
        container[rng.choice(("livenessProbe", "readinessProbe", "startupProbe"))] = probe
    volumes: list[dict[str, Any]] = [
        rng.choice(
            (
                {"emptyDir": {}},
                {"emptyDir": {"medium": "Memory", "sizeLimit": "1"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "a/b/c"}]}},
                {"downwardAPI": {"items": [{"path": "a", "fieldRef": {"fieldPath": "metadata.annotations"}}]}},
                {"hostPath": {"path": rng.choice(("/proc/self/mem", "/dev/zero", "/nonexistent", "/dev/null"))}},
            )
        )
        for _ in range(2)
    ]
    return {
        "restartPolicy": rng.choice(("Never", "Never", "Always", "OnFailure")),
        "terminationGracePeriodSeconds": rng.choice((0, 1, 2**31)),
        "volumes": [{"name": name, **volume} for name, volume in zip(("v", "w"), volumes, strict=True)],
        "containers": [container],
    }


def odd_annotations(rng: random.Random) -> dict[str, str]:
    """What nodes read of them, wrongly filled in."""
    if rng.random() < 0.7:
        return {"note": rng.choice(_TEXTS)}
    return {
        "alpha.wasi.krustlet.dev/allowed-domains": rng.choice(("[", "[1]", '["http://"]', "{}", '["*"]', "[" * 5000)),
        "alpha.wasi.krustlet.dev/max-concurrent-requests": rng.choice(("-1", "9" * 5000, "1e3", "\u0661")),
    }
