"""Environments and command lines are those that kubelet and a container runtime would give."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from wasilet_node.images.model import Image
from wasilet_node.kube import fields
from wasilet_node.kube.base import ApiUnavailableError
from wasilet_node.kube.references import References, ReferenceSettings
from wasilet_node.pods.environment import EnvironmentBuilder, expand_command, process_environment
from wasilet_node.pods.service_environment import service_environment
from wasilet_node.runtime.protocol import GuestKind
from wasilet_node.volumes.base import ContainerConfigError, Volumes

from tests.unit.node.volumes.rig import ReferenceKube, make_container, make_pod

pytestmark = pytest.mark.unit


def image(**more: Any) -> Image:
    defaults: dict[str, Any] = {
        "reference": "r/hello:1",
        "image_id": "r/hello@sha256:0",
        "manifest_digest": "sha256:0",
        "module_digest": "sha256:1",
        "module_path": Path("/store/module.wasm"),
        "kind": GuestKind.MODULE,
        "size_bytes": 1,
        "module_name": "hello.wasm",
    }
    return Image(**(defaults | more))


@pytest.fixture
def kube() -> ReferenceKube:
    return ReferenceKube()


@pytest.fixture
async def references(kube: ReferenceKube) -> AsyncIterator[References]:
    references = References(kube, settings=ReferenceSettings(lag_seconds=0.05, services_timeout_seconds=0.05))
    references.start()
    yield references
    await references.close()


async def build(references: References, container: dict[str, Any], **spec: Any) -> dict[str, str]:
    spec.setdefault("enableServiceLinks", False)
    pod = make_pod(containers=[container], **spec)
    return await EnvironmentBuilder(references, cast("Volumes", None)).build(
        pod,
        container,
        pod_ips=["10.0.0.5", "fd00::5"],
        host_ips=["10.0.0.5"],
        allocatable={"cpu": "3", "memory": "2Gi", "ephemeral-storage": "5Gi"},
    )


async def variable(references: References, entry: dict[str, Any], **container: Any) -> str:
    return (await build(references, make_container(env=[{"name": "X", **entry}], **container)))["X"]


async def test_later_variables_see_earlier_ones_and_the_order_is_kept(references: References) -> None:
    found = await build(
        references,
        make_container(
            env=[
                {"name": "B", "value": "2"},
                {"name": "A", "value": "$(B)$(C)$$(B)"},
                {"name": "C", "value": "3"},
                {"name": "EMPTY"},
            ]
        ),
    )
    assert list(found.items()) == [("B", "2"), ("A", "2$(C)$(B)"), ("C", "3"), ("EMPTY", "")]


async def test_env_from_comes_first_with_its_prefix_and_env_overrides_it(
    kube: ReferenceKube, references: References
) -> None:
    kube.config_map("settings", {"MODE": "slow", "LEVEL": "1"})
    kube.secret("keys", {"KEY": b"s3cret"})
    found = await build(
        references,
        make_container(
            envFrom=[
                {"configMapRef": {"name": "settings"}},
                {"prefix": "P_", "secretRef": {"name": "keys"}},
                {"configMapRef": {"name": "absent", "optional": True}},
            ],
            env=[{"name": "MODE", "value": "fast:$(P_KEY)"}],
        ),
    )
    assert found == {"LEVEL": "1", "MODE": "fast:s3cret", "P_KEY": "s3cret"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"configMapKeyRef": {"name": "none", "key": "k"}}, 'configmap "none" not found'),
        ({"secretKeyRef": {"name": "none", "key": "k"}}, 'secret "none" not found'),
        ({"configMapKeyRef": {"name": "cm", "key": "k"}}, "couldn't find key k in ConfigMap default/cm"),
        ({"secretKeyRef": {"name": "sec", "key": "k"}}, "couldn't find key k in Secret default/sec"),
        ({"fieldRef": {"fieldPath": "spec.hostname"}}, "field label not supported: spec.hostname"),
        ({"fieldRef": {"fieldPath": "spec.x['y']"}}, "field label does not support subscript: spec.x['y']"),
        ({"resourceFieldRef": {"resource": "limits.gpu"}}, "unsupported container resource : limits.gpu"),
        ({"someKeyRef": {"key": "k"}}, "env X: valueFrom.someKeyRef is not supported by this node"),
    ],
)
async def test_what_is_missing_is_named_in_kubelets_words(
    kube: ReferenceKube, references: References, entry: dict[str, Any], message: str
) -> None:
    kube.config_map("cm", {"other": "x"})
    kube.secret("sec", {"other": b"x"})
    with pytest.raises(ContainerConfigError) as caught:
        await variable(references, {"valueFrom": entry})
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", ["configMapKeyRef", "secretKeyRef"])
@pytest.mark.parametrize("name", ["none", "known"])
async def test_an_optional_reference_that_is_missing_leaves_the_variable_out(
    kube: ReferenceKube, references: References, kind: str, name: str
) -> None:
    kube.config_map("known", {})
    kube.secret("known", {})
    reference = {kind: {"name": name, "key": "k", "optional": True}}
    found = await build(references, make_container(env=[{"name": "X", "valueFrom": reference}]))
    assert "X" not in found


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("metadata.name", "web"),
        ("metadata.namespace", "default"),
        ("metadata.uid", "pod-1"),
        ("metadata.labels['app']", "web"),
        ("metadata.labels['missing']", ""),
        ("metadata.labels", 'app="web"'),
        ("metadata.annotations", ""),
        ("spec.nodeName", "wasm-1"),
        ("spec.serviceAccountName", "default"),
        ("status.podIP", "10.0.0.5"),
        ("status.podIPs", "10.0.0.5,fd00::5"),
        ("status.hostIP", "10.0.0.5"),
        ("status.hostIPs", "10.0.0.5"),
    ],
)
async def test_the_downward_api_gives_every_field(references: References, path: str, expected: str) -> None:
    assert await variable(references, {"valueFrom": {"fieldRef": {"fieldPath": path}}}) == expected


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ({"resource": "limits.cpu"}, "1"),
        ({"resource": "limits.cpu", "divisor": "1m"}, "250"),
        ({"resource": "limits.memory"}, str(2 * 1024**3)),
        ({"resource": "limits.memory", "divisor": "1Mi"}, "2048"),
        ({"resource": "requests.memory", "divisor": "1Mi"}, "33"),
        ({"resource": "requests.cpu"}, "0"),
        ({"resource": "limits.ephemeral-storage", "divisor": "1Gi"}, "5"),
        ({"resource": "limits.cpu", "divisor": "0"}, "1"),
    ],
)
async def test_resources_are_divided_and_rounded_up_and_limits_default_to_the_node(
    references: References, reference: dict[str, Any], expected: str
) -> None:
    resources = {"limits": {"cpu": "250m"}, "requests": {"memory": "33000Ki"}}
    assert await variable(references, {"valueFrom": {"resourceFieldRef": reference}}, resources=resources) == expected


@pytest.mark.parametrize(("what", "expected"), [("cpu", "2"), ("memory", "64"), ("ephemeral-storage", "5")])
def test_a_limit_that_is_not_set_is_the_pods_before_the_nodes(what: str, expected: str) -> None:
    pod = {"spec": {"resources": {"limits": {"cpu": "2", "memory": "64", "ephemeral-storage": "1"}}}}
    allocatable = {"cpu": "8", "memory": "1Gi", "ephemeral-storage": "5"}
    assert fields.resource_field(pod, {"resource": f"limits.{what}"}, allocatable, container={}) == expected
    assert fields.resource_field(pod, {"resource": "requests.cpu"}, allocatable, container={}) == "0"


async def test_a_secret_that_is_no_text_cannot_be_a_variable_and_is_not_printed(
    kube: ReferenceKube, references: References
) -> None:
    kube.secret("bin", {"k": b"\xff\xfe-hidden"})
    with pytest.raises(ContainerConfigError, match="key k in Secret default/bin is not UTF-8") as caught:
        await variable(references, {"valueFrom": {"secretKeyRef": {"name": "bin", "key": "k"}}})
    assert "hidden" not in str(caught.value)


async def test_a_nul_byte_is_refused(kube: ReferenceKube, references: References) -> None:
    kube.config_map("nul", {"k": "a\0b"})
    with pytest.raises(ContainerConfigError, match="NUL"):
        await variable(references, {"valueFrom": {"configMapKeyRef": {"name": "nul", "key": "k"}}})


async def test_an_api_server_that_is_away_is_a_config_error_to_retry(
    kube: ReferenceKube, references: References
) -> None:
    kube.unavailable = ApiUnavailableError("connection refused")
    with pytest.raises(ContainerConfigError, match="connection refused"):
        await variable(references, {"valueFrom": {"configMapKeyRef": {"name": "a", "key": "k"}}})


def put_service(kube: ReferenceKube, namespace: str, name: str, address: str, *ports: dict[str, Any]) -> None:
    kube.put(f"/api/v1/namespaces/{namespace}/services/{name}", spec={"clusterIP": address, "ports": list(ports)})


async def test_services_of_the_namespace_and_the_master_become_variables(
    kube: ReferenceKube, references: References
) -> None:
    put_service(kube, "default", "kubernetes", "10.96.0.1", {"name": "https", "port": 443, "protocol": "TCP"})
    put_service(kube, "default", "redis-db", "10.96.0.2", {"port": 6379})
    put_service(kube, "default", "headless", "None", {"port": 1})
    put_service(kube, "other", "far", "10.96.0.3", {"port": 2})
    await asyncio.sleep(0.01)
    container = make_container(env=[{"name": "URL", "value": "redis://$(REDIS_DB_SERVICE_HOST)"}])
    found = await build(references, container, enableServiceLinks=True)
    assert found == {
        "URL": "redis://10.96.0.2",
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "KUBERNETES_SERVICE_PORT": "443",
        "KUBERNETES_SERVICE_PORT_HTTPS": "443",
        "KUBERNETES_PORT": "tcp://10.96.0.1:443",
        "KUBERNETES_PORT_443_TCP": "tcp://10.96.0.1:443",
        "KUBERNETES_PORT_443_TCP_PROTO": "tcp",
        "KUBERNETES_PORT_443_TCP_PORT": "443",
        "KUBERNETES_PORT_443_TCP_ADDR": "10.96.0.1",
        "REDIS_DB_SERVICE_HOST": "10.96.0.2",
        "REDIS_DB_SERVICE_PORT": "6379",
        "REDIS_DB_PORT": "tcp://10.96.0.2:6379",
        "REDIS_DB_PORT_6379_TCP": "tcp://10.96.0.2:6379",
        "REDIS_DB_PORT_6379_TCP_PROTO": "tcp",
        "REDIS_DB_PORT_6379_TCP_PORT": "6379",
        "REDIS_DB_PORT_6379_TCP_ADDR": "10.96.0.2",
    }
    without = await build(references, make_container(), enableServiceLinks=False)
    assert without.keys() == {name for name in found if name.startswith("KUBERNETES_")}


def test_an_ipv6_service_has_brackets_in_its_url_only() -> None:
    service = {
        "metadata": {"name": "six", "namespace": "a"},
        "spec": {"clusterIP": "fd00::1", "ports": [{"port": 53, "protocol": "UDP"}]},
    }
    found = service_environment([service], "a", links=True)
    assert found["SIX_PORT_53_UDP"] == "udp://[fd00::1]:53"
    assert found["SIX_SERVICE_HOST"] == "fd00::1"


async def test_services_never_listed_stop_the_container_in_kubelets_words(kube: ReferenceKube) -> None:
    references = References(kube, settings=ReferenceSettings(services_timeout_seconds=0.01))
    with pytest.raises(ContainerConfigError, match="services have not yet been read at least once"):
        await build(references, make_container())
    await references.close()


async def test_a_service_that_is_removed_is_gone_for_the_next_container(
    kube: ReferenceKube, references: References
) -> None:
    put_service(kube, "default", "redis", "10.96.0.2", {"port": 6379})
    await asyncio.sleep(0.01)
    assert "REDIS_SERVICE_HOST" in await build(references, make_container(), enableServiceLinks=True)
    kube.remove("/api/v1/namespaces/default/services/redis")
    await asyncio.sleep(0.01)
    assert "REDIS_SERVICE_HOST" not in await build(references, make_container(), enableServiceLinks=True)


@pytest.mark.parametrize(
    ("container", "of_image", "argv"),
    [
        ({}, {}, ("hello.wasm",)),
        ({"args": ["-v", "$(A)"]}, {}, ("hello.wasm", "-v", "1")),
        ({"command": ["/bin/x"]}, {}, ("/bin/x",)),
        ({"command": ["/bin/x"], "args": ["$(B)"]}, {}, ("/bin/x", "$(B)")),
        ({}, {"entrypoint": ("/app.wasm",), "cmd": ("serve",)}, ("/app.wasm", "serve")),
        ({"args": ["stop"]}, {"entrypoint": ("/app.wasm",), "cmd": ("serve",)}, ("/app.wasm", "stop")),
        ({"command": ["x"]}, {"entrypoint": ("/app.wasm",), "cmd": ("serve",)}, ("x",)),
        ({}, {"cmd": ("/app.wasm", "serve")}, ("/app.wasm", "serve")),
        ({"args": ["stop"]}, {"cmd": ("/app.wasm", "serve")}, ("hello.wasm", "stop")),
        ({}, {"entrypoint": ("/app.wasm", "$(A)")}, ("/app.wasm", "$(A)")),
    ],
)
def test_command_and_args_replace_entrypoint_and_cmd(
    container: dict[str, Any], of_image: dict[str, Any], argv: tuple[str, ...]
) -> None:
    assert expand_command(make_container(**container), {"A": "1"}, image(**of_image)) == argv


def test_the_process_has_the_runtimes_variables_below_the_images_below_the_pods() -> None:
    found = dict(
        process_environment(
            {"A": "pod", "HOME": "/data"},
            make_pod(hostname="box"),
            make_container(workingDir="/work"),
            image(env=(("A", "image"), ("B", "image"), ("HOSTNAME", "image"))),
        )
    )
    assert found == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/data",
        "PWD": "/work",
        "A": "pod",
        "B": "image",
        "HOSTNAME": "box",
    }


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"setHostnameAsFQDN": True}, "box"),
        ({"subdomain": "t"}, "box"),
        ({"subdomain": "t", "setHostnameAsFQDN": True}, "box.t.default.svc.cluster.local"),
        ({"subdomain": "t", "setHostnameAsFQDN": True, "hostnameOverride": "own.example"}, "own.example"),
        ({"hostNetwork": True}, os.uname().nodename),
    ],
)
def test_a_process_is_told_the_full_name_or_the_machines_where_a_pod_asks(spec: dict[str, Any], expected: str) -> None:
    pod = make_pod(hostname="box", **spec)
    assert dict(process_environment({}, pod, make_container(), image()))["HOSTNAME"] == expected


def test_a_long_pod_name_is_cut_to_a_host_name() -> None:
    pod = make_pod()
    pod["metadata"]["name"] = "a" * 62 + "-" + "b" * 20
    assert dict(process_environment({}, pod, make_container(), image()))["HOSTNAME"] == "a" * 62
