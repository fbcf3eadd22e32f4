"""The cluster's keys and certificates: made once, checked at each ``up``, renewed a month before they expire.

Three authorities, as kubeadm has them: the cluster's (servers, clients, what the controller-manager signs), the front
proxy's (aggregated API servers trust it alone) and etcd's (so that no client of the cluster can reach etcd). Every
component has its own certificate. ECDSA P-256 throughout: made in a millisecond, where RSA takes a hundred.

``pki/index.json`` says what each certificate was made for, so that looking needs no parsing; it is written after the
files it describes, hence a run killed halfway makes the missing ones again.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wasilet.errors import StateError
from wasilet.storage import read_json, write_file, write_json

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

AUTHORITY_DAYS = 3650
LEAF_DAYS = 365
RENEW_BEFORE_SECONDS = 30 * 86400
CLOCK_SKEW_SECONDS = 300

CLUSTER_CA = "ca"
FRONT_PROXY_CA = "front-proxy-ca"
ETCD_CA = "etcd-ca"
AUTHORITIES = {CLUSTER_CA: "kubernetes", FRONT_PROXY_CA: "front-proxy-ca", ETCD_CA: "etcd-ca"}
SERVICE_ACCOUNT_KEY = "sa"


@dataclass(frozen=True, kw_only=True)
class CertificateSpec:
    """What a certificate is for. Files are ``<name>.crt`` and ``<name>.key``."""

    name: str
    authority: str
    common_name: str
    organizations: tuple[str, ...] = ()
    sans: tuple[str, ...] = ()
    """DNS names and IP addresses; a certificate that has any may serve."""

    client: bool = True


def host_specs(*, addresses: Sequence[str], service_ip: str) -> tuple[CertificateSpec, ...]:
    """Every certificate of the host provider. ``addresses``: where the API server is reached, besides loopback."""
    loopback = ("localhost", "127.0.0.1")
    kubernetes = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
    extra = tuple(a for a in addresses if a not in loopback)
    return (
        CertificateSpec(
            name="apiserver",
            authority=CLUSTER_CA,
            common_name="kube-apiserver",
            sans=(*loopback, *kubernetes, service_ip, *extra),
            client=False,
        ),
        CertificateSpec(
            name="apiserver-kubelet-client", authority=CLUSTER_CA, common_name="kube-apiserver-kubelet-client"
        ),
        CertificateSpec(name="apiserver-etcd-client", authority=ETCD_CA, common_name="kube-apiserver-etcd-client"),
        CertificateSpec(name="front-proxy-client", authority=FRONT_PROXY_CA, common_name="front-proxy-client"),
        CertificateSpec(name="etcd", authority=ETCD_CA, common_name="etcd", sans=loopback),
        CertificateSpec(name="etcd-health", authority=ETCD_CA, common_name="wasilet-etcd-health"),
        CertificateSpec(
            name="controller-manager",
            authority=CLUSTER_CA,
            common_name="system:kube-controller-manager",
            sans=loopback,
        ),
        CertificateSpec(name="scheduler", authority=CLUSTER_CA, common_name="system:kube-scheduler", sans=loopback),
        CertificateSpec(name="kube-proxy", authority=CLUSTER_CA, common_name="system:kube-proxy"),
        CertificateSpec(name="netpol", authority=CLUSTER_CA, common_name="wasilet:network-policies"),
        CertificateSpec(name="coredns", authority=CLUSTER_CA, common_name="system:coredns"),
        CertificateSpec(name="approver", authority=CLUSTER_CA, common_name="wasilet:approver"),
        CertificateSpec(name="service-ports", authority=CLUSTER_CA, common_name="wasilet:service-ports"),
        CertificateSpec(
            name="admin", authority=CLUSTER_CA, common_name="wasilet-admin", organizations=("system:masters",)
        ),
    )


class Pki:
    """The folder of keys and certificates of one cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def certificate(self, name: str) -> Path:
        """The PEM file of a certificate."""
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        """The PEM file of a private key."""
        return self.folder / f"{name}.key"

    def read_certificate(self, name: str) -> bytes:
        """A certificate's PEM. Raises StateError."""
        try:
            return self.certificate(name).read_bytes()
        except OSError as error:
            raise StateError(f"cannot read {self.certificate(name)}: {error.strerror}") from error

    def missing(self, specs: Sequence[CertificateSpec]) -> list[str]:
        """The names of what has to be made: absent, for something else, of another authority, or about to expire."""
        index = read_json(self.folder / "index.json")
        absent = [n for n in AUTHORITIES if not self._good(index, n, {"authority": n})]
        if not (self.key(SERVICE_ACCOUNT_KEY).is_file() and (self.folder / "sa.pub").is_file()):
            absent.append(SERVICE_ACCOUNT_KEY)
        absent += [s.name for s in specs if s.authority in absent or not self._good(index, s.name, _wanted(s))]
        return absent

    def _good(self, index: dict[str, Any], name: str, wanted: dict[str, Any]) -> bool:
        entry = index.get(name)
        if not isinstance(entry, dict) or entry.get("spec") != wanted:
            return False
        if float(entry.get("not_after", 0)) - time.time() < RENEW_BEFORE_SECONDS:
            return False
        try:
            text = self.certificate(name).read_bytes()
        except OSError:
            return False
        issuer = index.get(str(wanted["authority"]), {})
        return (
            entry.get("sha256") == hashlib.sha256(text).hexdigest()
            and entry.get("issuer_sha256") == issuer.get("sha256")
            and self.key(name).is_file()
        )

    def make(self, specs: Sequence[CertificateSpec]) -> list[str]:
        """Make what is missing; returns the names. Raises StateError."""
        names = self.missing(specs)
        if not names:
            return []
        index = read_json(self.folder / "index.json")
        for authority, common_name in AUTHORITIES.items():
            if authority in names:
                self._make_authority(authority, common_name, index)
        if SERVICE_ACCOUNT_KEY in names:
            self._make_service_account_key()
        issuers: dict[str, tuple[x509.Certificate, ec.EllipticCurvePrivateKey]] = {}
        for spec in specs:
            if spec.name in names:
                if spec.authority not in issuers:
                    issuers[spec.authority] = self._load_authority(spec.authority)
                self._make_leaf(spec, issuers[spec.authority], index)
        write_json(self.folder / "index.json", index)
        return names

    def _make_authority(self, name: str, common_name: str, index: dict[str, Any]) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(common_name, ())
        builder, not_after = _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        self._write(name, certificate, key)
        digest = hashlib.sha256(self.certificate(name).read_bytes()).hexdigest()
        index[name] = {"spec": {"authority": name}, "not_after": not_after, "sha256": digest, "issuer_sha256": digest}

    def _make_leaf(
        self,
        spec: CertificateSpec,
        issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey],
        index: dict[str, Any],
    ) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        certificate_authority, authority_key = issuer
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(spec.common_name, spec.organizations)
        builder, not_after = _builder(subject, certificate_authority.subject, key.public_key(), LEAF_DAYS)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH] if spec.client else []
        usages += [ExtendedKeyUsageOID.SERVER_AUTH] if spec.sans else []
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )
        if spec.sans:
            builder = builder.add_extension(x509.SubjectAlternativeName([_san(s) for s in spec.sans]), critical=False)
        self._write(spec.name, builder.sign(authority_key, hashes.SHA256()), key)
        index[spec.name] = {
            "spec": _wanted(spec),
            "not_after": not_after,
            "sha256": hashlib.sha256(self.certificate(spec.name).read_bytes()).hexdigest(),
            "issuer_sha256": index[spec.authority]["sha256"],
        }

    def _make_service_account_key(self) -> None:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        write_file(self.key(SERVICE_ACCOUNT_KEY), _private_pem(key))
        write_file(self.folder / "sa.pub", public)

    def _load_authority(self, name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            key = serialization.load_pem_private_key(self.key(name).read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(self.read_certificate(name))
        except (OSError, ValueError) as error:
            raise StateError(f"{self.key(name)} cannot be used: {error}", hint="`invoke down --purge`") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise StateError(f"{self.key(name)} is no ECDSA key", hint="`invoke down --purge` removes the cluster")
        return certificate, key

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        from cryptography.hazmat.primitives import serialization

        write_file(self.key(name), _private_pem(key))
        write_file(self.certificate(name), certificate.public_bytes(serialization.Encoding.PEM))


def _wanted(spec: CertificateSpec) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(asdict(spec)))
    return data


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _subject(common_name: str, organizations: Sequence[str]) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in organizations]
    return x509.Name([*names, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> tuple[x509.CertificateBuilder, float]:
    from cryptography import x509

    now = dt.datetime.now(dt.UTC)
    not_after = now + dt.timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(seconds=CLOCK_SKEW_SECONDS))
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    return builder, not_after.timestamp()


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _san(value: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(value))
    except ValueError:
        return x509.DNSName(value)
