"""Asking the cluster for a certificate: one CertificateSigningRequest, from its creation to the signed pair.

The request's name and key are kept in a private file while it is pending, so an agent that restarts takes up the same
request instead of leaving one more for a person to approve. What comes back is checked against the key it was asked
with: a request that someone else made under that name can't put a foreign certificate beside this node's key.

Errors::

    CertificateError
    ├── CertificateRefusedError    Denied or Failed, with the approver's own reason and message
    └── CertificatePendingError    not signed within the time that was given; the next call goes on with it
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from wasilet_common.files import write_private

from wasilet_node.certificates_store import (
    NodeNames,
    Pair,
    alternative_names,
    key_from_pem,
    key_to_pem,
    make_pair,
    new_key,
)
from wasilet_node.kube.base import ApiStatusError, Kube, KubeObject

logger = logging.getLogger(__name__)

CLIENT_SIGNER = "kubernetes.io/kube-apiserver-client-kubelet"
SERVING_SIGNER = "kubernetes.io/kubelet-serving"

CSR_PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

_EXTENDED_USAGE = {CLIENT_SIGNER: "client auth", SERVING_SIGNER: "server auth"}
_REPORT_AGAIN_SECONDS = 600.0


class CertificateError(Exception):
    """A certificate was not issued."""


class CertificateRefusedError(CertificateError):
    """The request was denied, or the signer could not sign it."""


class CertificatePendingError(CertificateError):
    """No one approved the request in time."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the certificate is for."""

    signer: str
    node_name: str
    names: NodeNames = field(default_factory=NodeNames)
    """Empty for a client certificate: its signer refuses alternative names."""

    @property
    def what(self) -> str:
        """For messages."""
        return "client" if self.signer == CLIENT_SIGNER else "serving"


@dataclass(frozen=True, kw_only=True)
class _Pending:
    name: str
    uid: str
    key: str


def make_request(key: ec.EllipticCurvePrivateKey, wanted: Wanted) -> bytes:
    """PKCS #10, PEM: CN ``system:node:<name>``, O ``system:nodes``."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes"),
            # X.520 allows 64 characters; Kubernetes does not mind, and neither does Go.
            x509.NameAttribute(NameOID.COMMON_NAME, f"system:node:{wanted.node_name}", _validate=False),
        ]
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    alternatives = alternative_names(wanted.names)
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


async def obtain(
    kube: Kube, wanted: Wanted, *, pending_file: Path, timeout_seconds: float, report_after_seconds: float
) -> Pair:
    """Create the request, or go on with the pending one, and wait for the signed certificate. What has to be approved
    is reported when it has waited for ``report_after_seconds``.

    Raises CertificateError, and KubeError when the request cannot be created. The caller saves the pair, then calls
    ``forget``: in this order, or a crash loses both.
    """
    for _ in range(3):
        pending = await _resume(kube, wanted, pending_file)
        if pending is None:
            pending = await _create(kube, wanted, pending_file)
        try:
            async with asyncio.timeout(timeout_seconds):
                certificate = await _wait(kube, wanted, pending, report_after_seconds)
        except TimeoutError:
            raise CertificatePendingError(
                f"no one approved {pending.name} within {timeout_seconds:g} s; type: kubectl certificate approve "
                f"{pending.name}"
            ) from None
        except CertificateRefusedError:
            forget(pending_file)
            raise
        if certificate is not None:
            try:
                return make_pair(certificate, pending.key)
            except ValueError as error:
                forget(pending_file)
                raise CertificateError(f"{pending.name} was signed, but: {error}") from error
        # Deleted while it was pending, as the API server does after a day.
        logger.info("the certificate request %s is gone; asking again", pending.name)
        forget(pending_file)
    raise CertificateError(f"requests for a {wanted.what} certificate are deleted before they are signed")


def forget(pending_file: Path) -> None:
    """The request is settled."""
    pending_file.unlink(missing_ok=True)


def _read(wanted: Wanted, pending_file: Path) -> _Pending | None:
    try:
        document = json.loads(pending_file.read_bytes())
        key_from_pem(document["key"])
        pending = _Pending(name=str(document["name"]), uid=str(document["uid"]), key=document["key"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); asking again", pending_file, error)
        return None
    if {key: document.get(key) for key in _fingerprint(wanted)} != _fingerprint(wanted):
        logger.info("the pending request %s is for other names; asking again", pending.name)
        return None
    return pending


async def _create(kube: Kube, wanted: Wanted, pending_file: Path) -> _Pending:
    key = new_key()
    body: KubeObject = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"generateName": "csr-"},
        "spec": {
            "request": base64.b64encode(make_request(key, wanted)).decode("ascii"),
            "signerName": wanted.signer,
            # No "key encipherment": that is for RSA keys only.
            "usages": ["digital signature", _EXTENDED_USAGE[wanted.signer]],
        },
    }
    metadata = (await kube.create(CSR_PATH, body))["metadata"]
    if not (metadata.get("name") and metadata.get("uid")):
        raise CertificateError(f"the API server did not say which request for a {wanted.what} certificate it made")
    pending = _Pending(name=metadata["name"], uid=metadata["uid"], key=key_to_pem(key))
    logger.info("asked for a %s certificate: %s", wanted.what, pending.name)
    document = {**_fingerprint(wanted), "name": pending.name, "uid": pending.uid, "key": pending.key}
    write_private(pending_file, json.dumps(document).encode())
    return pending


async def _resume(kube: Kube, wanted: Wanted, pending_file: Path) -> _Pending | None:
    pending = _read(wanted, pending_file)
    if pending is None:
        return None
    try:
        found = await kube.get(f"{CSR_PATH}/{pending.name}")
    except ApiStatusError as error:
        if error.code in (403, 404):
            return None
        raise
    if found.get("metadata", {}).get("uid") != pending.uid:
        return None
    try:
        _certificate_of(found, pending.name)
    except CertificateRefusedError as error:
        logger.info("the request of an earlier run was refused (%s); asking again", error)
        return None
    logger.info("going on with the %s certificate request %s", wanted.what, pending.name)
    return pending


async def _wait(kube: Kube, wanted: Wanted, pending: _Pending, report_after_seconds: float) -> str | None:
    """The signed certificate; None when the request is gone."""
    reporting = asyncio.create_task(_report_pending(wanted, pending.name, report_after_seconds))
    listed = False  # in the list that is being read: each new one, as after a cut, must hold the request
    try:
        events = cast("Any", kube.watch(CSR_PATH, field_selector=f"metadata.name={pending.name}"))
        async with aclosing(events):
            async for event in events:
                if event.type == "SYNCED":
                    if not listed:
                        return None
                    listed = False
                    continue
                if event.object.get("metadata", {}).get("uid") != pending.uid:
                    continue
                if event.type == "DELETED":
                    return None
                listed = event.type == "SYNC"
                certificate = _certificate_of(event.object, pending.name)
                if certificate is not None:
                    return certificate
        return None
    finally:
        reporting.cancel()


async def _report_pending(wanted: Wanted, name: str, after_seconds: float) -> None:
    await asyncio.sleep(after_seconds)
    while True:
        if wanted.signer == SERVING_SIGNER:
            logger.warning(
                "the serving certificate waits for approval; pods run meanwhile, but 'kubectl logs' and 'exec' may "
                "fail until then; type: kubectl certificate approve %s",
                name,
            )
        else:
            logger.warning(
                "joining waits for the approval of the client certificate; type: kubectl certificate approve %s", name
            )
        await asyncio.sleep(_REPORT_AGAIN_SECONDS)


def _certificate_of(found: KubeObject, name: str) -> str | None:
    """The PEM text where the request is signed. Raises CertificateRefusedError."""
    status = found.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") in ("Denied", "Failed") and condition.get("status", "True") == "True":
            outcome = "was denied" if condition["type"] == "Denied" else "could not be signed"
            said = ": ".join(part for part in (condition.get("reason"), condition.get("message")) if part)
            raise CertificateRefusedError(f"the certificate request {name} {outcome}" + (f": {said}" if said else ""))
    encoded = status.get("certificate")
    if not encoded:
        return None
    try:
        return base64.b64decode(encoded, validate=True).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise CertificateRefusedError(f"the certificate of {name} is damaged") from error


def _fingerprint(wanted: Wanted) -> dict[str, object]:
    return {
        "signer": wanted.signer,
        "node": wanted.node_name,
        "dns": sorted(wanted.names.dns),
        "ips": sorted(wanted.names.ips),
    }
