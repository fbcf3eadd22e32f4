"""Each kind of volume is set up, kept up to date and refused as kubelet would."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.kube.base import ApiUnavailableError
from wasilet_node.volumes import removal
from wasilet_node.volumes.base import ContainerConfigError, VolumeError, VolumeRefusedError
from wasilet_node.volumes.pod_dirs import PodDirs

from tests.unit.node.volumes.rig import Guest, Rig, make_container, make_pod

pytestmark = pytest.mark.unit


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path, ttl_seconds=0.0)
    yield rig
    await rig.close()


def pod_with(source: dict[str, Any], **mount: Any) -> dict[str, Any]:
    return make_pod(
        volumes=[{"name": "vol", **source}],
        containers=[make_container({"name": "vol", "mountPath": "/v", **mount})],
    )


def contents(host: str) -> list[str]:
    return [entry.read_text() for entry in Path(host).iterdir() if not entry.name.startswith("..")]


async def guest_with(rig: Rig, pod: dict[str, Any]) -> Guest:
    return Guest(list((await rig.mounts(pod)).values()))


SERVICE_ACCOUNT = {
    "projected": {
        "defaultMode": 0o644,
        "sources": [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ],
    }
}


async def test_a_module_reads_its_service_account_through_the_links(rig: Rig) -> None:
    rig.kube.config_map("kube-root-ca.crt", {"ca.crt": "CERTIFICATE"})
    guest = await guest_with(rig, pod_with(SERVICE_ACCOUNT, readOnly=True))
    assert guest.read("/v/ca.crt") == b"CERTIFICATE"
    assert guest.read("/v/namespace") == b"default"
    assert guest.read("/v/token").startswith(b"head.")


async def test_an_update_reaches_a_running_module(rig: Rig) -> None:
    rig.kube.config_map("kube-root-ca.crt", {"ca.crt": "one"})
    pod = pod_with(SERVICE_ACCOUNT)
    guest = await guest_with(rig, pod)
    first = guest.read("/v/token")
    rig.kube.config_map("kube-root-ca.crt", {"ca.crt": "two"})
    rig.kube.now += 3000
    await rig.volumes.refresh(pod)
    assert guest.read("/v/ca.crt") == b"two"
    assert guest.read("/v/token") != first


async def test_a_token_lies_in_memory_and_is_private(rig: Rig) -> None:
    rig.kube.config_map("kube-root-ca.crt", {"ca.crt": "one"})
    host = Path((await rig.mounts(pod_with(SERVICE_ACCOUNT)))["/v"].host)
    assert host.is_relative_to(rig.memory)
    assert stat.S_IMODE((host / "token").stat().st_mode) == 0o600
    area = next(rig.memory.iterdir())
    assert stat.S_IMODE(area.stat().st_mode) == 0o700


async def test_a_config_map_gives_text_and_binary_all_or_items(rig: Rig) -> None:
    rig.kube.config_map("cm", {"a": "text", "b": "other"}, binaryData={"bin": "AP8="})
    guest = await guest_with(rig, pod_with({"configMap": {"name": "cm"}}))
    assert (guest.read("/v/a"), guest.read("/v/bin")) == (b"text", b"\x00\xff")
    items = [{"key": "bin", "path": "deep/er/x", "mode": 0o400}]
    pod = pod_with({"configMap": {"name": "cm", "items": items}})
    pod["metadata"]["uid"] = "pod-2"
    guest = await guest_with(rig, pod)
    assert guest.read("/v/deep/er/x") == b"\x00\xff"
    with pytest.raises(OSError, match="WASI errno 44"):
        guest.read("/v/a")


async def test_a_module_cannot_write_to_what_is_projected(rig: Rig) -> None:
    rig.kube.config_map("cm", {"a": "text"})
    guest = await guest_with(rig, pod_with({"configMap": {"name": "cm"}}))
    with pytest.raises(OSError, match="WASI errno"):
        guest.write("/v/a", b"changed")
    with pytest.raises(OSError, match="WASI errno"):
        guest.write("/v/new", b"x")
    assert guest.read("/v/a") == b"text"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"configMap": {"name": "none"}}, 'configmap "none" not found'),
        ({"secret": {"secretName": "none"}}, 'secret "none" not found'),
        (
            {"configMap": {"name": "cm", "items": [{"key": "k", "path": "p"}]}},
            "configmap references non-existent config key: k",
        ),
        (
            {"secret": {"secretName": "sec", "items": [{"key": "k", "path": "p"}]}},
            "references non-existent secret key: k",
        ),
        ({"configMap": {"name": "cm", "items": [{"key": "a", "path": "../p"}]}}, "invalid path: must not contain '..'"),
        (
            {"projected": {"sources": [{"secret": {"name": "x"}}, {"configMap": {"name": "y"}}]}},
            '[secret "x" not found, configmap "y" not found]',
        ),
        (
            {"downwardAPI": {"items": [{"path": "p", "fieldRef": {"fieldPath": "spec.nodeName"}}]}},
            "unsupported fieldPath: spec.nodeName",
        ),
        (
            {
                "downwardAPI": {
                    "items": [{"path": "p", "resourceFieldRef": {"containerName": "x", "resource": "limits.cpu"}}]
                }
            },
            "container x not found",
        ),
    ],
)
async def test_what_is_missing_is_named_in_kubelets_words(rig: Rig, source: dict[str, Any], message: str) -> None:
    rig.kube.config_map("cm", {"a": "1"})
    rig.kube.secret("sec", {"a": b"1"})
    with pytest.raises(VolumeError) as caught:
        await rig.volumes.setup(pod_with(source))
    assert str(caught.value).startswith('MountVolume.SetUp failed for volume "vol" : ')
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        {"configMap": {"name": "none", "optional": True}},
        {"secret": {"secretName": "none", "optional": True}},
        {"secret": {"secretName": "sec", "optional": True, "items": [{"key": "k", "path": "p"}]}},
        {"projected": {"sources": [{"secret": {"name": "none", "optional": True}}]}},
    ],
)
async def test_optional_sources_may_be_missing_and_come_later(rig: Rig, source: dict[str, Any]) -> None:
    rig.kube.secret("sec", {"a": b"1"})
    pod = pod_with(source)
    host = (await rig.mounts(pod))["/v"].host
    assert contents(host) == []
    rig.kube.config_map("none", {"k": "now"})
    rig.kube.secret("none", {"k": b"now"})
    rig.kube.secret("sec", {"k": b"now"})
    await rig.volumes.refresh(pod)
    assert contents(host) == ["now"]


async def test_labels_are_updated_with_the_pod(rig: Rig) -> None:
    item = {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}
    pod = pod_with({"downwardAPI": {"items": [item]}})
    guest = await guest_with(rig, pod)
    assert guest.read("/v/labels") == b'app="web"'
    pod["metadata"]["labels"] = {"b": 'say "hi"\n', "a": "é"}
    await rig.volumes.refresh(pod)
    assert guest.read("/v/labels").decode() == 'a="é"\nb="say \\"hi\\"\\n"'


async def test_an_unset_limit_reads_as_the_nodes_allocatable(rig: Rig) -> None:
    reference = {"containerName": "main", "resource": "limits.memory", "divisor": "1Gi"}
    guest = await guest_with(rig, pod_with({"downwardAPI": {"items": [{"path": "m", "resourceFieldRef": reference}]}}))
    assert guest.read("/v/m") == b"8"


async def test_a_failing_refresh_leaves_what_was_there(rig: Rig) -> None:
    rig.kube.config_map("cm", {"a": "1"})
    pod = pod_with({"configMap": {"name": "cm"}})
    guest = await guest_with(rig, pod)
    rig.kube.remove("/api/v1/namespaces/default/configmaps/cm")
    with pytest.raises(VolumeError, match='configmap "cm" not found'):
        await rig.volumes.refresh(pod)
    assert guest.read("/v/a") == b"1"


async def test_after_a_restart_without_an_api_server_published_volumes_stay_usable(rig: Rig) -> None:
    rig.kube.config_map("cm", {"a": "1"})
    pod = pod_with({"configMap": {"name": "cm"}})
    await rig.volumes.setup(pod)
    rig.kube.unavailable = ApiUnavailableError("away")
    rig.volumes.close()
    rig.volumes = rig.manager()
    assert (await guest_with(rig, pod)).read("/v/a") == b"1"


async def test_only_volumes_that_a_container_mounts_are_set_up(rig: Rig) -> None:
    pod = make_pod(volumes=[{"name": "unused", "configMap": {"name": "none"}}])
    await rig.volumes.setup(pod)
    assert not rig.kube.calls


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"nfs": {"server": "x", "path": "/"}}, "volumes of kind nfs are not supported by this node"),
        ({"csi": {"driver": "x"}}, "volumes of kind csi are not supported"),
        ({"iscsi": {}}, "volumes of kind iscsi are not supported"),
        ({"gitRepo": {"repository": "x"}}, "volumes of kind gitRepo are not supported"),
        ({"image": {}}, "no image is named"),
        ({"emptyDir": {"medium": "HugePages-2Mi"}}, "emptyDir medium HugePages-2Mi is not supported"),
        (
            {"projected": {"sources": [{"dance": {}}]}},
            "projected source dance is not supported",
        ),
    ],
)
def test_what_can_never_work_is_refused_by_name(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    async def refuse() -> None:
        rig = Rig(tmp_path)
        try:
            rig.volumes.check(pod_with(source))
        finally:
            await rig.close()

    with pytest.raises(VolumeRefusedError) as caught:
        asyncio.run(refuse())
    assert str(caught.value).startswith('volume "vol": ')
    assert message in str(caught.value)


async def test_block_devices_are_refused_and_everything_supported_is_not(rig: Rig) -> None:
    rig.volumes.check(pod_with(SERVICE_ACCOUNT))
    rig.volumes.check(pod_with({}))
    for kind in ("emptyDir", "hostPath", "secret", "configMap", "persistentVolumeClaim", "ephemeral", "downwardAPI"):
        rig.volumes.check(pod_with({kind: {}}))
    pod = make_pod(containers=[make_container(volumeDevices=[{"name": "x", "devicePath": "/dev/x"}])])
    with pytest.raises(VolumeRefusedError, match="volumeDevices"):
        rig.volumes.check(pod)


@pytest.mark.parametrize("source", [{"emptyDir": {}}, {"emptyDir": {"medium": "Memory"}}, {}])
async def test_an_empty_dir_keeps_its_files_over_restarts_of_container_and_agent(
    rig: Rig, source: dict[str, Any]
) -> None:
    pod = pod_with(source)
    (await guest_with(rig, pod)).write("/v/file", b"kept")
    rig.volumes.close()
    rig.volumes = rig.manager()
    guest = Guest(list((await rig.mounts(pod, attempt=1)).values()))
    assert guest.read("/v/file") == b"kept"


async def test_a_memory_volume_is_in_memory(rig: Rig) -> None:
    mounts = await rig.mounts(pod_with({"emptyDir": {"medium": "Memory"}}))
    assert Path(mounts["/v"].host).is_relative_to(rig.memory)


async def test_what_vanished_from_memory_is_made_again(rig: Rig) -> None:
    rig.kube.secret("s", {"k": b"secret"})
    pod = pod_with({"secret": {"secretName": "s"}})
    await rig.mounts(pod)
    shutil.rmtree(next(rig.memory.iterdir()))
    assert (await guest_with(rig, pod)).read("/v/k") == b"secret"


async def test_what_a_guest_writes_is_measured_for_eviction(rig: Rig) -> None:
    pod = pod_with({"emptyDir": {}})
    guest = await guest_with(rig, pod)
    for number in range(20):
        guest.write(f"/v/big{number}", b"x" * 100_000)
    for number in range(5):
        guest.write(f"/outside{number}", b"x" * 100_000)
    assert 2_000_000 < (await rig.volumes.usage(pod))["vol"].bytes < 3_000_000
    root = rig.volumes.instance_folder(pod, pod["spec"]["containers"][0]["name"], 0)
    assert 500_000 < removal.usage(root).bytes < 1_000_000


@pytest.mark.parametrize("type_", ["Directory", "DirectoryOrCreate", ""])
async def test_a_host_folder_is_shared(rig: Rig, type_: str) -> None:
    (rig.folder / "host").mkdir()
    guest = await guest_with(rig, pod_with({"hostPath": {"path": str(rig.folder / "host"), "type": type_}}))
    guest.write("/v/file", b"x")
    assert (rig.folder / "host/file").read_bytes() == b"x"


@pytest.mark.parametrize("type_", ["DirectoryOrCreate", ""])
async def test_a_missing_host_folder_is_made(rig: Rig, type_: str) -> None:
    await rig.mounts(pod_with({"hostPath": {"path": str(rig.folder / "a/b"), "type": type_}}))
    assert (rig.folder / "a/b").is_dir()


@pytest.mark.parametrize(
    ("type_", "what"),
    [
        ("Directory", "a directory"),
        ("DirectoryOrCreate", "a directory"),
        ("File", "a file"),
        ("FileOrCreate", "a file"),
        ("Socket", "a socket file"),
        ("CharDevice", "a character device"),
        ("BlockDevice", "a block device"),
    ],
)
async def test_a_host_path_of_another_type_fails_in_kubelets_words(rig: Rig, type_: str, what: str) -> None:
    path = rig.folder / "fifo"
    os.mkfifo(path)
    with pytest.raises(VolumeError) as caught:
        await rig.volumes.setup(pod_with({"hostPath": {"path": str(path), "type": type_}}))
    assert str(caught.value).endswith(f": hostPath type check failed: {path} is not {what}")


async def test_a_host_path_type_that_does_not_exist_is_named(rig: Rig) -> None:
    with pytest.raises(VolumeError, match="Fifo is an invalid volume type"):
        await rig.volumes.setup(pod_with({"hostPath": {"path": "/x", "type": "Fifo"}}))


async def test_sockets_devices_and_pipes_cannot_be_mounted_and_are_not_opened(rig: Rig) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short}/s")
        os.mkfifo(f"{short}/p")
        for path, type_ in ((f"{short}/s", "Socket"), (f"{short}/p", ""), ("/dev/null", "CharDevice")):
            pod = pod_with({"hostPath": {"path": path, "type": type_}})
            pod["metadata"]["uid"] = path[-1]
            with pytest.raises(ContainerConfigError, match="all that a WASI module can open"):
                await rig.mounts(pod)


@pytest.mark.parametrize("path", ["relative", "/a/../b"])
async def test_a_host_path_is_absolute_and_plain(rig: Rig, path: str) -> None:
    with pytest.raises(VolumeError, match=r"absolute path without '\.\.'"):
        await rig.volumes.setup(pod_with({"hostPath": {"path": path}}))


def put_claim(rig: Rig, source: dict[str, Any], name: str = "data", **status: Any) -> dict[str, Any]:
    claim = rig.kube.put(
        f"/api/v1/namespaces/default/persistentvolumeclaims/{name}",
        spec={"volumeName": "pv"},
        status={"phase": "Bound", **status},
    )
    rig.kube.put(
        "/api/v1/persistentvolumes/pv",
        spec={"claimRef": {"uid": claim["metadata"]["uid"]}, "capacity": {}, "accessModes": [], **source},
    )
    return claim


CLAIM = {"persistentVolumeClaim": {"claimName": "data"}}


@pytest.mark.parametrize("kind", ["local", "hostPath"])
async def test_a_claim_leads_to_its_volumes_folder(rig: Rig, kind: str) -> None:
    (rig.folder / "disk").mkdir()
    put_claim(rig, {kind: {"path": str(rig.folder / "disk")}})
    guest = await guest_with(rig, pod_with(CLAIM))
    guest.write("/v/file", b"x")
    await rig.volumes.teardown("pod-1")
    assert (rig.folder / "disk/file").read_bytes() == b"x", "a claim's files outlive the pod"


async def test_a_read_only_claim_is_read_only(rig: Rig) -> None:
    (rig.folder / "disk").mkdir()
    put_claim(rig, {"local": {"path": str(rig.folder / "disk")}})
    pod = pod_with({"persistentVolumeClaim": {"claimName": "data", "readOnly": True}})
    assert (await rig.mounts(pod))["/v"].read_only


async def test_claims_that_cannot_serve_say_why(rig: Rig) -> None:
    async def message() -> str:
        with pytest.raises(VolumeError) as caught:
            await rig.volumes.setup(pod_with(CLAIM))
        return str(caught.value)

    assert "error processing PVC default/data: failed to fetch PVC from API server" in await message()
    put_claim(rig, {"local": {"path": "/nowhere/at/all"}}, phase="Pending")
    assert (await message()).endswith("error processing PVC default/data: PVC is not bound")
    claim = put_claim(rig, {"local": {"path": "/nowhere/at/all"}})
    assert 'path "/nowhere/at/all" does not exist' in await message()
    claim["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert "PVC is being deleted" in await message()
    claim["metadata"]["finalizers"] = ["kubernetes.io/pvc-protection"]
    assert "does not exist" in await message()
    put_claim(rig, {"nfs": {"server": "x"}})
    assert "is of kind nfs; this node serves local and hostPath volumes only" in await message()
    put_claim(rig, {"local": {"path": "/"}, "volumeMode": "Block"})
    assert "volumeMode Block" in await message()
    put_claim(rig, {"local": {"path": "/"}, "claimRef": {"uid": "other"}})
    assert "pv.Spec.ClaimRef.UID other does not point to claim.UID uid-of-data" in await message()


async def test_an_ephemeral_claim_must_belong_to_the_pod(rig: Rig) -> None:
    (rig.folder / "disk").mkdir()
    claim = put_claim(rig, {"local": {"path": str(rig.folder / "disk")}}, name="web-vol")
    pod = pod_with({"ephemeral": {"volumeClaimTemplate": {}}})
    with pytest.raises(
        VolumeError, match=r"PVC default/web-vol was not created for pod default/web \(pod is not owner"
    ):
        await rig.volumes.setup(pod)
    claim["metadata"]["ownerReferences"] = [{"uid": "pod-1", "controller": True}]
    assert (await rig.mounts(pod))["/v"].host == str(rig.folder / "disk")


async def test_teardown_removes_everything_everywhere_and_can_be_repeated(rig: Rig) -> None:
    rig.kube.config_map("kube-root-ca.crt", {"ca.crt": "one"})
    pod = pod_with(SERVICE_ACCOUNT)
    pod["spec"]["volumes"].append({"name": "e", "emptyDir": {}})
    pod["spec"]["containers"][0]["volumeMounts"].append({"name": "e", "mountPath": "/e"})
    await rig.mounts(pod)
    assert await rig.volumes.orphans() == ["pod-1"]
    await rig.volumes.teardown("pod-1")
    await rig.volumes.teardown("pod-1")
    assert await rig.volumes.orphans() == []
    assert list(rig.pods.iterdir()) == []
    assert [path.name for path in next(rig.memory.iterdir()).iterdir()] == [".owner"]
    assert rig.references._pods == {}
    assert rig.tokens._tokens == {}


async def test_an_orphan_of_an_earlier_agent_is_found_and_removed(rig: Rig) -> None:
    await rig.volumes.setup(pod_with({"emptyDir": {"medium": "Memory"}}))
    rig.volumes.close()
    rig.volumes = rig.manager()
    assert await rig.volumes.orphans() == ["pod-1"]
    await rig.volumes.teardown("pod-1")
    assert await rig.volumes.orphans() == []


@pytest.mark.parametrize("uid", ["..", "../x", "/etc", "", "a/b", ".hidden", "a\0b"])
async def test_a_uid_that_is_no_name_is_refused(rig: Rig, uid: str) -> None:
    with pytest.raises(ValueError, match="not a pod uid"):
        await rig.volumes.teardown(uid)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes folders of others")
async def test_folders_in_memory_of_nodes_whose_data_is_gone_are_removed_and_no_others(rig: Rig) -> None:
    def leave(name: str, data: Path, *, namespace: str = "", uid: int = 0) -> Path:
        folder = rig.memory / f"wasilet-0-{name}"
        (folder / "pod" / "volumes").mkdir(parents=True)
        (folder / ".owner").symlink_to(f"{namespace or Path('/proc/self/ns/mnt').readlink()} {data / 'pods'}")
        os.chown(folder, uid, -1)
        return folder

    gone, alive = rig.folder / "gone", rig.folder / "alive"
    alive.mkdir()
    stray = leave("1", gone)
    kept = [leave("2", alive), leave("3", gone, namespace="mnt:[1]"), leave("4", gone, uid=12345)]
    unmarked = leave("5", gone)
    (unmarked / ".owner").unlink()
    await rig.volumes.orphans()
    assert not stray.exists()
    assert all((folder / "pod" / "volumes").is_dir() for folder in (*kept, unmarked))


async def test_a_folder_in_memory_says_whose_it_is(rig: Rig) -> None:
    await rig.mounts(pod_with({"emptyDir": {"medium": "Memory"}}))
    link = next(rig.memory.iterdir()) / ".owner"
    owner = str(link.readlink())
    assert owner == f"{Path('/proc/self/ns/mnt').readlink()} {rig.pods}"
    link.unlink()
    link.symlink_to("mnt:[1] /elsewhere")
    await rig.volumes.orphans()
    assert str(link.readlink()) == owner


async def test_somebody_elses_folder_in_shared_memory_is_not_trusted_and_another_is_used(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.kube.secret("s", {"k": b"secret"})
    (rig.folder / "trap").mkdir()
    area = rig.volumes._pod_dirs._memory
    assert area is not None
    area.symlink_to(rig.folder / "trap")
    pod = pod_with({"secret": {"secretName": "s"}})
    with caplog.at_level("WARNING"):
        await rig.volumes.setup(pod)
    assert list((rig.folder / "trap").iterdir()) == []
    assert f"{area} is somebody else's" in caplog.text
    (own,) = rig.memory.glob(f"{area.name}-*")
    assert own.stat().st_mode & 0o777 == 0o700
    assert PodDirs(rig.pods, shared_memory=rig.memory).memory_root() == own, "found again after a restart"
