from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from wasilet_node.network import resolver_files
from wasilet_node.network.resolver_files import ResolvConf

MACHINE = ResolvConf(name_servers=("192.0.2.53",), searches=("corp.example",), options=("timeout:1",))


def made(spec: dict[str, Any], *, dns: tuple[str, ...] = ("10.96.0.10",)) -> tuple[str, str]:
    pod = {"metadata": {"namespace": "shop", "name": "p"}, "spec": spec}
    conf, problem = resolver_files.for_pod(pod, cluster_dns=dns, cluster_domain="cluster.local", machine=MACHINE)
    return conf.text(), problem


CLUSTER = (
    "search shop.svc.cluster.local svc.cluster.local cluster.local corp.example\n"
    "nameserver 10.96.0.10\noptions ndots:5\n"
)
OWN = "search corp.example\nnameserver 192.0.2.53\noptions timeout:1\n"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, CLUSTER),
        ({"dnsPolicy": "ClusterFirst"}, CLUSTER),
        ({"dnsPolicy": "ClusterFirst", "hostNetwork": True}, OWN),
        ({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": True}, CLUSTER),
        ({"dnsPolicy": "Default"}, OWN),
        ({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["9.9.9.9"]}}, "nameserver 9.9.9.9\n"),
        (
            {"dnsConfig": {"searches": ["a.example"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}},
            CLUSTER.replace("corp.example", "corp.example a.example").replace("ndots:5", "ndots:2 edns0"),
        ),
    ],
)
def test_policies_and_config(spec: dict[str, Any], expected: str) -> None:
    assert made(spec) == (expected, "")


def test_without_cluster_dns_the_machines_own_is_used() -> None:
    assert made({}, dns=()) == (OWN, "")


def test_more_than_three_servers_are_cut_and_told() -> None:
    text, problem = made({"dnsConfig": {"nameservers": ["1.1.1.1", "1.0.0.1", "9.9.9.9"]}})
    assert text.count("nameserver") == 3
    assert "the applied nameserver line is: 10.96.0.10 1.1.1.1 1.0.0.1" in problem


def test_a_search_list_that_is_too_long_is_cut_and_told() -> None:
    text, problem = made({"dnsConfig": {"searches": [f"{'x' * 60}.{number}.example" for number in range(60)]}})
    assert len(text.splitlines()[0]) <= resolver_files.MAX_SEARCH_CHARACTERS + len("search ")
    assert problem.startswith("Search Line limits were exceeded")


def test_parsing_knows_comments_and_the_last_search_line() -> None:
    text = """# x
nameserver 1.1.1.1 # primary
search a.example
search b.example c.example.
options rotate
options rotate ndots:1
"""
    assert resolver_files.parse(text) == ResolvConf(
        name_servers=("1.1.1.1",), searches=("b.example", "c.example"), options=("rotate", "ndots:1")
    )


def test_only_files_that_the_machine_has_are_covered(tmp_path: Path) -> None:
    etc = tmp_path / "etc"
    (tmp_path / "run").mkdir()
    etc.mkdir()
    (tmp_path / "run" / "stub").write_text("")
    (etc / "resolv.conf").symlink_to(tmp_path / "run" / "stub")
    (etc / "hosts").symlink_to(tmp_path / "nowhere")
    folder = tmp_path / "pod"
    resolver_files.write(folder, "nameserver 1.1.1.1\n", b"127.0.0.1 localhost\n")
    assert resolver_files.bindings(folder, etc=etc) == ((str(tmp_path / "run" / "stub"), str(folder / "resolv.conf")),)


def test_a_rewritten_file_is_the_same_file(tmp_path: Path) -> None:
    """A running pod has bound it: another inode would never be seen."""
    resolver_files.write(tmp_path / "pod", "a\n", b"")
    before = (tmp_path / "pod" / "resolv.conf").stat().st_ino
    resolver_files.write(tmp_path / "pod", "b\n", b"")
    assert (tmp_path / "pod" / "resolv.conf").stat().st_ino == before
