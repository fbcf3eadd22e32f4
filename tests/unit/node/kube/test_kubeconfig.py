from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node.kube.kubeconfig import (
    BOOTSTRAP_CONTEXT,
    CLIENT_CA_EXTENSION,
    Cluster,
    Credentials,
    KubeconfigError,
    load,
    load_cluster,
    parse,
    render_node_kubeconfig,
)

pytestmark = pytest.mark.unit

CA = "-----BEGIN CERTIFICATE-----\nc2VydmVy\n-----END CERTIFICATE-----\n"
CLIENT_CA = "-----BEGIN CERTIFICATE-----\nY2xpZW50\n-----END CERTIFICATE-----\n"
KEY = "-----BEGIN PRIVATE KEY-----\na2V5\n-----END PRIVATE KEY-----\n"


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def bootstrap(**cluster: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "kubernetes", "cluster": {"server": "https://192.0.2.10:6443/", **cluster}}],
        "users": [{"name": "tls-bootstrap-token-user", "user": {"token": "abcdef.0123456789abcdef"}}],
        "contexts": [
            {"name": BOOTSTRAP_CONTEXT, "context": {"cluster": "kubernetes", "user": "tls-bootstrap-token-user"}}
        ],
        "current-context": BOOTSTRAP_CONTEXT,
    }


def write(folder: Path, document: object) -> Path:
    path = folder / "bootstrap.conf"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_bootstrap_file_gives_server_token_and_both_authorities(tmp_path: Path) -> None:
    extension = {"apiVersion": "wasilet.dev/v1", "kind": "ClientCA", "certificate-authority-data": b64(CLIENT_CA)}
    document = bootstrap(
        **{
            "certificate-authority-data": b64(CA),
            "extensions": [{"name": "other", "extension": {}}, {"name": CLIENT_CA_EXTENSION, "extension": extension}],
        }
    )

    config = load(write(tmp_path, document))

    assert config.cluster == Cluster(server="https://192.0.2.10:6443", ca_data=CA, client_ca_data=CLIENT_CA)
    assert config.credentials.token == "abcdef.0123456789abcdef"


def test_a_credential_is_never_shown_by_repr() -> None:
    shown = repr(Credentials(token="secret-token", certificate=CA, key=KEY))
    assert "secret-token" not in shown
    assert "PRIVATE" not in shown


def test_file_names_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text(CA)
    (tmp_path / "client.pem").write_text(CA + KEY)
    document = bootstrap(**{"certificate-authority": "ca.crt"})
    document["users"][0]["user"] = {"client-certificate": "client.pem", "client-key": "client.pem"}

    config = load(write(tmp_path, document))

    assert config.cluster.ca_data == CA
    assert config.credentials.key == CA + KEY


def test_a_file_that_others_can_read_is_used_but_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, bootstrap())
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        load(path)
    assert f"chmod 600 {path}" in caplog.text
    assert "0123456789abcdef" not in caplog.text


def _without(key: str) -> dict[str, Any]:
    document = bootstrap()
    del document[key]
    return document


def _user(**user: Any) -> dict[str, Any]:
    document = bootstrap()
    document["users"][0]["user"] = user
    return document


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ([], "not a mapping"),
        ("text", "not a mapping"),
        ({**bootstrap(), "kind": "Pod"}, "kind is 'Pod'"),
        ({**bootstrap(), "current-context": "other"}, "'other' is not among its contexts"),
        (_without("users"), "names user 'tls-bootstrap-token-user', which is not there"),
        (_without("clusters"), "names cluster 'kubernetes', which is not there"),
        ({**bootstrap(), "users": "x"}, "users is not a list"),
        (bootstrap(server="http://192.0.2.10:8080"), "never sent in the clear"),
        (bootstrap(server="file:///etc/passwd"), "not an https:// address"),
        (bootstrap(server=5), "server is not text"),
        (bootstrap(**{"certificate-authority-data": "%%%"}), "not base64"),
        (bootstrap(**{"certificate-authority-data": b64("no pem")}), "not PEM"),
        (bootstrap(**{"certificate-authority": "missing.crt"}), "cannot read"),
        (
            bootstrap(**{"insecure-skip-tls-verify": True, "certificate-authority-data": b64(CA)}),
            "both insecure-skip-tls-verify and a certificate authority",
        ),
        (bootstrap(extensions=[{"name": CLIENT_CA_EXTENSION, "extension": {}}]), "no certificate-authority-data"),
        (_user(exec={"command": "/bin/evil"}), "'exec', which runs a command"),
        (_user(**{"auth-provider": {"name": "gcp"}}), "'auth-provider', which needs a plugin"),
        (_user(username="admin", password="x"), "'username'"),
        (_user(), "neither a token nor a client certificate"),
        (_user(token="two words"), "characters that no token has"),
        (_user(token="a\r\nX-Evil: 1"), "characters that no token has"),
        (_user(**{"client-certificate-data": b64(CA)}), "one is missing"),
        (
            _user(
                **{
                    "client-certificate-data": b64(CA),
                    "client-key-data": b64(KEY.replace("PRIVATE", "ENCRYPTED PRIVATE")),
                }
            ),
            "encrypted",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, document: object, complaint: str) -> None:
    path = write(tmp_path, document)
    with pytest.raises(KubeconfigError) as caught:
        load(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KubeconfigError, match=r"bootstrap\.conf: No such file"):
        load(tmp_path / "bootstrap.conf")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.write_bytes(b"a" * (1024 * 1024 + 1))
    with pytest.raises(KubeconfigError, match="larger than"):
        load(path)


def test_tags_that_make_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.conf"
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(KubeconfigError, match="not YAML"):
        load(path)


def test_the_nodes_own_kubeconfig_says_where_the_cluster_is_without_its_certificate(tmp_path: Path) -> None:
    cluster = Cluster(
        server="https://192.0.2.10:6443",
        ca_data=CA,
        tls_server_name="kubernetes",
        proxy_url="http://192.0.2.1:3128",
        client_ca_data=CLIENT_CA,
    )
    path = tmp_path / "kubeconfig"
    path.touch(mode=0o600)
    path.write_bytes(render_node_kubeconfig(cluster, node_name="n1", pair_path=tmp_path / "client.pem"))

    assert load_cluster(path) == cluster
    (tmp_path / "client.pem").write_text(CA + KEY)
    assert load(path).credentials.certificate == CA + KEY


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(
            ["clusters", "users", "contexts", "current-context", "name", "cluster", "user", "context", "server",
             "extensions", "extension", "token", "kind"]
        ),
        inner, max_size=5,
    ),
    max_leaves=30,
).map(lambda value: yaml.safe_dump(value).encode()))  # fmt: skip
def test_hostile_files_only_ever_raise_the_one_error(data: bytes) -> None:
    try:
        parse(data, origin=Path("/nonexistent/bootstrap.conf"))
    except KubeconfigError:
        pass
