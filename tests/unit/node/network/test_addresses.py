from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from wasilet_node.network.addresses import AddressPool, PodRecord, PodRecords, gateway_of
from wasilet_node.network.errors import AddressesExhaustedError, NetworkError

CIDR = ipaddress.IPv4Network("10.9.0.0/29")


def record(uid: str = "u1", address: str = "10.9.0.2") -> PodRecord:
    return PodRecord(uid=uid, key="k1", address=address, interface="wk1", supervisor=7)


def test_network_gateway_and_broadcast_addresses_are_never_given() -> None:
    pool = AddressPool(CIDR)
    given = [str(pool.take()) for _ in range(5)]
    assert given == ["10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5", "10.9.0.6"]
    assert gateway_of(CIDR) == ipaddress.IPv4Address("10.9.0.1")
    with pytest.raises(AddressesExhaustedError, match=r"no free address in 10\.9\.0\.0/29: 5 are in use"):
        pool.take()


def test_what_was_given_back_is_the_last_to_be_given_again() -> None:
    pool = AddressPool(CIDR)
    first, second = pool.take(), pool.take()
    pool.give_back(second)
    pool.give_back(first)
    pool.give_back(first)
    assert [str(pool.take()) for _ in range(5)] == ["10.9.0.4", "10.9.0.5", "10.9.0.6", str(second), str(first)]


def test_what_the_records_hold_is_taken() -> None:
    pool = AddressPool(CIDR, taken=[ipaddress.IPv4Address("10.9.0.2"), ipaddress.IPv4Address("10.9.0.4")])
    assert [str(pool.take()) for _ in range(3)] == ["10.9.0.3", "10.9.0.5", "10.9.0.6"]


def test_a_cidr_without_room_is_refused() -> None:
    with pytest.raises(NetworkError, match="has 4 addresses"):
        AddressPool(ipaddress.IPv4Network("10.9.0.0/30"))


def test_records_survive_and_torn_ones_go(tmp_path: Path) -> None:
    records = PodRecords(tmp_path / "pods")
    records.write(record())
    records.write(record("u2", "10.9.0.3"))
    (tmp_path / "pods" / "u3.json").write_text('{"uid": "u3", "ke')
    (tmp_path / "pods" / "u4.json").write_text(
        '{"uid": "u4", "key": "k", "address": "no", "interface": "", "supervisor": 1}'
    )
    assert list(PodRecords(tmp_path / "pods").load()) == [record(), record("u2", "10.9.0.3")]
    assert sorted(path.name for path in (tmp_path / "pods").iterdir()) == ["u1.json", "u2.json"]
    records.remove("u1")
    records.remove("u1")
    assert [each.uid for each in records.load()] == ["u2"]


@pytest.mark.parametrize("uid", ["", "../x", "a/b", ".hidden"])
def test_a_uid_names_no_other_file(tmp_path: Path, uid: str) -> None:
    with pytest.raises(NetworkError, match="no uid"):
        PodRecords(tmp_path).write(record(uid))
