"""X.509 credentials of pods, from the signer that the pod names (KEP-4317; in Kubernetes 1.37 and later).

The node makes a key, asks with a PodCertificateRequest of the pod's namespace, and waits until its signer has answered;
the key never leaves the node. As in kubelet, a request that was denied or has failed is final for the pod, and a
certificate is asked for again once the signer's ``beginRefreshAt`` has passed, up to five minutes later. Nothing is
kept over a restart of the agent: then everything is asked for once more, and what is in the volume stays until the
answer is there.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from wasilet_common.time_format import seconds_of

from wasilet_node.kube.base import Kube, KubeError, KubeObject, NotFoundError
from wasilet_node.kube.pem import certificates, encoded

_GROUP: Final = "/apis/certificates.k8s.io/v1"
_JITTER_SECONDS: Final = 300.0
_ABANDON_SECONDS: Final = 600.0
"""A request that is not there any more is made again after this."""

_KEYS: Final[Mapping[str, Callable[[], Any]]] = {
    "RSA3072": lambda: rsa.generate_private_key(65537, 3072),
    "RSA4096": lambda: rsa.generate_private_key(65537, 4096),
    "ECDSAP256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ECDSAP384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ECDSAP521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ED25519": ed25519.Ed25519PrivateKey.generate,
}


class PodCertificateError(KubeError):
    """There is none, now or for good; the message is for the pod's event."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Credentials:
    """A private key (PKCS #8) and a chain, leaf first, both PEM."""

    key: bytes
    chain: bytes


@dataclass(frozen=True, kw_only=True, repr=False)
class _Request:
    path: str
    key: bytes
    made_at: float


@dataclass(kw_only=True, repr=False)
class _State:
    issued: Credentials | None = None
    refresh_at: float = 0.0
    request: _Request | None = None
    refused: str = ""


class PodCertificates:
    """One object per node."""

    def __init__(
        self,
        kube: Kube,
        *,
        node: Callable[[], tuple[str, str | None]],
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
        look_seconds: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5),
    ) -> None:
        """``node``: the Node's name and uid. ``jitter``: what share of five minutes a renewal is put off.
        ``look_seconds``: between looks at a new request, while a pod waits for it; after that the pod's own back-off
        asks again."""
        self._kube = kube
        self._node = node
        self._clock = clock
        self._jitter = jitter
        self._look_seconds = look_seconds
        self._states: dict[tuple[str, str], _State] = {}

    async def credentials(self, pod: KubeObject, source: Mapping[str, Any]) -> Credentials:
        """What the pod's volume is to hold now. Raises KubeError, also while the signer has not answered."""
        key = (pod["metadata"]["uid"], json.dumps(source, sort_keys=True))
        state = self._states.setdefault(key, _State())
        if state.refused:
            raise PodCertificateError(state.refused)
        if state.request is None and self._clock() >= state.refresh_at:
            state.request = await self._ask(pod, source)
        if state.request is not None:
            await self._look(state, waits=state.issued is None)
        if state.issued is None:
            raise PodCertificateError("credential bundle is not issued yet")
        return state.issued

    def release(self, pod_uid: str) -> None:
        """The pod is gone, and its keys with it. Idempotent."""
        for key in [key for key in self._states if key[0] == pod_uid]:
            del self._states[key]

    async def _ask(self, pod: KubeObject, source: Mapping[str, Any]) -> _Request:
        metadata, spec = pod["metadata"], pod["spec"]
        account = str(spec.get("serviceAccountName") or "default")
        namespace = metadata["namespace"]
        name, uid = self._node()
        if uid is None:
            raise PodCertificateError("the node is not registered yet")
        found = await self._kube.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}")
        private, request = await asyncio.to_thread(_key_and_request, str(source.get("keyType") or ""))
        wanted: KubeObject = {
            "signerName": source.get("signerName"),
            "podName": metadata["name"],
            "podUID": metadata["uid"],
            "serviceAccountName": account,
            "serviceAccountUID": found["metadata"]["uid"],
            "nodeName": name,
            "nodeUID": uid,
            "stubPKCS10Request": base64.b64encode(request).decode(),
        }
        if source.get("maxExpirationSeconds") is not None:
            wanted["maxExpirationSeconds"] = source["maxExpirationSeconds"]
        if source.get("userAnnotations"):
            wanted["unverifiedUserAnnotations"] = source["userAnnotations"]
        owner = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
        body: KubeObject = {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "PodCertificateRequest",
            "metadata": {"namespace": namespace, "generateName": "req-", "ownerReferences": [owner]},
            "spec": wanted,
        }
        path = f"{_GROUP}/namespaces/{namespace}/podcertificaterequests"
        try:
            made = await self._kube.create(path, body)
        except NotFoundError as error:
            raise PodCertificateError(
                f"the API server takes no PodCertificateRequests, which come with Kubernetes 1.37: {error}"
            ) from error
        return _Request(path=f"{path}/{made['metadata']['name']}", key=private, made_at=self._clock())

    async def _look(self, state: _State, *, waits: bool) -> None:
        for seconds in (*(self._look_seconds if waits else ()), 0.0):
            if await self._answered(state):
                return
            await asyncio.sleep(seconds)

    async def _answered(self, state: _State) -> bool:
        request = state.request
        if request is None:
            return True
        try:
            found = await self._kube.get(request.path)
        except NotFoundError:
            if self._clock() >= request.made_at + _ABANDON_SECONDS:
                state.request = None
            return False
        status = found.get("status") or {}
        for condition in status.get("conditions") or ():
            if condition.get("status", "True") != "True":
                continue
            match condition.get("type"):
                case "Denied" | "Failed" as outcome:
                    reason, message = (json.dumps(condition.get(field, "")) for field in ("reason", "message"))
                    state.refused = (
                        f"PodCertificateRequest was permanently {outcome.lower()}: reason={reason} message={message}"
                    )
                    raise PodCertificateError(state.refused)
                case "Issued":
                    chain = "".join(encoded(der) for der in certificates(str(status.get("certificateChain") or "")))
                    state.issued = Credentials(key=request.key, chain=chain.encode())
                    begin = seconds_of(status["beginRefreshAt"])
                    state.refresh_at = begin + self._jitter() * _JITTER_SECONDS
                    state.request = None
                    return True
        return False


def _key_and_request(key_type: str) -> tuple[bytes, bytes]:
    """A private key, PEM, and the PKCS #10 request that proves it, DER: its signer looks at nothing else of it."""
    make = _KEYS.get(key_type)
    if make is None:
        raise PodCertificateError(f'unknown key type "{key_type}"')
    key = make()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(key, None if key_type == "ED25519" else hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, request.public_bytes(serialization.Encoding.DER)
