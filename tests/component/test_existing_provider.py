"""Clusters that Wasilet did not make, for real: a second control plane, adopted by its kubeconfig, through k3d's and
minikube's stand-ins, and left as it was.
"""

from __future__ import annotations

import base64
import copy
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet.cluster.down import down
from wasilet.cluster.opening import open_cluster
from wasilet.cluster.readiness import missing_for_pods
from wasilet.cluster.up import up
from wasilet.console import PlainReporter
from wasilet.controlplane import pod_network
from wasilet.errors import ApiError, HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.credentials import read_credentials
from wasilet.kube.kubeconfig import write_kubeconfig
from wasilet.providers.existing import minified, routed_address
from wasilet.providers.host import node_address
from wasilet.providers.preflight import told_by_pods, try_bootstrap_token
from wasilet.settings import Settings
from wasilet.state import State
from wasilet.steps import Recap, SilentReporter, Status

from tests.clusters import TestCluster, temporary_settings
from tests.rigs.standins.world import World

pytestmark = pytest.mark.component

RBAC = "rbac.authorization.k8s.io"


@pytest.fixture(scope="module")
def foreign(control_plane_cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kubeconfig with the administrator's context of somebody's cluster, and a dead one."""
    admin = yaml.safe_load(control_plane_cluster.admin_kubeconfig.read_text())
    data = copy.deepcopy(admin)
    for section in ("clusters", "contexts", "users"):
        data[section][0]["name"] = "theirs"
    data["contexts"][0]["context"] = {"cluster": "theirs", "user": "theirs"}
    data["clusters"].append({"name": "gone", "cluster": {"server": "https://127.0.0.1:1"}})
    data["contexts"].append({"name": "gone", "context": {"cluster": "gone", "user": "theirs"}})
    data["current-context"] = "theirs"
    path = tmp_path_factory.mktemp("foreign") / "config"
    path.write_text(yaml.safe_dump(data))
    path.chmod(0o600)
    return path


@pytest.fixture
def settings(foreign: Path) -> Iterator[Settings]:
    with temporary_settings("adopted", provider="existing", config=str(foreign), context="theirs", yes=True) as made:
        yield made


def inventory(kube: Kube) -> dict[str, list[str]]:
    paths = {
        "nodes": api_path("nodes"),
        "roles": api_path("clusterroles", group=RBAC),
        "bindings": api_path("clusterrolebindings", group=RBAC),
        "secrets": api_path("secrets"),
        "notices": api_path("configmaps", namespace="kube-public"),
    }
    found = {kind: sorted(o["metadata"]["name"] for o in kube.get(path)["items"]) for kind, path in paths.items()}
    # Every namespace gets it from a controller, in that one's own time.
    found["notices"] = [name for name in found["notices"] if name != "kube-root-ca.crt"]
    return found


def bring_up(settings: Settings) -> Recap:
    log = io.StringIO()
    recap = up(settings, reporter=PlainReporter(log))
    assert recap.succeeded, log.getvalue()
    return recap


def refused(settings: Settings) -> UsageError:
    with pytest.raises(UsageError) as caught:
        up(settings, reporter=SilentReporter())
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    assert not State.of(settings).path.exists()
    return caught.value


# --- existing --------------------------------------------------------------------------------------------------------


def test_it_is_adopted_used_and_left_as_it_was(settings: Settings, control_plane_cluster: TestCluster) -> None:
    before = inventory(control_plane_cluster.kube)
    bring_up(settings)
    with open_cluster(settings) as cluster:
        assert not missing_for_pods(cluster.admin(), cluster.node_names())
        taints = cluster.admin().get(api_path("nodes", "adopted-1"))["spec"]["taints"]
        assert {taint["key"] for taint in taints} == {"kubernetes.io/arch"}
    again = bring_up(settings)
    assert [outcome.name for outcome in again.outcomes if outcome.status is Status.CHANGED] == []
    without_options = replace(settings, config=None, context="", yes=False)
    assert bring_up(without_options).succeeded
    assert down(settings, reporter=SilentReporter()).succeeded
    assert inventory(control_plane_cluster.kube) == before


def test_no_context_is_ever_guessed(settings: Settings) -> None:
    error = refused(replace(settings, context=""))
    assert error.message == "which cluster? Name its context: --context NAME"
    assert "theirs, gone" in error.hint


def test_nothing_is_changed_before_yes(settings: Settings, control_plane_cluster: TestCluster) -> None:
    before = inventory(control_plane_cluster.kube)
    error = refused(replace(settings, yes=False))
    assert "nothing was changed" in error.message
    assert "a bootstrap token in kube-system" in error.message
    assert error.hint == "add --yes to go on"
    assert inventory(control_plane_cluster.kube) == before


def test_check_needs_no_yes_and_changes_nothing(settings: Settings, control_plane_cluster: TestCluster) -> None:
    before = inventory(control_plane_cluster.kube)
    recap = up(replace(settings, yes=False), reporter=SilentReporter(), check=True)
    assert recap.succeeded
    assert inventory(control_plane_cluster.kube) == before
    assert not State.of(settings).path.exists()


@pytest.mark.parametrize("ready", ["True", "Unknown"])
def test_a_node_that_another_wasilet_runs_is_neither_taken_nor_deleted(
    settings: Settings, control_plane_cluster: TestCluster, ready: str
) -> None:
    kube, path = control_plane_cluster.kube, api_path("nodes", "adopted-1")
    made = kube.create(api_path("nodes"), {"metadata": {"name": "adopted-1"}})
    try:
        condition = {"type": "Ready", "status": ready, "reason": "x", "message": "x"}
        kube.patch(f"{path}/status", {"status": {"conditions": [condition]}})
        if ready == "True":
            error = refused(settings)
            assert error.message == "the cluster has a node adopted-1 already, which another Wasilet runs"
            assert kube.get(path)["metadata"]["uid"] == made["metadata"]["uid"]
        else:
            with pytest.raises(UsageError, match="add to the cluster"):
                up(replace(settings, yes=False), reporter=SilentReporter())
    finally:
        kube.delete(path)


def test_a_kubeconfig_whose_server_is_gone(settings: Settings) -> None:
    error = refused(replace(settings, context="gone"))
    assert error.message.startswith("the cluster of context 'gone' is not there:")


def test_a_context_that_is_not_there(settings: Settings) -> None:
    error = refused(replace(settings, context="thiers"))
    assert "has no context 'thiers'" in error.message
    assert error.hint == "its contexts: theirs, gone"


def test_another_context_is_another_cluster(settings: Settings) -> None:
    bring_up(settings)
    with pytest.raises(UsageError, match="was adopted from context 'theirs', not 'gone'"):
        up(replace(settings, context="gone"), reporter=SilentReporter())


def test_credentials_that_are_refused(settings: Settings, foreign: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(foreign.read_text())
    data["users"][0]["user"] = {"token": "worthless"}
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(data))
    error = refused(replace(settings, config=path))
    assert error.message == "the cluster of context 'theirs' refuses its credentials"


def test_missing_rights_are_all_named_at_once(
    settings: Settings, control_plane_cluster: TestCluster, tmp_path: Path
) -> None:
    kube = control_plane_cluster.kube
    made = kube.create(api_path("serviceaccounts", namespace="default"), {"metadata": {"generateName": "weak-"}})
    name = made["metadata"]["name"]
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": "view"},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "default"}],
    }
    kube.create(api_path("clusterrolebindings", group=RBAC), binding)
    try:
        path = api_path("serviceaccounts", name, namespace="default", sub="token")
        token = kube.create(path, {"spec": {"expirationSeconds": 600}})["status"]["token"]
        credentials = control_plane_cluster.cluster.admin_credentials()
        config = tmp_path / "weak"
        write_kubeconfig(config, name="weak", server=credentials.server, ca=credentials.ca, token=token)
        error = refused(replace(settings, config=config, context="weak"))
        assert "has no right to create secrets in kube-system; " in error.message
        assert "approve signers kubernetes.io/kube-apiserver-client" in error.message
        assert "create clusterrolebindings" in error.message
    finally:
        kube.delete(api_path("clusterrolebindings", name, group=RBAC))
        kube.delete(api_path("serviceaccounts", name, namespace="default"))


def test_a_token_is_tried_and_gone_again(control_plane_cluster: TestCluster) -> None:
    secrets = api_path("secrets", namespace="kube-system")
    kube = control_plane_cluster.kube
    before = [o["metadata"]["name"] for o in kube.get(secrets)["items"]]
    try_bootstrap_token(kube, read_credentials(control_plane_cluster.admin_kubeconfig))
    assert [o["metadata"]["name"] for o in kube.get(secrets)["items"]] == before


class _Deaf(Kube):
    """An API server that knows no bootstrap tokens, as far as the trial can see: it never gets to know this one."""

    def create(self, path: str, body: KubeObject, *, timeout_seconds: float = 10.0) -> KubeObject:
        assert timeout_seconds
        if path.endswith("/secrets"):
            return body
        return super().create(path, body)


def test_a_server_that_takes_no_tokens_is_found_out(
    control_plane_cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wasilet.providers.preflight.TOKEN_TRIAL_SECONDS", 0.3)
    credentials = read_credentials(control_plane_cluster.admin_kubeconfig)
    deaf = _Deaf(credentials)
    try:
        with pytest.raises(HarnessError, match="accepts no bootstrap tokens") as caught:
            try_bootstrap_token(deaf, credentials)
        assert "--enable-bootstrap-token-auth=true" in caught.value.hint
    finally:
        deaf.close()


@pytest.mark.parametrize(
    ("component", "command", "problem"),
    [
        ("kube-apiserver", ["kube-apiserver", "--secure-port=6443"], "accepts no bootstrap tokens"),
        ("kube-apiserver", ["kube-apiserver", "--enable-bootstrap-token-auth=false"], "accepts no bootstrap tokens"),
        ("kube-apiserver", ["kube-apiserver", "--enable-bootstrap-token-auth=true"], ""),
        ("kube-apiserver", ["kube-apiserver", "--enable-bootstrap-token-auth"], ""),
        ("kube-controller-manager", ["kcm", "--controllers=*"], "signs no certificates"),
        (
            "kube-controller-manager",
            ["kcm", "--controllers=*,-csrsigning", "--cluster-signing-cert-file=a"],
            "signs no certificates",
        ),
        ("kube-controller-manager", ["kcm", "--controllers=*", "--cluster-signing-cert-file=a"], ""),
        ("kube-controller-manager", ["kcm", "--cluster-signing-kubelet-client-cert-file=a"], ""),
    ],
)
def test_static_pods_tell_what_is_switched_off(
    control_plane_cluster: TestCluster, component: str, command: list[str], problem: str
) -> None:
    kube = control_plane_cluster.kube
    pods = api_path("pods", namespace="kube-system")
    spec = {"containers": [{"name": "main", "image": "none", "command": command}], "nodeSelector": {"no": "where"}}
    metadata = {"generateName": "told-", "labels": {"component": component}}
    name = kube.create(pods, {"metadata": metadata, "spec": spec})["metadata"]["name"]
    try:
        found = told_by_pods(kube)
        assert (found[0] if found else "") == "" if not problem else found and problem in found[0]
    finally:
        kube.delete(f"{pods}/{name}", gracePeriodSeconds="0")


def test_the_address_is_that_of_the_way_to_the_server(settings: Settings) -> None:
    assert routed_address("https://127.0.0.1:6443", settings) == node_address(settings)
    with pytest.raises(UsageError, match="does not resolve"):
        routed_address("https://nowhere.invalid:6443", settings)


def test_a_context_stays_what_it_is_when_it_is_copied(tmp_path: Path) -> None:
    data = {
        "clusters": [{"name": "c", "cluster": {"server": "https://x", "certificate-authority": "pki/ca.crt"}}],
        "contexts": [
            {"name": "one", "context": {"cluster": "c", "user": "plugin", "namespace": "prod"}},
            {"name": "two", "context": {"cluster": "c", "user": "missing"}},
        ],
        "users": [{"name": "plugin", "user": {"exec": {"command": "./login", "apiVersion": "v1", "args": ["a"]}}}],
    }
    source = tmp_path / "config"
    source.write_text(yaml.safe_dump(data))
    found = minified(source, "one")
    assert found["clusters"][0]["cluster"]["certificate-authority"] == str(tmp_path / "pki/ca.crt")
    assert found["users"][0]["user"]["exec"] == {
        "command": str(tmp_path / "login"), "apiVersion": "v1", "args": ["a"],
    }  # fmt: skip
    with pytest.raises(UsageError, match="names a user 'missing' that it does not hold"):
        minified(source, "two")


@pytest.mark.parametrize("key", ["proxy-url", "tls-server-name"])
def test_what_nodes_could_not_use_is_refused(settings: Settings, foreign: Path, tmp_path: Path, key: str) -> None:
    data = yaml.safe_load(foreign.read_text())
    data["clusters"][0]["cluster"][key] = "somewhere"
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(data))
    assert f"reaches its server by {key}" in refused(replace(settings, config=path)).message


# --- stand-ins -------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path, control_plane_cluster: TestCluster) -> World:
    made = World(tmp_path / "machine")
    made.folder.mkdir()
    address = node_address(control_plane_cluster.settings)
    made.configure(gateway=address, kubeconfig=str(control_plane_cluster.admin_kubeconfig))
    return made


def with_tools(world: World, provider: str, *tools: str, **given: Any) -> Any:
    environment: Mapping[str, str] = world.environment(os.environ, *tools)
    return temporary_settings(f"by-{provider}", provider=provider, environment=environment, **given)


def without_pod_network(settings: Settings, kube: Kube) -> None:
    """That `status` and the Node's condition give the reason."""
    with open_cluster(settings) as cluster:
        reason = f"wasm pods beside the nodes of provider {settings.provider} share this machine's network"
        assert pod_network.described(cluster.state)["absent"] == reason
        node = kube.get(api_path("nodes", cluster.node_names()[0]))
    said = {each["type"]: each.get("message") for each in node["status"]["conditions"]}
    assert reason in said["NetworkUnavailable"]


def test_k3d_is_created_joined_and_deleted(world: World, control_plane_cluster: TestCluster) -> None:
    before = inventory(control_plane_cluster.kube)
    with with_tools(world, "k3d", "docker", "k3d", kubernetes_version="1.33.5") as settings:
        bring_up(settings)
        (create,) = world.calls("k3d", "cluster", "create")
        assert "--k3s-arg=--egress-selector-mode=disabled@server:*" in create
        assert "--k3s-arg=--kube-apiserver-arg=enable-bootstrap-token-auth=true@server:*" in create
        assert "--image=docker.io/rancher/k3s:v1.33.5-k3s1" in create
        again = bring_up(settings)
        assert [outcome.name for outcome in again.outcomes if outcome.status is Status.CHANGED] == []
        assert len(world.calls("k3d", "cluster", "create")) == 1
        world.write("containers", [container | {"running": False} for container in world.read("containers", [])])
        bring_up(settings)
        assert [words[:4] for words in world.calls("k3d", "cluster", "start")] == [
            ["k3d", "cluster", "start", "by-k3d"]
        ]
        with open_cluster(settings) as cluster:
            assert cluster.provider.access(cluster).node_address == world.setting("gateway")
        without_pod_network(settings, control_plane_cluster.kube)
        assert down(settings, reporter=SilentReporter(), purge=True).succeeded
        assert world.calls("k3d", "cluster", "delete") == [["k3d", "cluster", "delete", "by-k3d"]]
    for name in set(inventory(control_plane_cluster.kube)["nodes"]) - set(before["nodes"]):
        control_plane_cluster.kube.delete(api_path("nodes", name))
    control_plane_cluster.kube.delete(api_path("configmaps", "local-registry-hosting", namespace="kube-public"))


def k3d_server(world: World, *args: str) -> None:
    labels = {"k3d.cluster": "by-k3d", "k3d.role": "server"}
    world.add_container(
        id="theirs", name="k3d-by-k3d-server-0", labels=labels, gateway=world.setting("gateway"), args=["server", *args]
    )


def test_an_adopted_k3d_without_direct_ways_to_nodes_is_refused(world: World) -> None:
    k3d_server(world, "--tls-san", "0.0.0.0")
    with with_tools(world, "k3d", "docker", "k3d") as settings:
        recap = up(settings, reporter=SilentReporter())
        (failure,) = recap.failures
        assert "reaches nodes only through k3s's own tunnel" in failure.detail
        assert "--egress-selector-mode=disabled@server:*" in failure.hint
    assert world.calls("k3d", "cluster", "delete") == []


def test_a_stopped_k3d_of_somebody_else_is_left_so_with_what_starts_it(world: World) -> None:
    k3d_server(world, "--egress-selector-mode=disabled")
    world.write("containers", [container | {"running": False} for container in world.read("containers", [])])
    with with_tools(world, "k3d", "docker", "k3d") as settings:
        (failure,) = up(settings, reporter=SilentReporter()).failures
        assert (failure.detail, failure.hint) == ("k3d cluster by-k3d is stopped", "k3d cluster start by-k3d")
    assert world.calls("k3d", "cluster", "start") == []


@pytest.mark.parametrize("way", ["one word", "two words", "file"])
def test_an_adopted_k3d_with_direct_ways_stays_when_we_go(
    world: World, control_plane_cluster: TestCluster, way: str
) -> None:
    before = inventory(control_plane_cluster.kube)
    arguments = {
        "one word": ("--egress-selector-mode=disabled",),
        "two words": ("--egress-selector-mode", "disabled"),
        "file": (),
    }[way]
    k3d_server(world, *arguments)
    if way == "file":
        file = world.folder / "files/theirs/etc/rancher/k3s/config.yaml"
        file.parent.mkdir(parents=True)
        file.write_text("egress-selector-mode: disabled\n")
    with with_tools(world, "k3d", "docker", "k3d") as settings:
        bring_up(settings)
        assert down(settings, reporter=SilentReporter(), purge=True).succeeded
    assert world.calls("k3d", "cluster", "create") == world.calls("k3d", "cluster", "delete") == []
    assert inventory(control_plane_cluster.kube) == before


def test_an_old_k3d_and_none(world: World) -> None:
    world.configure(k3d_version="v4.4.8")
    with with_tools(world, "k3d", "docker", "k3d") as settings:
        assert "is k3d 4.4.8, and 5.0 or newer is needed" in refused(settings).message
    with with_tools(world, "k3d", "docker") as settings:
        assert refused(settings).message == "k3d is not installed, or not on PATH"


@pytest.mark.parametrize("driver", ["docker", "kvm2"])
def test_minikube_is_started_joined_and_deleted(
    world: World, control_plane_cluster: TestCluster, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIKUBE_DRIVER", driver)
    before = inventory(control_plane_cluster.kube)
    with with_tools(world, "minikube", "minikube", kubernetes_version="1.34.4") as settings:
        bring_up(settings)
        (start,) = world.calls("minikube", "start")
        assert "--profile=by-minikube" in start
        assert "--extra-config=apiserver.enable-bootstrap-token-auth=true" in start
        assert "--kubernetes-version=v1.34.4" in start
        port = State.of(settings).read()["ports"]["registry_for_nodes"]
        wired = (world.folder / "files/by-minikube/hosts.toml").read_text()
        assert f'[host."http://{world.setting("gateway")}:{port}"]' in wired
        again = bring_up(settings)
        assert [outcome.name for outcome in again.outcomes if outcome.status is Status.CHANGED] == []
        world.write("running", [])
        bring_up(settings)
        assert len(world.calls("minikube", "start")) == 2
        without_pod_network(settings, control_plane_cluster.kube)
        assert down(settings, reporter=SilentReporter(), purge=True).succeeded
        assert world.read("profiles", {}) == {}
    for name in set(inventory(control_plane_cluster.kube)["nodes"]) - set(before["nodes"]):
        control_plane_cluster.kube.delete(api_path("nodes", name))
    control_plane_cluster.kube.delete(api_path("configmaps", "local-registry-hosting", namespace="kube-public"))


def minikube_profile(world: World, *, driver: str = "docker", runtime: str = "docker", running: bool = True) -> None:
    config = {"Driver": driver, "KubernetesConfig": {"ContainerRuntime": runtime}}
    world.write("profiles", {"by-minikube": config})
    world.write("running", ["by-minikube"] if running else [])


def test_an_adopted_profile_stays_and_its_docker_is_not_lied_to(
    world: World, control_plane_cluster: TestCluster, tmp_path: Path
) -> None:
    before = inventory(control_plane_cluster.kube)
    minikube_profile(world)
    admin = yaml.safe_load(control_plane_cluster.admin_kubeconfig.read_text())
    admin["contexts"][0]["name"] = "by-minikube"
    with with_tools(world, "minikube", "minikube") as settings:
        Path(settings.environ["KUBECONFIG"]).write_text(yaml.safe_dump(admin))
        recap = bring_up(settings)
        skipped = {outcome.name for outcome in recap.outcomes if outcome.status is Status.SKIPPED}
        assert "registry of minikube's nodes" in skipped
        assert inventory(control_plane_cluster.kube)["notices"] == before["notices"]
        assert down(settings, reporter=SilentReporter(), purge=True).succeeded
    assert world.calls("minikube", "start") == world.calls("minikube", "delete") == []
    assert inventory(control_plane_cluster.kube) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [({"running": False}, "does not run"), ({"driver": "none"}, "docker and kvm2 are supported")],
)
def test_profiles_that_cannot_be_adopted(world: World, given: Mapping[str, Any], message: str) -> None:
    minikube_profile(world, **given)
    with with_tools(world, "minikube", "minikube") as settings:
        recap = up(settings, reporter=SilentReporter())
        (failure,) = recap.failures
        assert message in failure.detail
    assert world.calls("minikube", "start") == []


def test_an_old_minikube_and_none(world: World) -> None:
    world.configure(minikube_version="1.20.0")
    with with_tools(world, "minikube", "minikube") as settings:
        assert "is minikube v1.20.0, and v1.26 or newer is needed" in refused(settings).message
    with with_tools(world, "minikube") as settings:
        assert refused(settings).message == "minikube is not installed, or not on PATH"


def test_the_approvers_certificate_is_kept_until_the_last_third_of_its_life(settings: Settings) -> None:
    bring_up(settings)
    with open_cluster(settings) as cluster:
        path = cluster.provider.approver_kubeconfig(cluster)
        first = path.read_bytes()
        cluster.provider.approver_kubeconfig(cluster)
        assert path.read_bytes() == first
        data = yaml.safe_load(first)
        data["users"][0]["user"]["client-certificate-data"] = base64.b64encode(b"not PEM").decode()
        path.write_text(yaml.safe_dump(data))
        cluster.provider.approver_kubeconfig(cluster)
        assert path.read_bytes() != first
        renewed = Kube.from_kubeconfig(path)
        try:
            assert renewed.get(api_path("certificatesigningrequests", group="certificates.k8s.io"))["items"]
            with pytest.raises(ApiError):
                renewed.get(api_path("secrets"))
        finally:
            renewed.close()
