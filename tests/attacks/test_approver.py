"""A node lies about itself to the approver of serving certificates: every row of ``approver.yaml``."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from wasilet.cluster.approver_rules import Facts, Policy, judge
from wasilet.kube.client import KubeObject

from tests.attacks.tally import Tally
from tests.unit.harness.cluster.test_approver import csr, request

pytestmark = pytest.mark.unit

ROWS: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "approver.yaml").read_text())
FACTS = Facts(
    service_ranges=frozenset({ipaddress.ip_network("10.96.0.0/12")}),
    api_servers=frozenset({ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("10.96.0.1")}),
    api_names=frozenset({"api.example"}),
    other_nodes={ipaddress.ip_address("192.0.2.8"): "wasm-2"},
)


def node(name: str, added: list[str]) -> KubeObject:
    addresses = [
        {"type": "InternalIP", "address": "192.0.2.7"},
        {"type": "InternalIP", "address": "2001:db8::7"},
        {"type": "Hostname", "address": name},
    ]
    for text in added:
        kinds = ("InternalIP", "ExternalIP", "Hostname", "InternalDNS")
        addresses += [{"type": kind, "address": text} for kind in kinds]
    return {"metadata": {"name": name}, "status": {"addresses": addresses}}


def subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


@pytest.mark.parametrize("row", ROWS, ids=[row["tried"] for row in ROWS])
def test_a_node_gets_a_certificate_for_itself_and_for_nothing_else(row: dict[str, Any], tally: Tally) -> None:
    name = row.get("node", "wasm-1")
    sans: list[x509.GeneralName] = [x509.DNSName(each) for each in row.get("dns", [])]
    sans += [x509.IPAddress(ipaddress.ip_address(each)) for each in row.get("ips", [])]
    sans += [x509.UniformResourceIdentifier(each) for each in row.get("uris", [])]
    sans += [x509.RFC822Name(each) for each in row.get("emails", [])]
    sans += [x509.DirectoryName(subject(each)) for each in row.get("names", [])]
    asked = csr(request(common_name=f"system:node:{name}", sans=tuple(sans)), username=f"system:node:{name}")
    known = {name: frozenset(map(ipaddress.ip_address, row["vouched"]))} if "vouched" in row else {}
    policy = Policy(nodes=known, only_known=row.get("known_only", False))
    verdict = judge(asked, node(name, row.get("status", [])), policy=policy, facts=lambda: FACTS)
    assert verdict.approve is row.get("approved", False), verdict.why
    assert row.get("says", "") in verdict.why
    tally.count("granted rightly" if verdict.approve else "refused")
