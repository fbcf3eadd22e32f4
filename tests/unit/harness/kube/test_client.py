"""The small client: kubeconfigs as kubectl reads them, refusals with the server's own words, and no hanging."""

from __future__ import annotations

import base64
import datetime as dt
import http.server
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.errors import ApiError, UsageError
from wasilet.kube.client import Kube, api_path
from wasilet.kube.credentials import Credentials, read_credentials

pytestmark = pytest.mark.unit


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; remembers what it was asked."""

    protocol_version = "HTTP/1.1"
    server: Server

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.server.seen.append((self.command, self.path, dict(self.headers), self.rfile.read(length)))
        status, body = self.server.answers.get(self.path.partition("?")[0], (404, {"message": "not found"}))
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        if self.path.endswith("/hang-up"):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, Any]] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def kube(server: Server) -> Iterator[Kube]:
    client = Kube(Credentials(server=f"http://127.0.0.1:{server.server_port}/prefix", token="t0ken"))
    yield client
    client.close()


def test_requests_carry_prefix_token_and_json(kube: Kube, server: Server) -> None:
    server.answers["/prefix/api/v1/namespaces"] = (201, {"kind": "Namespace"})
    assert kube.create("/api/v1/namespaces", {"a": 1}) == {"kind": "Namespace"}
    ((verb, path, headers, body),) = server.seen
    assert (verb, path, json.loads(body)) == ("POST", "/prefix/api/v1/namespaces", {"a": 1})
    assert headers["Authorization"] == "Bearer t0ken"


def test_what_has_no_form_in_json_is_one_clear_error(kube: Kube, server: Server) -> None:
    with pytest.raises(UsageError, match="the object is no JSON: Object of type date is not JSON serializable"):
        kube.create("/api/v1/pods", {"metadata": {"annotations": {"built": dt.date(2026, 1, 2)}}})
    assert server.seen == []


def test_a_refusal_has_the_servers_own_words(kube: Kube, server: Server) -> None:
    server.answers["/prefix/x"] = (403, {"message": "pods is forbidden", "reason": "Forbidden"})
    with pytest.raises(ApiError, match="pods is forbidden") as caught:
        kube.get("/x")
    assert (caught.value.code, caught.value.reason) == (403, "Forbidden")


def test_an_answer_that_is_no_json_is_still_told(kube: Kube, server: Server) -> None:
    server.answers["/prefix/x"] = (503, b"etcd is away")
    with pytest.raises(ApiError, match="etcd is away"):
        kube.get("/x")


def test_what_is_not_there_is_none_not_an_error(kube: Kube) -> None:
    assert kube.find("/missing") is None
    assert kube.delete("/missing") is False
    assert kube.ready() is False


def test_a_connection_that_the_server_closed_is_opened_again(kube: Kube, server: Server) -> None:
    server.answers["/prefix/hang-up"] = server.answers["/prefix/x"] = (200, {"n": 1})
    assert kube.get("/hang-up") == kube.get("/x") == {"n": 1}


def test_nobody_there_is_one_clear_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ApiError, match=f"127.0.0.1:{port} gave no answer") as caught:
        Kube(Credentials(server=f"http://127.0.0.1:{port}")).get("/x")
    assert caught.value.code == 0


def test_a_server_that_never_answers_is_not_waited_for() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        kube = Kube(Credentials(server=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        with pytest.raises(ApiError, match="no answer in time"):
            kube.create("/x", {}, timeout_seconds=0.2)


def test_a_watch_ends_when_the_server_ends_it_and_raises_when_refused(kube: Kube, server: Server) -> None:
    lines = b"".join(json.dumps({"type": kind, "object": {}}).encode() + b"\n" for kind in ("ADDED", "BOOKMARK"))
    server.answers["/prefix/watched"] = (200, lines)
    with kube.watch("/watched", timeout_seconds=5, fieldSelector="a=b") as events:
        assert [event["type"] for event in events] == ["ADDED", "BOOKMARK"]
    assert "watch=true" in server.seen[0][1]
    assert "fieldSelector=a%3Db" in server.seen[0][1]
    server.answers["/prefix/old"] = (410, {"message": "too old", "reason": "Expired"})
    with pytest.raises(ApiError, match="too old"), kube.watch("/old"):
        pass


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kind_plural": "nodes", "name": "a"}, "/api/v1/nodes/a"),
        (
            {"kind_plural": "clusterroles", "name": "a:b/c", "group": "rbac.authorization.k8s.io"},
            "/apis/rbac.authorization.k8s.io/v1/clusterroles/a%3Ab%2Fc",
        ),
        (
            {"kind_plural": "pods", "namespace": "n", "name": "p", "sub": "status"},
            "/api/v1/namespaces/n/pods/p/status",
        ),
    ],
)
def test_paths_are_built_and_quoted(arguments: dict[str, str], expected: str) -> None:
    assert api_path(**arguments) == expected


# --- kubeconfigs -----------------------------------------------------------------------------------------------------


def config(folder: Path, *, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None) -> Path:
    path = folder / "config"
    data = {
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1", **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(yaml.safe_dump(data))
    return path


def test_embedded_data_and_relative_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(b"CA")
    (tmp_path / "token").write_text("from-file\n")
    path = config(
        tmp_path,
        cluster={"certificate-authority": "ca.pem", "tls-server-name": "other"},
        user={"client-certificate-data": base64.b64encode(b"CRT").decode(), "tokenFile": "token"},
    )
    credentials = read_credentials(path)
    assert (credentials.ca, credentials.certificate, credentials.token) == (b"CA", b"CRT", "from-file")
    assert (credentials.server_name, credentials.verify) == ("other", True)


def test_a_credential_plugin_is_asked(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin"
    answer = json.dumps({"status": {"token": "from-plugin"}})
    plugin.write_text(
        f"#!/bin/sh\n[ \"$1 $MODE\" = 'get ci' ] && [ -n \"$KUBERNETES_EXEC_INFO\" ] && echo '{answer}'\n"
    )
    plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    user = {"exec": {"command": str(plugin), "args": ["get"], "env": [{"name": "MODE", "value": "ci"}]}}
    assert read_credentials(config(tmp_path, user=user)).token == "from-plugin"
    assert "MODE" not in os.environ


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("a: [", "is not YAML"),
        ("current-context: nowhere\ncontexts: [{name: a}, {name: b}]\n", "its contexts: a, b"),
        ("current-context: ''\n", "no context ''"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_says_why(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_credentials(path)
    assert expected in str(caught.value)


def test_certificates_that_are_none_are_told_before_any_request(tmp_path: Path) -> None:
    path = config(tmp_path, cluster={"certificate-authority-data": base64.b64encode(b"rubbish").decode()})
    with pytest.raises(UsageError, match="cannot be used"):
        Kube.from_kubeconfig(path).get("/x")


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="is no address"):
        Kube(Credentials(server="ftp://x"))
