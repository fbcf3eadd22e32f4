"""Image references: what kubelet accepts, and what it refuses in which words."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasilet_common.oci.reference import InvalidReferenceError, Reference, is_digest, is_loopback, parse

pytestmark = pytest.mark.unit

SHA = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "canonical", "host"),
    [
        ("hello", "docker.io/library/hello:latest", "registry-1.docker.io"),
        ("user/hello:1.0", "docker.io/user/hello:1.0", "registry-1.docker.io"),
        ("docker.io/hello", "docker.io/library/hello:latest", "registry-1.docker.io"),
        ("index.docker.io/hello", "docker.io/library/hello:latest", "registry-1.docker.io"),
        ("localhost/hello", "localhost/hello:latest", "localhost"),
        ("localhost:5000/hello:v1", "localhost:5000/hello:v1", "localhost:5000"),
        ("127.0.0.1:5000/a/b/c:v1", "127.0.0.1:5000/a/b/c:v1", "127.0.0.1:5000"),
        ("[::1]:5000/hello", "[::1]:5000/hello:latest", "[::1]:5000"),
        ("ghcr.io/a/b__c.d-e/f---g:T_a.g-1", "ghcr.io/a/b__c.d-e/f---g:T_a.g-1", "ghcr.io"),
        ("UPPER/hello", "UPPER/hello:latest", "UPPER"),
        (f"ghcr.io/a@{SHA}", f"ghcr.io/a@{SHA}", "ghcr.io"),
        (f"ghcr.io/a:v1@{SHA}", f"ghcr.io/a@{SHA}", "ghcr.io"),
        ("hello:5000", "docker.io/library/hello:5000", "registry-1.docker.io"),
    ],
)
def test_a_reference_is_made_canonical(text: str, canonical: str, host: str) -> None:
    reference = parse(text)
    assert str(reference) == canonical
    assert reference.host == host


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "@",
        "hello:",
        "hello@",
        "hello@sha256:abc",
        "hello@md5:" + "0" * 32,
        f"hello@{SHA.upper()}",
        f"hello@{SHA}0",
        "/hello",
        "hello/",
        "a//b",
        "-hello",
        "hello-",
        "a___b",
        "a..b/..",
        "../etc/passwd",
        "host.io/../x",
        "http://host.io/x",
        "host.io:0/x",
        "host.io:65536/x",
        "host.io:5000000000/x",
        "[::zz]/x",
        "[1:2:3]:5000/x",
        "host_name.io/x",
        "a" * 256,
        "hello:" + "a" * 129,
        "hello world",
        "hello\n",
        "héllo",
        "hello:v1\n",
        "x" + "\ud800",
        "0123456789abcdef" * 4,
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidReferenceError, match="couldn't parse image name"):
        parse(text)


def test_upper_case_in_the_repository_is_named_as_the_reason() -> None:
    with pytest.raises(
        InvalidReferenceError,
        match=r'parse image name "a/B": invalid reference format: repository name \(a/B\) must be lowercase$',
    ):
        parse("a/B")


def test_the_message_stays_on_one_line_and_encodes() -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        parse("a\nb\ud800\x1b[31m")
    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()


def test_a_digest_decides_over_a_tag() -> None:
    reference = parse(f"ghcr.io/a:v1@{SHA}")
    assert (reference.tag, reference.digest, reference.target) == ("v1", SHA, SHA)
    assert parse("ghcr.io/a").target == "latest"
    assert parse("ghcr.io/a:v1").at(SHA) == f"ghcr.io/a@{SHA}"


_component = st.from_regex(r"[a-z0-9]{1,8}(?:(?:\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
_registry = st.sampled_from(
    ["docker.io", "localhost", "localhost:5000", "ghcr.io", "[::1]:5000", "10.0.0.1:443", "Reg"]
)
_tag = st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
_digest = st.none() | st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)


@settings(max_examples=40, deadline=None)
@given(_registry, st.lists(_component, min_size=1, max_size=4), _tag, _digest)
def test_every_well_formed_reference_parses_into_its_parts(
    registry: str, path: list[str], tag: str | None, digest: str | None
) -> None:
    text = f"{registry}/{'/'.join(path)}{f':{tag}' if tag else ''}{f'@{digest}' if digest else ''}"
    reference = parse(text)
    assert reference.registry == registry
    assert reference.repository.removeprefix("library/") == "/".join(path).removeprefix("library/")
    assert reference.tag == (tag or (None if digest else "latest"))
    assert reference.digest == digest


@settings(max_examples=40, deadline=None)
@given(_registry, st.lists(_component, min_size=1, max_size=4), _tag, _digest)
def test_the_canonical_form_parses_to_itself(
    registry: str, path: list[str], tag: str | None, digest: str | None
) -> None:
    reference = Reference(registry=registry, repository="/".join(["x", *path]), tag=tag or "latest", digest=digest)
    assert str(parse(str(reference))) == str(reference)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="aA0.:/@-_[]sha256"))
def test_any_text_either_parses_or_is_refused(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidReferenceError:
        return
    assert str(parse(str(reference))) == str(reference)
    assert ".." not in reference.repository.split("/")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1", True),
        ("127.8.9.1:5000", True),
        ("[::1]:5000", True),
        ("localhost.evil.com", False),
        ("127.0.0.1.evil.com", False),
        ("10.0.0.1:5000", False),
        ("[fe80::1]:5000", False),
        ("ghcr.io", False),
        ("", False),
    ],
)
def test_loopback_is_this_machine_only(host: str, *, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_digests_are_those_that_can_be_verified() -> None:
    assert is_digest(SHA)
    assert is_digest("sha512:" + "0" * 128)
    assert not is_digest("sha256:" + "0" * 63)
    assert not is_digest("sha1:" + "0" * 40)
    assert not is_digest(SHA + "\n")


def test_the_harness_gets_references_without_the_heavy_imports() -> None:
    code = "import sys, wasilet_common.oci.reference; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"aiohttp", "wasmtime", "kubernetes", "asyncio", "oras"} & set(loaded)
