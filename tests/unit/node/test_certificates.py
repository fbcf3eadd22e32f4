from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from wasilet_common.files import write_private
from wasilet_node.certificates import Certificates, JoinError, Pace
from wasilet_node.certificates_csr import CLIENT_SIGNER, SERVING_SIGNER
from wasilet_node.certificates_store import (
    NodeNames,
    Pair,
    key_to_pem,
    load_pair,
    make_pair,
    new_key,
    save_pair,
    self_signed,
)
from wasilet_node.kube.base import ApiStatusError
from wasilet_node.kube.client import KubeClient

from tests.unit.node.certificates_rig import FakeCluster, fake_cluster

pytestmark = pytest.mark.unit

NAMES = NodeNames(dns=frozenset({"n1"}), ips=frozenset({"192.0.2.7"}))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    async with fake_cluster(tmp_path) as cluster:
        yield cluster


PACE = Pace(first_retry_seconds=0.05, refused_token_seconds=0.3, after_refusal_seconds=0.05)


def certificates(data: Path, bootstrap: Path | None, **more: Any) -> Certificates:
    return Certificates(
        node_name="n1",
        pki=data / "pki",
        kubeconfig=data / "kubeconfig",
        bootstrap_file=bootstrap,
        user_agent="test",
        **{"pace": PACE, **more},
    )


@asynccontextmanager
async def joined(made: Certificates) -> AsyncIterator[KubeClient]:
    kube = await made.join()
    try:
        yield kube
    finally:
        await kube.close()


@asynccontextmanager
async def running(made: Certificates, on_serving: Callable[[Pair], None] = lambda _: None) -> AsyncIterator[KubeClient]:
    async with joined(made) as kube:
        task = asyncio.create_task(made.run(on_serving=on_serving))
        try:
            yield kube
        finally:
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(outcome, asyncio.CancelledError), outcome


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.01)


def decoded(request: dict[str, Any]) -> x509.CertificateSigningRequest:
    return x509.load_pem_x509_csr(base64.b64decode(request["spec"]["request"]))


async def test_a_token_becomes_a_client_certificate_of_the_node(cluster: FakeCluster, tmp_path: Path) -> None:
    made = certificates(tmp_path, cluster.bootstrap(tmp_path))
    async with joined(made) as kube:
        with pytest.raises(ApiStatusError) as caught:
            await kube.get("/api/v1/nodes/n1")
    assert caught.value.code == 404

    (request,) = cluster.of("client")
    assert request["spec"]["usages"] == ["digital signature", "client auth"]
    assert decoded(request).subject.rfc4514_string() == "CN=system:node:n1,O=system:nodes"
    assert len(list(decoded(request).extensions)) == 0
    assert cluster.users == ["bootstrap"]

    pair = load_pair(made.client_path)
    assert pair is not None
    assert pair.common_name == "system:node:n1"
    assert made.client_path.stat().st_mode & 0o777 == 0o600
    assert made.client_path.parent.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "pki" / "client.pending.json").exists()


async def test_a_restart_with_a_valid_certificate_asks_for_nothing_and_needs_no_file(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    bootstrap = cluster.bootstrap(tmp_path)
    async with joined(certificates(tmp_path, bootstrap)):
        pass
    bootstrap.unlink()
    async with joined(certificates(tmp_path, bootstrap)):
        pass
    async with joined(certificates(tmp_path, None)):
        pass
    assert len(cluster.requests) == 1


async def test_an_api_server_that_is_away_does_not_hold_up_a_node_with_a_certificate(tmp_path: Path) -> None:
    async with fake_cluster(tmp_path) as cluster, joined(certificates(tmp_path, cluster.bootstrap(tmp_path))):
        pass
    async with asyncio.timeout(3), joined(certificates(tmp_path, tmp_path / "bootstrap.conf")):
        pass


async def test_an_expired_certificate_falls_back_to_the_bootstrap_file(cluster: FakeCluster, tmp_path: Path) -> None:
    bootstrap = cluster.bootstrap(tmp_path)
    async with joined(certificates(tmp_path, bootstrap)):
        pass
    later = datetime.now(UTC) + timedelta(hours=2)
    cluster.lifetime = timedelta(hours=9)
    async with joined(certificates(tmp_path, bootstrap, now=lambda: later)):
        pass
    assert cluster.users == ["bootstrap", "bootstrap"]


async def test_a_certificate_of_a_cluster_that_was_made_again_is_replaced(cluster: FakeCluster, tmp_path: Path) -> None:
    bootstrap = cluster.bootstrap(tmp_path)
    async with joined(certificates(tmp_path, bootstrap)):
        pass
    cluster.forget_clients = True
    async with joined(certificates(tmp_path, bootstrap)):
        pass
    assert cluster.users == ["bootstrap", "bootstrap"]


async def test_a_certificate_of_another_name_is_not_used(cluster: FakeCluster, tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    save_pair(tmp_path / "pki" / "client.pem", self_signed("other", NAMES))
    async with joined(certificates(tmp_path, cluster.bootstrap(tmp_path))):
        pass
    pair = load_pair(tmp_path / "pki" / "client.pem")
    assert pair is not None
    assert pair.common_name == "system:node:n1"


async def test_a_damaged_pair_is_replaced(
    cluster: FakeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki" / "client.pem").write_text("half of a certifi")
    async with joined(certificates(tmp_path, cluster.bootstrap(tmp_path))):
        pass
    assert "is damaged" in caplog.text
    assert len(cluster.requests) == 1


async def test_an_unknown_token_is_explained_within_seconds(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.token = "other.token"
    with pytest.raises(JoinError, match=r"bootstrap\.conf: it is unknown or has expired"):
        await certificates(tmp_path, cluster.bootstrap(tmp_path)).join()


async def test_a_token_that_arrives_late_is_waited_for(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.token = "not yet"
    joining = asyncio.create_task(certificates(tmp_path, cluster.bootstrap(tmp_path)).join())
    await asyncio.sleep(0.05)
    cluster.token = "abcdef.0123456789abcdef"
    await (await joining).close()


@pytest.mark.parametrize("has_flag", [True, False])
async def test_nothing_to_join_with_is_said(tmp_path: Path, *, has_flag: bool) -> None:
    bootstrap = tmp_path / "missing.conf" if has_flag else None
    with pytest.raises(JoinError, match=r"missing\.conf" if has_flag else "--bootstrap-file"):
        await certificates(tmp_path, bootstrap).join()


@pytest.mark.parametrize(("type_", "words"), [("Denied", "was denied"), ("Failed", "could not be signed")])
async def test_a_refused_request_ends_the_join_with_the_approvers_words(
    cluster: FakeCluster, tmp_path: Path, type_: str, words: str
) -> None:
    cluster.approve["client"] = False
    joining = asyncio.create_task(certificates(tmp_path, cluster.bootstrap(tmp_path)).join())
    request = await cluster.until("client", 1)
    await cluster.condition(request["metadata"]["name"], type_, "Policy", "not on my watch")
    with pytest.raises(JoinError, match=f"{words}: Policy: not on my watch"):
        await joining
    assert not (tmp_path / "pki" / "client.pending.json").exists()


async def test_a_restart_takes_up_the_pending_request(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.approve["client"] = False
    bootstrap = cluster.bootstrap(tmp_path)
    joining = asyncio.create_task(certificates(tmp_path, bootstrap).join())
    request = await cluster.until("client", 1)
    await until((tmp_path / "pki" / "client.pending.json").exists)
    joining.cancel()
    await asyncio.gather(joining, return_exceptions=True)
    assert (tmp_path / "pki" / "client.pending.json").stat().st_mode & 0o777 == 0o600

    await cluster.condition(request["metadata"]["name"], "Approved")
    async with joined(certificates(tmp_path, bootstrap)):
        pass
    assert len(cluster.requests) == 1


async def test_a_pending_request_of_that_name_that_is_not_ours_is_not_used(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.approve["client"] = False
    bootstrap = cluster.bootstrap(tmp_path)
    joining = asyncio.create_task(certificates(tmp_path, bootstrap).join())
    request = await cluster.until("client", 1)
    await until((tmp_path / "pki" / "client.pending.json").exists)
    joining.cancel()
    await asyncio.gather(joining, return_exceptions=True)

    request["metadata"]["uid"] = "somebody-elses"
    await cluster.condition(request["metadata"]["name"], "Approved")
    cluster.approve["client"] = True
    async with joined(certificates(tmp_path, bootstrap)):
        pass
    assert len(cluster.requests) == 2


async def test_a_request_that_is_deleted_while_pending_is_made_again(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.approve["client"] = False
    joining = asyncio.create_task(certificates(tmp_path, cluster.bootstrap(tmp_path)).join())
    request = await cluster.until("client", 1)
    await until((tmp_path / "pki" / "client.pending.json").exists)
    await asyncio.sleep(0.05)
    cluster.approve["client"] = True
    await cluster.delete(request["metadata"]["name"])
    await (await joining).close()
    assert cluster.users == ["bootstrap", "bootstrap"]


async def test_a_certificate_for_another_key_never_becomes_a_pair(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.approve["client"] = False
    joining = asyncio.create_task(certificates(tmp_path, cluster.bootstrap(tmp_path)).join())
    request = await cluster.until("client", 1)
    foreign = cluster.authority.request(new_key(), "system:node:n1")
    request["spec"]["request"] = base64.b64encode(foreign.public_bytes(serialization.Encoding.PEM)).decode()
    await cluster.condition(request["metadata"]["name"], "Approved")
    with pytest.raises(JoinError, match="for another key"):
        await joining
    assert not (tmp_path / "pki" / "client.pem").exists()


async def test_a_client_certificate_renews_itself_and_requests_go_on(cluster: FakeCluster, tmp_path: Path) -> None:
    shares = iter([0.0, 0.99, 0.99])
    made = certificates(tmp_path, cluster.bootstrap(tmp_path), renewal_share=lambda: next(shares))
    async with running(made) as kube:
        first = load_pair(made.client_path)
        await cluster.until("client", 2)
        await until(lambda: load_pair(made.client_path) != first)
        with pytest.raises(ApiStatusError):
            await kube.get("/api/v1/nodes/n1")
    assert cluster.users == ["bootstrap", "system:node:n1"]


async def test_a_401_while_running_means_joining_again(cluster: FakeCluster, tmp_path: Path) -> None:
    made = certificates(tmp_path, cluster.bootstrap(tmp_path))
    async with running(made):
        made.rejected()
        await asyncio.sleep(0.1)
        assert cluster.users == ["bootstrap"], "a rejection that is over must change nothing"
        cluster.forget_clients = True
        made.rejected()
        await cluster.until("client", 2)
    assert cluster.users == ["bootstrap", "bootstrap"]


async def test_the_serving_certificate_is_for_the_names_of_the_node(cluster: FakeCluster, tmp_path: Path) -> None:
    served: list[Pair] = []
    made = certificates(tmp_path, cluster.bootstrap(tmp_path))
    async with running(made, served.append):
        made.set_names(NAMES)
        await until(lambda: served)

    (request,) = cluster.of("serving")
    assert request["spec"]["signerName"] == SERVING_SIGNER != CLIENT_SIGNER
    assert request["spec"]["usages"] == ["digital signature", "server auth"]
    assert decoded(request).subject.rfc4514_string() == "CN=system:node:n1,O=system:nodes"
    assert cluster.users == ["bootstrap", "system:node:n1"]
    assert served[0].names == NAMES
    assert load_pair(made.serving_path) == served[0]


async def test_no_serving_certificate_is_asked_for_before_the_node_has_addresses(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    async with running(certificates(tmp_path, cluster.bootstrap(tmp_path))):
        await asyncio.sleep(0.1)
    assert cluster.of("serving") == []


async def test_other_addresses_mean_another_serving_certificate(cluster: FakeCluster, tmp_path: Path) -> None:
    served: list[Pair] = []
    made = certificates(tmp_path, cluster.bootstrap(tmp_path))
    moved = NodeNames(dns=NAMES.dns, ips=frozenset({"192.0.2.8"}))
    async with running(made, served.append):
        made.set_names(NAMES)
        await until(lambda: len(served) == 1)
        made.set_names(NAMES)
        made.set_names(moved)
        await until(lambda: len(served) == 2)
    assert served[1].names == moved
    assert len(cluster.of("serving")) == 2


async def test_a_signer_with_a_mind_of_its_own_is_asked_once(
    cluster: FakeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served: list[Pair] = []
    cluster.names_signed = False
    made = certificates(tmp_path, cluster.bootstrap(tmp_path))
    async with running(made, served.append):
        made.set_names(NAMES)
        await until(lambda: served)
        await asyncio.sleep(0.1)
    assert len(cluster.of("serving")) == 1
    assert "the serving certificate is for nothing, though" in caplog.text


async def test_a_clock_that_is_ahead_does_not_flood_the_api_server_with_requests(
    cluster: FakeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = cluster.begin + cluster.lifetime * 0.95
    pace = replace(PACE, after_refusal_seconds=60.0)
    made = certificates(tmp_path, cluster.bootstrap(tmp_path), now=lambda: ahead, pace=pace)
    async with running(made):
        made.set_names(NAMES)
        await until(lambda: caplog.text.count("is a clock wrong?") == 2)
        await asyncio.sleep(0.1)
    assert len(cluster.of("client")) == 2
    assert len(cluster.of("serving")) == 1


async def test_other_addresses_while_a_request_waits_give_it_up(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.approve["serving"] = False
    served: list[Pair] = []
    made = certificates(tmp_path, cluster.bootstrap(tmp_path))
    moved = NodeNames(dns=NAMES.dns, ips=frozenset({"192.0.2.8"}))
    async with running(made, served.append):
        made.set_names(NAMES)
        await cluster.until("serving", 1)
        made.set_names(moved)
        second = await cluster.until("serving", 2)
        await cluster.condition(second["metadata"]["name"], "Approved")
        await until(lambda: served)
    assert [pair.names for pair in served] == [moved]


async def test_a_kept_serving_certificate_is_served_at_once_and_not_asked_for_again(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    bootstrap = cluster.bootstrap(tmp_path)
    served: list[Pair] = []
    made = certificates(tmp_path, bootstrap)
    async with running(made, served.append):
        made.set_names(NAMES)
        await until(lambda: served)

    again = certificates(tmp_path, bootstrap)
    async with running(again, served.append):
        assert again.serving_pair(NAMES) == served[0]
        again.set_names(NAMES)
        await asyncio.sleep(0.1)
    assert len(cluster.requests) == 2


async def test_until_it_is_approved_a_self_signed_certificate_is_served(tmp_path: Path) -> None:
    pair = certificates(tmp_path, None).serving_pair(NAMES)
    assert pair.names == NAMES
    assert pair.common_name == "n1 (self-signed)"
    assert pair.valid_at(datetime.now(UTC))


async def test_a_denied_serving_request_is_told_and_asked_again_later(
    cluster: FakeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.approve["serving"] = False
    made = certificates(tmp_path, cluster.bootstrap(tmp_path))
    async with running(made):
        made.set_names(NAMES)
        first = await cluster.until("serving", 1)
        await cluster.condition(first["metadata"]["name"], "Denied", "Policy", "no")
        await cluster.until("serving", 2)
    assert "was denied: Policy: no" in caplog.text


async def test_a_request_that_waits_says_how_to_approve_it(
    cluster: FakeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.approve["serving"] = False
    pace = replace(PACE, report_pending_seconds=0.01)
    made = certificates(tmp_path, cluster.bootstrap(tmp_path), pace=pace)
    async with running(made):
        made.set_names(NAMES)
        request = await cluster.until("serving", 1)
        await until(lambda: f"kubectl certificate approve {request['metadata']['name']}" in caplog.text)


async def test_the_client_ca_of_the_bootstrap_file_is_kept_and_goes_with_it(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    data = base64.b64encode(cluster.authority.pem.encode()).decode()
    extension = {"name": "wasilet.dev/client-ca", "extension": {"certificate-authority-data": data}}
    made = certificates(tmp_path, cluster.bootstrap(tmp_path, extensions=[extension]))
    async with joined(made):
        pass
    assert made.client_ca() == cluster.authority.pem
    async with joined(certificates(tmp_path, None)):
        assert made.client_ca() == cluster.authority.pem
    async with joined(certificates(tmp_path, cluster.bootstrap(tmp_path))):
        assert made.client_ca() is None


async def test_no_secret_is_ever_logged(cluster: FakeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made = certificates(tmp_path, cluster.bootstrap(tmp_path))
    async with running(made):
        made.set_names(NAMES)
        await until(made.serving_path.exists)
    assert "0123456789abcdef" not in caplog.text
    assert "PRIVATE KEY" not in caplog.text


def test_a_pair_that_does_not_match_is_refused() -> None:
    pair = self_signed("x", NAMES)
    with pytest.raises(ValueError, match="for another key"):
        make_pair(pair.certificate, key_to_pem(new_key()))


def test_a_pair_never_shows_its_key() -> None:
    assert "PRIVATE" not in repr(self_signed("x", NAMES))


def test_a_private_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_private(path, b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wasilet_common.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_private_file_is_private_even_under_a_loose_umask(tmp_path: Path) -> None:
    write_private(tmp_path / "file", b"x")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", ["", "nonsense", json.dumps({"name": "x"}), json.dumps({"name": "x", "uid": "y", "key": "z"})]
)
async def test_a_damaged_pending_file_is_no_obstacle(cluster: FakeCluster, tmp_path: Path, content: str) -> None:
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki" / "client.pending.json").write_text(content)
    async with joined(certificates(tmp_path, cluster.bootstrap(tmp_path))):
        pass
    assert len(cluster.requests) == 1
