"""Bootstrap tokens and the file that carries one."""

from __future__ import annotations

import base64
import datetime as dt
import re
from pathlib import Path

import pytest
import yaml
from wasilet.errors import ApiError, StateError, UsageError
from wasilet.kube.bootstrap_token import (
    Token,
    bootstrap_config,
    create_token,
    delete_token,
    hand_over,
    list_tokens,
    new_token,
    usable_token,
    write_bootstrap_file,
)
from wasilet.kube.manifests import create_missing, missing_objects, object_path, render_objects

from tests.unit.harness.fake_kube import FakeKube

pytestmark = pytest.mark.unit


@pytest.fixture
def kube() -> FakeKube:
    return FakeKube()


def test_a_token_has_the_form_kubernetes_wants_and_is_never_the_same() -> None:
    tokens = {new_token().text for _ in range(200)}
    assert len(tokens) == 200
    assert all(re.fullmatch(r"[a-z0-9]{6}\.[a-z0-9]{16}", text) for text in tokens)


def test_a_token_does_not_print_its_secret() -> None:
    token = new_token()
    assert token.secret not in repr(token)


def test_the_secret_is_what_kubeadm_makes(kube: FakeKube) -> None:
    token = create_token(kube, ttl_seconds=3600)
    secret = kube.objects[f"/api/v1/namespaces/kube-system/secrets/bootstrap-token-{token.id}"]
    assert secret["type"] == "bootstrap.kubernetes.io/token"
    data = secret["stringData"]
    assert (data["token-id"], data["token-secret"]) == (token.id, token.secret)
    assert data["usage-bootstrap-authentication"] == data["usage-bootstrap-signing"] == "true"
    assert data["auth-extra-groups"] == "system:bootstrappers:kubeadm:default-node-token"
    left = dt.datetime.fromisoformat(data["expiration"]) - dt.datetime.now(dt.UTC)
    assert dt.timedelta(minutes=59) < left <= dt.timedelta(hours=1)


def test_a_list_tells_no_secret(kube: FakeKube) -> None:
    token = create_token(kube, ttl_seconds=3600)
    (info,) = list_tokens(kube)
    assert info.id == token.id
    assert token.secret not in repr(info)
    assert 3500 < info.seconds_left <= 3600


def test_tokens_are_deleted_by_id_only(kube: FakeKube) -> None:
    token = create_token(kube, ttl_seconds=3600)
    with pytest.raises(UsageError):
        delete_token(kube, "../../configmaps/x")
    assert delete_token(kube, token.id)
    assert not delete_token(kube, token.id)


def test_the_file_is_a_kubeconfig_with_the_client_authority(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.conf"
    token = Token("abcdef", "0123456789abcdef")
    config = bootstrap_config(server="https://127.0.0.1:6443", ca=b"server CA", client_ca=b"client CA", token=token)
    write_bootstrap_file(path, config)
    assert path.stat().st_mode & 0o777 == 0o600
    data = yaml.safe_load(path.read_text())
    assert data["current-context"] == "tls-bootstrap-token-user@kubernetes"
    assert data["users"] == [{"name": "tls-bootstrap-token-user", "user": {"token": "abcdef.0123456789abcdef"}}]
    (extension,) = data["clusters"][0]["cluster"]["extensions"]
    assert extension == {
        "name": "wasilet.dev/client-ca",
        "extension": {
            "apiVersion": "wasilet.dev/v1",
            "kind": "ClientCA",
            "certificate-authority-data": base64.b64encode(b"client CA").decode(),
        },
    }


def test_a_token_whose_file_cannot_be_written_is_taken_back(kube: FakeKube, tmp_path: Path) -> None:
    token = create_token(kube, ttl_seconds=60)
    with pytest.raises(StateError, match="cannot write"):
        hand_over(kube, token, tmp_path / "nowhere" / "bootstrap.conf", {})
    assert list_tokens(kube) == []
    hand_over(kube, create_token(kube, ttl_seconds=60), tmp_path / "bootstrap.conf", {})
    assert len(list_tokens(kube)) == 1


def test_the_node_reads_what_the_harness_writes(tmp_path: Path) -> None:
    from wasilet_node.kube.kubeconfig import load

    path = tmp_path / "bootstrap.conf"
    token = Token("abcdef", "0123456789abcdef")
    server_ca, client_ca = (f"-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n" for name in ("a", "b"))
    write_bootstrap_file(
        path,
        bootstrap_config(
            server="https://127.0.0.1:6443", ca=server_ca.encode(), client_ca=client_ca.encode(), token=token
        ),
    )
    loaded = load(path)
    assert loaded.cluster.server == "https://127.0.0.1:6443"
    assert (loaded.cluster.ca_data, loaded.cluster.client_ca_data) == (server_ca, client_ca)
    assert loaded.credentials.token == token.text
    assert "0123456789abcdef" not in repr(loaded)


def test_a_file_is_used_again_only_when_all_of_it_is_still_right(kube: FakeKube, tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.conf"
    right = {"server": "https://127.0.0.1:6443", "ca": b"CA", "client_ca": b"CA"}
    assert usable_token(kube, path, **right) is None  # type: ignore[arg-type]
    token = create_token(kube, ttl_seconds=3600)
    write_bootstrap_file(path, bootstrap_config(**right, token=token))  # type: ignore[arg-type]
    assert usable_token(kube, path, **right) is not None  # type: ignore[arg-type]
    for wrong in ({"server": "https://127.0.0.1:1"}, {"ca": b"other"}, {"client_ca": None}):
        assert usable_token(kube, path, **{**right, **wrong}) is None  # type: ignore[arg-type]
    delete_token(kube, token.id)
    assert usable_token(kube, path, **right) is None  # type: ignore[arg-type]
    short = create_token(kube, ttl_seconds=300)
    write_bootstrap_file(path, bootstrap_config(**right, token=short))  # type: ignore[arg-type]
    assert usable_token(kube, path, **right) is None, "it would expire before the node has joined"  # type: ignore[arg-type]


def test_only_missing_objects_are_created(kube: FakeKube) -> None:
    objects = render_objects("bootstrap-rbac.yaml.j2") + render_objects("approver-rbac.yaml.j2")
    assert len(missing_objects(kube, objects)) == len(objects) == 7
    first, *_ = objects
    kube.objects[object_path(first)] = {"kept": True}
    assert len(create_missing(kube, objects)) == 6
    assert kube.objects[object_path(first)] == {"kept": True}
    assert create_missing(kube, objects) == []


def test_a_service_whose_address_is_its_own_is_there(kube: FakeKube) -> None:
    """The API server finds the fixed address taken before it finds the Service."""
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"}}
    kube.refusals["POST"] = ApiError("spec.clusterIPs: provided IP is already allocated", code=422)
    with pytest.raises(ApiError, match="already allocated"):
        create_missing(kube, [service])
    kube.objects[object_path(service)] = service
    assert create_missing(kube, [service]) == []


def test_no_value_breaks_out_of_a_template() -> None:
    nasty = 'x"\n  evil: "yes'
    (secret,) = render_objects(
        "bootstrap-token.yaml.j2", token_id="abcdef", token_secret=nasty, expiration="e", description="{{ 1 }} # '"
    )
    assert secret["stringData"]["token-secret"] == nasty
    assert "evil" not in secret["stringData"]


def test_the_approvers_role_is_the_least() -> None:
    role = next(o for o in render_objects("approver-rbac.yaml.j2") if o["kind"] == "ClusterRole")
    assert sorted((r["resources"][0], tuple(r["verbs"]), tuple(r.get("resourceNames", ()))) for r in role["rules"]) == [
        ("certificatesigningrequests", ("get", "list", "watch"), ()),
        ("certificatesigningrequests/approval", ("update",), ()),
        ("nodes", ("get",), ()),
        ("signers", ("approve",), ("kubernetes.io/kubelet-serving",)),
    ]
    _, addresses = (o for o in render_objects("approver-rbac.yaml.j2") if o["kind"] == "ClusterRole")
    rules = addresses["rules"]
    assert sorted((r["resources"][0], tuple(r["verbs"]), tuple(r.get("resourceNames", ()))) for r in rules) == [
        ("endpointslices", ("get",), ("kubernetes",)),
        ("nodes", ("list",), ()),
        ("servicecidrs", ("list",), ()),
        ("services", ("get",), ("kubernetes",)),
    ]
