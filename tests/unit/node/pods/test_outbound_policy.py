"""The operator's rule of outbound HTTP: which namespace may call what, whatever annotations list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wasilet_node.pods.http_policy import ALLOWED_DOMAINS, Outbound
from wasilet_node.pods.outbound_policy import OutboundPolicyError, read
from wasilet_node.volumes.base import ContainerConfigError

from tests.unit.node.pods.fakes import make_pod

pytestmark = pytest.mark.unit

RULE = """
team-a: [https://api.example, "http://192.0.2.1:8080"]
trusted: "*"
"*": [https://everyone.example]
"""


async def calls(rule: str, path: Path, namespace: str, *origins: str) -> tuple[str, ...] | None:
    """What a pod whose annotation lists ``origins`` may call. Raises ContainerConfigError."""
    path.write_text(rule)
    pod = make_pod()
    pod["metadata"] |= {"namespace": namespace, "annotations": {ALLOWED_DOMAINS: json.dumps(origins)}}
    policy = await Outbound(policy_file=path).policy(pod)
    return policy.allowed_origins if policy is not None else None


@pytest.mark.parametrize(
    ("namespace", "origin"),
    [
        ("team-a", "https://api.example"),
        ("team-a", "https://API.example:443"),
        ("team-a", "http://192.0.2.1:8080"),
        ("trusted", "https://anything.example"),
        ("other", "https://everyone.example"),
    ],
)
async def test_what_the_rule_lets_a_namespace_call(namespace: str, origin: str, tmp_path: Path) -> None:
    assert await calls(RULE, tmp_path / "rule", namespace, origin) == (origin.lower(),)


@pytest.mark.parametrize(
    ("rule", "namespace", "origin"),
    [
        (RULE, "team-a", "https://everyone.example"),
        (RULE, "team-a", "http://api.example"),
        (RULE, "team-a", "https://api.example:8443"),
        (RULE, "team-a", "https://api.example.attacker.example"),
        (RULE, "other", "https://api.example"),
        ("team-a: []", "team-a", "https://api.example"),
        ("team-a: [https://b.example]", "team-b", "https://b.example"),
        ("{}", "team-a", "https://api.example"),
    ],
)
async def test_what_it_keeps_from_a_namespace_fails_the_container(
    rule: str, namespace: str, origin: str, tmp_path: Path
) -> None:
    with pytest.raises(ContainerConfigError, match=rf"{origin} is refused.* namespace {namespace} "):
        await calls(rule, tmp_path / "rule", namespace, origin)


async def test_one_origin_that_is_kept_from_it_keeps_the_container_from_all(tmp_path: Path) -> None:
    with pytest.raises(ContainerConfigError, match=r"everyone\.example is refused"):
        await calls(RULE, tmp_path / "rule", "team-a", "https://api.example", "https://everyone.example")


async def test_loopback_stays_refused_though_the_rule_lists_it(tmp_path: Path) -> None:
    with pytest.raises(ContainerConfigError, match="loopback"):
        await calls('team-a: "*"', tmp_path / "rule", "team-a", "http://127.0.0.1:8080")


async def test_the_file_is_read_again_as_pods_start(tmp_path: Path) -> None:
    path = tmp_path / "rule"
    assert await calls(RULE, path, "team-a", "https://api.example")
    with pytest.raises(ContainerConfigError):
        await calls("team-a: []", path, "team-a", "https://api.example")


async def test_a_file_that_cannot_be_read_lets_no_one_call_and_its_path_stays_the_nodes(tmp_path: Path) -> None:
    with pytest.raises(ContainerConfigError) as failure:
        await calls("[", tmp_path / "rule", "trusted", "https://api.example")
    assert str(tmp_path) not in str(failure.value)
    pod = make_pod()
    pod["metadata"]["annotations"] = {ALLOWED_DOMAINS: '["https://api.example"]'}
    with pytest.raises(ContainerConfigError):
        await Outbound(policy_file=tmp_path / "none").policy(pod)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- a", "no mapping"),
        ("a: https://b.example", "neither a list"),
        ("a: [7]", "no origin"),
        ("a: ['ftp://b.example']", "no origin"),
        ("a: ['https://b.example/path']", "no origin"),
        ("a: ['https://me@b.example']", "no origin"),
        ("a: ['https://b.example:x']", "b.example:x"),
        ("a: ['*']", "no origin"),
        ("a: [", "rule"),
    ],
)
def test_a_rule_that_makes_no_sense_is_named(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "rule"
    path.write_text(text)
    with pytest.raises(OutboundPolicyError, match=problem):
        read(path)
