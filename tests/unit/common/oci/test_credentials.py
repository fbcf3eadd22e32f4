"""Pull secrets: what is read from them, what fits which image, and that nothing of them shows."""

from __future__ import annotations

import base64
import json
import logging
from typing import Any

import pytest
from wasilet_common.oci.credentials import from_secrets, matching
from wasilet_common.oci.reference import parse

from tests.unit.node.images.fakes import credential

pytestmark = pytest.mark.unit


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def secret(document: Any, kind: str = "kubernetes.io/dockerconfigjson", name: str = "pull") -> dict[str, Any]:
    key = {"kubernetes.io/dockercfg": ".dockercfg"}.get(kind, ".dockerconfigjson")
    text = document if isinstance(document, str) else json.dumps(document)
    return {"type": kind, "metadata": {"namespace": "ns", "name": name}, "data": {key: b64(text)}}


def test_both_kinds_of_secret_and_all_forms_of_an_entry_are_read() -> None:
    auths = {
        "https://index.docker.io/v1/": {"username": "a", "password": "b", "email": "c"},
        "ghcr.io": {"auth": b64("user:pass:word")},
        "x.azurecr.io": {"auth": b64("00000000:"), "identitytoken": "identity"},
    }
    found = from_secrets(
        [secret({"auths": auths}), secret({"quay.io": {"auth": b64("q:r")}}, "kubernetes.io/dockercfg")]
    )
    assert found == (
        credential("https://index.docker.io/v1/", "a", "b"),
        credential("ghcr.io", "user", "pass:word"),
        credential("x.azurecr.io", "00000000", "", "identity"),
        credential("quay.io", "q", "r"),
    )


@pytest.mark.parametrize(
    "document",
    [
        "not json SECRET",
        "[]",
        {"auths": []},
        {"auths": {"x": "SECRET"}},
        {"auths": {"x": {"auth": "%%%SECRET"}}},
        {"auths": {"x": {"auth": b64("no-colon-SECRET")}}},
        {"auths": {"x": {"username": 7, "password": "SECRET"}}},
        "[" * 100_000,
    ],
)
def test_a_broken_secret_is_named_and_not_shown(document: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert from_secrets([secret(document), secret({"auths": {"y": {"auth": b64("u:p")}}})]) == (
            credential("y", "u", "p"),
        )
    assert "the pull secret ns/pull is not a valid docker config" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    "other",
    [{"type": "Opaque", "data": {".dockerconfigjson": b64("{}")}}, {}, {"type": "kubernetes.io/dockercfg"}],
)
def test_other_secrets_are_passed_over_in_silence(other: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert from_secrets([other]) == ()
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "image", "fits"),
    [
        ("ghcr.io", "ghcr.io/a/b", True),
        ("ghcr.io/a", "ghcr.io/a/b", True),
        ("ghcr.io/b", "ghcr.io/a/b", False),
        ("https://ghcr.io/v2/", "ghcr.io/a/b", True),
        ("http://ghcr.io/", "ghcr.io/a/b", True),
        ("ghcr.io:443", "ghcr.io/a", False),
        ("localhost:5000", "localhost:5000/a", True),
        ("localhost", "localhost:5000/a", False),
        ("*.dkr.ecr.*.amazonaws.com", "1234.dkr.ecr.eu-west-1.amazonaws.com/a", True),
        ("*.io", "ghcr.io/a", True),
        ("*.io", "x.ghcr.io/a", False),
        ("*", "ghcr.io/a", False),
        ("evil-ghcr.io", "ghcr.io/a", False),
        ("[::1]:5000", "[::1]:5000/a", True),
        ("https://index.docker.io/v1/", "hello", True),
        ("docker.io", "user/hello", True),
        ("index.docker.io", "ghcr.io/a", False),
    ],
)
def test_a_key_fits_as_kubelets_does(key: str, image: str, *, fits: bool) -> None:
    assert bool(matching(parse(image), [credential(key, "u", "p")])) is fits


def test_the_most_specific_key_comes_first_and_the_pods_order_decides_among_equals() -> None:
    wide, narrow, second = (
        credential("ghcr.io", "wide"),
        credential("ghcr.io/a", "narrow"),
        credential("ghcr.io", "2nd"),
    )
    assert matching(parse("ghcr.io/a/b"), [wide, second, narrow]) == (narrow, wide, second)


def test_an_entry_without_a_user_is_of_no_use() -> None:
    assert matching(parse("ghcr.io/a"), [credential("ghcr.io"), credential("ghcr.io", "", "", "token")]) == (
        credential("ghcr.io", "", "", "token"),
    )
