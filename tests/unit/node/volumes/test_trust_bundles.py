"""clusterTrustBundle sources of projected volumes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.kube.base import ApiUnavailableError
from wasilet_node.kube.trust_bundles import TrustBundles
from wasilet_node.volumes.base import VolumeError

from tests.unit.node.volumes.rig import ReferenceKube, Rig, make_container, make_pod

pytestmark = pytest.mark.unit

PATH = "/apis/certificates.k8s.io/v1/clustertrustbundles"


def pem(name: str, *, line: int = 64) -> str:
    text = base64.b64encode(name.encode() * 20).decode()
    lines = [text[start : start + line] for start in range(0, len(text), line)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])


def put(kube: ReferenceKube, name: str, *certificates: str, signer: str = "", path: str = PATH, **labels: str) -> None:
    text = "".join(f"# a remark\n{certificate}" for certificate in certificates)
    made = kube.put(f"{path}/{name}", spec={"signerName": signer, "trustBundle": text})
    made["metadata"]["labels"] = labels


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    await rig.close()


def pod_with(**source: Any) -> dict[str, Any]:
    projected = {"sources": [{"clusterTrustBundle": {"path": "ca/bundle.pem", **source}}], "defaultMode": 0o644}
    return make_pod(
        volumes=[{"name": "v", "projected": projected}],
        containers=[make_container({"name": "v", "mountPath": "/v"})],
    )


async def bundle(rig: Rig, pod: dict[str, Any]) -> str:
    return Path((await rig.mounts(pod))["/v"].host, "ca", "bundle.pem").read_text()


async def test_a_bundle_by_its_name_is_normalized(rig: Rig) -> None:
    put(rig.kube, "mine", pem("b"), pem("a"), pem("a", line=60))
    put(rig.kube, "another", pem("c"))
    assert await bundle(rig, pod_with(name="mine")) == pem("a") + pem("b")


SIGNED: list[tuple[Any, str]] = [
    ({}, "abc"),
    ({"matchLabels": {"tier": "live"}}, "ab"),
    ({"matchLabels": {"tier": "live", "zone": "x"}}, "a"),
    ({"matchExpressions": [{"key": "tier", "operator": "In", "values": ["live", "old"]}]}, "ab"),
    ({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["live"]}]}, "c"),
    ({"matchExpressions": [{"key": "zone", "operator": "Exists"}]}, "a"),
    ({"matchExpressions": [{"key": "zone", "operator": "DoesNotExist"}]}, "bc"),
]


@pytest.mark.parametrize(("selector", "found"), SIGNED)
async def test_bundles_of_a_signer_by_their_labels(rig: Rig, selector: dict[str, Any], found: str) -> None:
    put(rig.kube, "s:1", pem("a"), signer="x.io/s", tier="live", zone="x")
    put(rig.kube, "s:2", pem("b"), signer="x.io/s", tier="live")
    put(rig.kube, "s:3", pem("c"), signer="x.io/s")
    put(rig.kube, "other", pem("d"), signer="y.io/s", tier="live", zone="x")
    pod = pod_with(signerName="x.io/s", labelSelector=selector)
    assert await bundle(rig, pod) == "".join(pem(name) for name in found)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"name": "gone"}, 'clustertrustbundle "gone" not found'),
        ({"signerName": "gone", "labelSelector": {}}, "matched zero ClusterTrustBundles"),
        ({"signerName": "x.io/s"}, "matched zero ClusterTrustBundles"),
    ],
    ids=["no such name", "no such signer", "without a selector nothing is meant"],
)
async def test_what_is_missing_is_named_unless_it_is_optional(rig: Rig, source: dict[str, Any], message: str) -> None:
    put(rig.kube, "s:1", pem("a"), signer="x.io/s")
    assert await bundle(rig, pod_with(**source, optional=True)) == ""
    with pytest.raises(VolumeError, match=message):
        await bundle(rig, {**pod_with(**source), "metadata": {**pod_with()["metadata"], "uid": "pod-2"}})


async def test_an_older_cluster_serves_them_by_an_older_version(rig: Rig) -> None:
    put(rig.kube, "mine", pem("a"), path=PATH.replace("/v1/", "/v1beta1/"))
    assert await bundle(rig, pod_with(name="mine")) == pem("a")


async def test_a_cluster_that_serves_none_is_named(rig: Rig) -> None:
    with pytest.raises(VolumeError, match="the API server serves no ClusterTrustBundles"):
        await bundle(rig, pod_with(name="mine", optional=True))


async def test_a_change_reaches_a_running_pod(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ttl_seconds=0.0)
    try:
        put(rig.kube, "mine", pem("a"))
        pod = pod_with(name="mine")
        assert await bundle(rig, pod) == pem("a")
        put(rig.kube, "mine", pem("b"))
        await rig.volumes.refresh(pod)
        assert await bundle(rig, pod) == pem("b")
    finally:
        await rig.close()


async def test_many_pods_share_a_read_and_each_hears_of_its_failure() -> None:
    kube = ReferenceKube()
    kube.delay_seconds = 0.01
    put(kube, "mine", pem("a"))
    bundles = TrustBundles(kube)

    async def one() -> str:
        return await bundles.by_name("mine", optional=False, max_age_seconds=0.0)

    assert await asyncio.gather(*(one() for _ in range(50))) == [pem("a")] * 50
    assert kube.calls[PATH] == 1
    kube.unavailable = ApiUnavailableError("away")
    failed = await asyncio.gather(*(one() for _ in range(50)), return_exceptions=True)
    assert all(isinstance(each, ApiUnavailableError) for each in failed)
    assert kube.calls[PATH] == 2
    await bundles.close()
