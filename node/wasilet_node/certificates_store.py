"""Certificates and keys on disk: certificate chain and private key of one identity in one file.

Krustlet wrote two files, so a crash in between, or an old request answered for a newer key, left a pair that did not
match. Here a pair is one file, checked before it is written, and put in place by a rename that is on disk before
any caller uses it: there is the old pair or the new one, never a mixture.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from wasilet_common.files import write_private

logger = logging.getLogger(__name__)

_SELF_SIGNED_DAYS = 365
_MAX_PAIR_BYTES = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class NodeNames:
    """What a serving certificate must be valid for."""

    dns: frozenset[str] = frozenset()
    ips: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """For log lines."""
        return ", ".join([*sorted(self.dns), *sorted(self.ips)]) or "nothing"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A certificate with the key that belongs to it (checked)."""

    certificate: str
    """PEM, the leaf first."""

    key: str = field(repr=False)
    """PEM, PKCS #8, not encrypted."""

    common_name: str
    names: NodeNames
    not_before: datetime
    not_after: datetime

    def valid_at(self, now: datetime) -> bool:
        """Whether the certificate has begun and not ended. ``now`` in UTC."""
        return self.not_before <= now < self.not_after

    def renewal_time(self, share: float) -> datetime:
        """The moment at which ``share`` (0 to 1) of the lifetime is over."""
        return self.not_before + (self.not_after - self.not_before) * share


def new_key() -> ec.EllipticCurvePrivateKey:
    """An ECDSA P-256 key, as kubelet's."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """PKCS #8 PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode("ascii")


def key_from_pem(text: str) -> ec.EllipticCurvePrivateKey:
    """Raises ValueError for what is not an ECDSA key."""
    key = serialization.load_pem_private_key(text.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an ECDSA key")  # noqa: TRY004  # a wrong value in a file, not a wrong call
    return key


def make_pair(certificate: str, key: str) -> Pair:
    """Parse and check. Raises ValueError when the text is damaged or certificate and key don't belong together."""
    try:
        chain = x509.load_pem_x509_certificates(certificate.encode())
        leaf = chain[0]
        private = serialization.load_pem_private_key(key.encode(), password=None)
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"not a certificate with its key: {error}") from error
    if _public_bytes(leaf.public_key()) != _public_bytes(private.public_key()):
        raise ValueError("the certificate is for another key")
    common_names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Pair(
        certificate=certificate,
        key=key,
        common_name=str(common_names[0].value) if common_names else "",
        names=_names(leaf),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
    )


def load_pair(path: Path) -> Pair | None:
    """None where there is no file, or a damaged one (which is logged, and replaced by the next renewal)."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_PAIR_BYTES).decode("ascii")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
    certificate, marker, key = text.partition("-----BEGIN PRIVATE KEY-----")
    try:
        return make_pair(certificate, marker + key)
    except ValueError as error:
        logger.warning("%s is damaged: %s", path, error)
        return None


def save_pair(path: Path, pair: Pair) -> None:
    """Write the one file, atomically. Raises OSError."""
    write_private(path, f"{pair.certificate.rstrip()}\n{pair.key.rstrip()}\n".encode())


def self_signed(node_name: str, names: NodeNames, *, now: datetime | None = None) -> Pair:
    """What the HTTPS server shows while the real certificate waits for approval; no one who checks accepts it."""
    key = new_key()
    begin = now or datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{node_name} (self-signed)"[:64])])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - timedelta(minutes=5))
        .not_valid_after(begin + timedelta(days=_SELF_SIGNED_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    alternatives = alternative_names(names)
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    return make_pair(certificate.public_bytes(serialization.Encoding.PEM).decode("ascii"), key_to_pem(key))


def alternative_names(names: NodeNames) -> list[x509.GeneralName]:
    """The subject alternative names, in a stable order. Raises ValueError for what is no address."""
    return [
        *(x509.DNSName(name) for name in sorted(names.dns)),
        *(x509.IPAddress(ipaddress.ip_address(address)) for address in sorted(names.ips)),
    ]


def is_certificate(text: str) -> bool:
    """Whether OpenSSL takes the text as certificates to trust."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        return False
    return True


def _names(leaf: x509.Certificate) -> NodeNames:
    try:
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return NodeNames()
    return NodeNames(
        dns=frozenset(extension.get_values_for_type(x509.DNSName)),
        ips=frozenset(str(address) for address in extension.get_values_for_type(x509.IPAddress)),
    )


def _public_bytes(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("not an ECDSA key")  # noqa: TRY004  # a wrong value in a file, not a wrong call
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
