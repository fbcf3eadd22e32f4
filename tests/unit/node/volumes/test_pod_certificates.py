"""podCertificate sources of projected volumes."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from wasilet_node.volumes.base import VolumeError

from tests.unit.node.volumes.rig import Rig, make_container, make_pod

pytestmark = pytest.mark.unit

REQUESTS = "/apis/certificates.k8s.io/v1/namespaces/default/podcertificaterequests"
ACCOUNT = "/api/v1/namespaces/default/serviceaccounts/default"


def chain(name: str) -> str:
    text = base64.b64encode(name.encode()).decode()
    return f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n"


def answer(outcome: str, *, name: str = "leaf", begin: str = "2999-01-01T00:00:00Z") -> dict[str, Any]:
    condition = {"type": outcome, "status": "True", "reason": "Because", "message": "of it"}
    issued = {"certificateChain": f"# a remark\n{chain(name)}", "beginRefreshAt": begin, "notAfter": begin}
    return {"conditions": [condition], **(issued if outcome == "Issued" else {})}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    rig.kube.put(ACCOUNT)
    yield rig
    await rig.close()


def pod_with(**source: Any) -> dict[str, Any]:
    wanted = {"signerName": "example.com/signer", "keyType": "ED25519", "keyPath": "k", "certificateChainPath": "c"}
    projected = {"sources": [{"podCertificate": {**wanted, **source}}], "defaultMode": 0o600}
    return make_pod(
        volumes=[{"name": "v", "projected": projected}],
        containers=[make_container({"name": "v", "mountPath": "/v"})],
    )


async def files(rig: Rig, pod: dict[str, Any]) -> dict[str, str]:
    folder = Path((await rig.mounts(pod))["/v"].host)
    return {path.name: path.read_text() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("key_type", ["ECDSAP256", "ECDSAP384", "ECDSAP521", "ED25519", "RSA3072"])
async def test_a_key_and_its_chain_are_in_the_volume_and_only_the_proof_leaves_the_node(
    rig: Rig, key_type: str
) -> None:
    rig.kube.certificate_status = answer("Issued")
    annotations = {"example.com/a": "b"}
    found = await files(
        rig,
        pod_with(keyType=key_type, credentialBundlePath="b", maxExpirationSeconds=3600, userAnnotations=annotations),
    )
    assert found["c"] == chain("leaf")
    assert found["b"] == found["k"] + found["c"]
    key = serialization.load_pem_private_key(found["k"].encode(), None)
    (body,) = rig.kube.bodies
    wanted = dict(body["spec"])
    request = x509.load_der_x509_csr(base64.b64decode(wanted.pop("stubPKCS10Request")))
    assert request.is_signature_valid
    public = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    assert request.public_key().public_bytes(*public) == key.public_key().public_bytes(*public)
    assert wanted == {
        "signerName": "example.com/signer",
        "podName": "web",
        "podUID": "pod-1",
        "serviceAccountName": "default",
        "serviceAccountUID": "uid-of-default",
        "nodeName": "wasm-1",
        "nodeUID": "uid-node",
        "maxExpirationSeconds": 3600,
        "unverifiedUserAnnotations": annotations,
    }
    assert body["metadata"]["ownerReferences"][0]["uid"] == "pod-1"


@pytest.mark.parametrize("outcome", ["Denied", "Failed"])
async def test_a_refusal_is_final_and_says_why(rig: Rig, outcome: str) -> None:
    rig.kube.certificate_status = answer(outcome)
    message = f'PodCertificateRequest was permanently {outcome.lower()}: reason="Because" message="of it"'
    for _ in range(2):
        with pytest.raises(VolumeError, match=message):
            await rig.volumes.setup(pod_with())
    assert rig.kube.calls[REQUESTS] == 1


async def test_a_signer_that_takes_its_time_is_not_asked_twice(rig: Rig) -> None:
    pod = pod_with()
    with pytest.raises(VolumeError, match="not issued yet"):
        await rig.volumes.setup(pod)
    rig.kube.objects[f"{REQUESTS}/req-1"]["status"] = answer("Issued")
    assert (await files(rig, pod))["c"] == chain("leaf")
    assert rig.kube.calls[REQUESTS] == 1


async def test_it_is_renewed_when_the_signer_says_and_the_old_one_stays_until_then(rig: Rig) -> None:
    pod = pod_with()
    rig.kube.certificate_status = answer("Issued", begin="2020-01-01T00:00:00Z")
    first = await files(rig, pod)
    rig.kube.certificate_status = {}
    await rig.volumes.refresh(pod)
    assert await files(rig, pod) == first
    rig.kube.objects[f"{REQUESTS}/req-2"]["status"] = answer("Issued", name="second")
    await rig.volumes.refresh(pod)
    second = await files(rig, pod)
    assert second["c"] == chain("second")
    assert second["k"] != first["k"]
    await rig.volumes.refresh(pod)
    assert rig.kube.calls[REQUESTS] == 2
    rig.references.release(pod["metadata"]["uid"])
    assert rig.references.pod_certificates._states == {}


async def test_an_api_server_without_them_and_an_unknown_key_type_are_named(rig: Rig) -> None:
    with pytest.raises(VolumeError, match='unknown key type "DSA"'):
        await rig.volumes.setup(pod_with(keyType="DSA"))
    rig.kube.certificates_served = False
    with pytest.raises(VolumeError, match=r"come with Kubernetes 1\.37"):
        await rig.volumes.setup(pod_with())
