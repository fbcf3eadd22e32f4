"""The cluster's certificates: right, private, made once, and repaired where something is missing."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from wasilet.controlplane.pki import AUTHORITIES, CertificateSpec, Pki, host_specs
from wasilet.errors import StateError

pytestmark = pytest.mark.unit

SPECS = host_specs(addresses=("127.0.0.1", "192.0.2.7"), service_ip="10.96.0.1")


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    made = Pki(tmp_path)
    made.make(SPECS)
    return made


def load(pki: Pki, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pki.read_certificate(name))


def test_all_is_made_once(pki: Pki) -> None:
    assert pki.missing(SPECS) == []
    before = {path.name: path.read_bytes() for path in pki.folder.iterdir()}
    assert pki.make(SPECS) == []
    assert {path.name: path.read_bytes() for path in pki.folder.iterdir()} == before


def test_every_file_is_private(pki: Pki) -> None:
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in pki.folder.iterdir())


def test_the_api_server_is_valid_for_its_names_and_addresses(pki: Pki) -> None:
    certificate = load(pki, "apiserver")
    builder = PolicyBuilder().store(Store([load(pki, "ca")]))
    import ipaddress

    for address in ("127.0.0.1", "192.0.2.7", "10.96.0.1"):
        builder.build_server_verifier(x509.IPAddress(ipaddress.ip_address(address))).verify(certificate, [])
    builder.build_server_verifier(x509.DNSName("kubernetes.default.svc")).verify(certificate, [])
    with pytest.raises(x509.verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("example.com")).verify(certificate, [])


def test_no_two_authorities_vouch_for_the_same(pki: Pki) -> None:
    for spec in SPECS:
        certificate = load(pki, spec.name)
        for authority in AUTHORITIES:
            ours = load(pki, authority)
            if authority == spec.authority:
                certificate.verify_directly_issued_by(ours)
            else:
                with pytest.raises(ValueError, match=r"."):
                    certificate.verify_directly_issued_by(ours)


def test_only_the_administrator_is_a_master_and_only_servers_may_serve(pki: Pki) -> None:
    for spec in SPECS:
        certificate = load(pki, spec.name)
        groups = [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
        assert groups == (["system:masters"] if spec.name == "admin" else [])
        usages = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        assert (ExtendedKeyUsageOID.SERVER_AUTH in usages) is bool(spec.sans)
        assert (ExtendedKeyUsageOID.CLIENT_AUTH in usages) is spec.client
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)


@pytest.mark.parametrize("name", ["etcd.crt", "etcd.key"])
def test_a_lost_file_is_made_again_and_no_other(pki: Pki, name: str) -> None:
    others = {path: path.read_bytes() for path in pki.folder.glob("*.crt") if path.name != "etcd.crt"}
    (pki.folder / name).unlink()
    assert pki.make(SPECS) == ["etcd"]
    assert {path: path.read_bytes() for path in others} == others


def test_a_new_authority_means_new_certificates(pki: Pki) -> None:
    pki.key("etcd-ca").unlink()
    assert set(pki.make(SPECS)) == {"etcd-ca", "etcd", "etcd-health", "apiserver-etcd-client"}
    load(pki, "etcd").verify_directly_issued_by(load(pki, "etcd-ca"))
    assert pki.missing(SPECS) == []


def test_a_new_address_means_a_new_certificate(pki: Pki) -> None:
    moved = host_specs(addresses=("127.0.0.1", "192.0.2.8"), service_ip="10.96.0.1")
    assert pki.missing(moved) == ["apiserver"]


def test_what_expires_within_a_month_is_made_again(pki: Pki) -> None:
    index = json.loads((pki.folder / "index.json").read_text())
    index["scheduler"]["not_after"] = (dt.datetime.now(dt.UTC) + dt.timedelta(days=29)).timestamp()
    (pki.folder / "index.json").write_text(json.dumps(index))
    assert pki.missing(SPECS) == ["scheduler"]


def test_a_run_killed_before_the_index_was_written_is_made_good(pki: Pki) -> None:
    (pki.folder / "index.json").unlink()
    made = pki.make(SPECS)
    assert set(made) >= {spec.name for spec in SPECS}
    assert pki.missing(SPECS) == []


def test_a_damaged_authority_is_told_with_the_way_out(pki: Pki) -> None:
    pki.key("ca").write_text("nonsense")
    with pytest.raises(StateError, match="cannot be used"):
        pki.make([*SPECS, CertificateSpec(name="extra", authority="ca", common_name="extra")])
