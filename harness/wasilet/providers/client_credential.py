"""Credentials of the approver and of a node's kube-proxy on a cluster where Wasilet may not give certificates out of
hand.

A client certificate by the cluster's own signer (``kubernetes.io/kube-apiserver-client``), for a user that one of the
manifests binds. A bound service account token would do as well, but lives an hour to a day,
and who renews it? The approver may not (it would need ``serviceaccounts/token``), and no one else is there all the
time; a certificate lives a year by default, needs no ServiceAccount in the cluster, and the same CSR machinery must
work anyhow, or nodes could not join. It cannot be revoked, but it is worth nothing without its binding, which goes
when the cluster is left.
"""

from __future__ import annotations

import base64
import datetime as dt
import time
from collections.abc import Callable
from pathlib import Path

from wasilet.errors import ApiError, HarnessError, UsageError
from wasilet.kube.client import CSRS, Kube
from wasilet.kube.credentials import Credentials, read_credentials
from wasilet.kube.kubeconfig import write_kubeconfig
from wasilet.process import check_cancelled

APPROVER_USER = "wasilet:approver"
SIGNER = "kubernetes.io/kube-apiserver-client"
SIGN_SECONDS = 20.0
"""For the controller that signs, in a cluster that runs. It watches, so a second is long; after this, none is there."""

_POLL_SECONDS = 0.05


def is_current(path: Path, *, server: str, ca: bytes | None) -> bool:
    """Whether ``path`` is a kubeconfig for that server, with two thirds of its certificate's life behind it at most."""
    held = _held(path)
    return held is not None and _fresh(held) and held.server == server and held.ca == ca


def client_credential(
    admin: Callable[[], Kube],
    path: Path,
    *,
    user: str,
    server: str,
    ca: bytes | None,
    sign_seconds: float = SIGN_SECONDS,
) -> None:
    """See that ``path`` is a current kubeconfig of ``user`` (``wasilet:...``). Raises HarnessError when the cluster
    signs no client certificates within ``sign_seconds``."""
    if is_current(path, server=server, ca=ca):
        return
    held = _held(path)
    if held is not None and _fresh(held):
        certificate, key = held.certificate, held.key
    else:
        certificate, key = _request(admin(), user, sign_seconds)
    write_kubeconfig(path, name="wasilet", server=server, ca=ca, certificate=certificate, key=key)


def _held(path: Path) -> Credentials | None:
    try:
        return read_credentials(path)
    except UsageError:
        return None


def _fresh(held: Credentials) -> bool:
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(held.certificate or b"")
    except ValueError:
        return False
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_after_utc - dt.datetime.now(dt.UTC) > life / 3


def _request(kube: Kube, user: str, sign_seconds: float) -> tuple[bytes, bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, user)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    body = {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {
            "generateName": f"{user.replace(':', '-')}-",
            "labels": {"app.kubernetes.io/managed-by": "wasilet"},
        },
        "spec": {
            "request": base64.b64encode(request.public_bytes(serialization.Encoding.PEM)).decode(),
            "signerName": SIGNER,
            "usages": ["digital signature", "client auth"],
        },
    }
    csr = kube.create(CSRS, body)
    path = f"{CSRS}/{csr['metadata']['name']}"
    try:
        condition = {
            "type": "Approved",
            "status": "True",
            "reason": "WasiletApprover",
            "message": f"the credential of {user}, asked for by `invoke up`",
        }
        kube.replace(f"{path}/approval", csr | {"status": {"conditions": [condition]}})
        certificate = _signed(kube, path, sign_seconds)
    finally:
        kube.delete(path)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate, pem


def _signed(kube: Kube, path: str, sign_seconds: float) -> bytes:
    deadline = time.monotonic() + sign_seconds
    while True:
        try:
            status = kube.get(path).get("status") or {}
        except ApiError as error:
            raise HarnessError(f"the request of a client certificate is gone: {error.message}") from error
        if status.get("certificate"):
            return base64.b64decode(status["certificate"])
        for condition in status.get("conditions") or []:
            if condition.get("type") in {"Failed", "Denied"}:
                raise HarnessError(f"the cluster refused a client certificate: {condition.get('message')}")
        if time.monotonic() >= deadline:
            raise HarnessError(
                f"no one signs client certificates in this cluster (signer {SIGNER}, for {sign_seconds:g} s)",
                hint="nodes could not join: the controller-manager needs its csrsigning controller and the "
                "authority's key, see docs/providers/existing.md",
            )
        check_cancelled()
        time.sleep(_POLL_SECONDS)
