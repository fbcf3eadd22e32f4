"""What a container sees: nested mounts, subPaths, single files, its working directory, and its termination message."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from wasilet_node.runtime.protocol import Mount
from wasilet_node.runtime.safe_path import open_directory
from wasilet_node.volumes.base import ContainerConfigError

from tests.unit.node.volumes.rig import Guest, Rig, make_container, make_pod

pytestmark = pytest.mark.unit


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    (tmp_path / "host").mkdir()
    rig.kube.config_map("cm", {"conf": "one", "other": "two"})
    rig.kube.secret("sec", {"key": b"s3cret"})
    yield rig
    await rig.close()


def pod_of(rig: Rig, *mounts: dict[str, Any], container: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """A pod with an emptyDir ``e``, a hostPath ``h``, a configMap ``c`` and a secret ``s``."""
    return make_pod(
        volumes=[
            {"name": "e", "emptyDir": {}},
            {"name": "h", "hostPath": {"path": str(rig.folder / "host")}},
            {"name": "c", "configMap": {"name": "cm", "items": [{"key": "conf", "path": "sub/conf"}]}},
            {"name": "s", "secret": {"secretName": "sec"}},
        ],
        containers=[make_container(*mounts, **(container or {}))],
        **spec,
    )


def mount(name: str, path: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **more}


async def guest(rig: Rig, pod: dict[str, Any], **more: Any) -> Guest:
    return Guest(list((await rig.mounts(pod, **more)).values()))


async def refusal(rig: Rig, pod: dict[str, Any], environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ContainerConfigError) as caught:
        await rig.mounts(pod, environment)
    return str(caught.value)


async def test_mounts_inside_mounts_are_seen(rig: Rig) -> None:
    found = await guest(rig, pod_of(rig, mount("e", "/data"), mount("c", "/data/config"), mount("h", "data2/")))
    found.write("/data/file", b"x")
    assert found.read("/data/config/sub/conf") == b"one"
    found.write("/data2/host", b"y")
    assert (rig.folder / "host/host").read_bytes() == b"y"


async def test_a_read_only_mount_cannot_be_written(rig: Rig) -> None:
    found = await guest(rig, pod_of(rig, mount("h", "/ro", readOnly=True), mount("h", "/rw")))
    found.write("/rw/f", b"1")
    assert found.read("/ro/f") == b"1"
    with pytest.raises(OSError, match="WASI errno"):
        found.write("/ro/f", b"2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subPath": "/etc"}, "error SubPath `/etc` must not be an absolute path"),
        ({"subPath": "a/../../b"}, "unable to provision SubPath `a/../../b`: must not contain '..'"),
        ({"subPathExpr": "$(UP)/x"}, "unable to provision SubPath `../x`: must not contain '..'"),
        ({"subPathExpr": "$(ABS)"}, "error SubPath `/abs` must not be an absolute path"),
        ({"subPathExpr": "$(B)/$(A)/$(EMPTY)"}, "missing value for A, B, EMPTY"),
        ({"mountPropagation": "Sideways"}, 'invalid MountPropagation mode: "Sideways"'),
        (
            {"recursiveReadOnly": "Enabled"},
            (
                'failed to resolve recursive read-only mode: volume "e" requested recursive read-only mode, but it is '
                "not read-only"
            ),
        ),
        (
            {"recursiveReadOnly": "Enabled", "readOnly": True, "mountPropagation": "HostToContainer"},
            (
                'failed to resolve recursive read-only mode: volume "e" requested recursive read-only mode, but it is '
                'not compatible with propagation "HostToContainer"'
            ),
        ),
        (
            {"recursiveReadOnly": "Often", "readOnly": True},
            'failed to resolve recursive read-only mode: unknown recursive read-only mode "Often"',
        ),
    ],
)
async def test_bad_options_are_refused_in_kubelets_words(rig: Rig, options: dict[str, Any], message: str) -> None:
    environment = {"UP": "..", "ABS": "/abs", "EMPTY": ""}
    assert await refusal(rig, pod_of(rig, mount("e", "/v", **options)), environment) == message


@pytest.mark.parametrize("key", ["mountPath", "subPath", "workingDir", "terminationMessagePath"])
async def test_a_path_beyond_all_measure_is_refused_in_few_words(rig: Rig, key: str) -> None:
    path = "a/" * 3000
    mounted = mount("h", path if key == "mountPath" else "/v", **({"subPath": path} if key == "subPath" else {}))
    container = {key: "/" + path} if key not in {"mountPath", "subPath"} else {}
    message = await refusal(rig, pod_of(rig, mounted, container=container))
    assert "too long" in message
    assert len(message) < 300


async def test_a_mount_without_a_volume_and_two_at_one_place_are_refused(rig: Rig) -> None:
    assert await refusal(rig, pod_of(rig, mount("x", "/v"))) == 'cannot find volume "x" to mount into container "main"'
    assert await refusal(rig, pod_of(rig, mount("e", "/v"), mount("h", "/v/"))) == "Duplicate mount point: /v"


async def test_a_sub_path_is_made_when_missing_and_confines(rig: Rig) -> None:
    (rig.folder / "host").chmod(0o750)
    (rig.folder / "host/outside").write_text("x")
    pod = pod_of(rig, mount("h", "/v", subPathExpr="logs/$(POD)"))
    mounts = await rig.mounts(pod, {"POD": "web"})
    made = rig.folder / "host/logs/web"
    assert made.stat().st_mode & 0o777 == 0o750
    assert mounts["/v"] == Mount(host=str(made), guest="/v", root=str(rig.folder / "host"))
    found = Guest(list(mounts.values()))
    found.write("/v/f", b"x")
    with pytest.raises(OSError, match="WASI errno"):
        found.read("/v/../../outside")


async def test_links_inside_the_volume_are_followed_and_others_refused(rig: Rig) -> None:
    host = rig.folder / "host"
    (host / "real").mkdir()
    (host / "inside").symlink_to("real")
    (host / "absolute").symlink_to("/etc")
    (host / "climbs").symlink_to("../..")
    (host / "loop").symlink_to("loop")
    assert (await rig.mounts(pod_of(rig, mount("h", "/v", subPath="inside"))))["/v"].host == str(host / "real")
    for name in ("absolute", "climbs", "loop", "absolute/passwd", "climbs/new"):
        message = await refusal(rig, pod_of(rig, mount("h", "/v", subPath=name)))
        assert message == 'failed to prepare subPath for volumeMount "h" of container "main"'
    assert not (rig.folder.parent / "new").exists()


async def test_a_sub_path_below_a_file_cannot_be_made(rig: Rig) -> None:
    (rig.folder / "host/file").write_text("x")
    message = await refusal(rig, pod_of(rig, mount("h", "/v", subPath="file/x")))
    assert message == 'failed to prepare subPath for volumeMount "h" of container "main"'


async def test_a_folder_that_is_swapped_for_a_link_is_never_opened(rig: Rig) -> None:
    """What the sandbox does with ``Mount.root``, while somebody swaps the folder as fast as they can."""
    host = rig.folder / "host"
    secret = rig.folder / "secret"
    secret.mkdir()
    (host / "a").mkdir()
    (host / "a/sub").mkdir()
    prepared = (await rig.mounts(pod_of(rig, mount("h", "/v", subPath="a/sub"))))["/v"]
    (secret / "sub").mkdir()
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            (host / "a").rename(host / "b")
            (host / "a").symlink_to(secret)
            (host / "a").unlink()
            (host / "b").rename(host / "a")

    swapping = threading.Thread(target=swap)
    swapping.start()
    opened, refused = 0, 0
    until = time.monotonic() + 10
    try:
        while (opened < 100 or refused < 100) and time.monotonic() < until:
            try:
                fd = open_directory(prepared.root, prepared.host)
            except OSError:
                refused += 1
                continue
            opened += 1
            assert Path(f"/proc/self/fd/{fd}").readlink().is_relative_to(host)
            os.close(fd)
    finally:
        done.set()
        swapping.join()
    assert opened
    assert refused


async def test_a_single_file_of_a_config_map_stands_alone_and_stays_as_it_was(rig: Rig) -> None:
    pod = pod_of(rig, mount("c", "/etc/app.conf", subPath="sub/conf"))
    found = await guest(rig, pod)
    assert found.read("/etc/app.conf") == b"one"
    with pytest.raises(OSError, match="WASI errno"):
        found.write("/etc/app.conf", b"x")
    rig.kube.config_map("cm", {"conf": "changed"})
    await rig.volumes.refresh(pod)
    assert found.read("/etc/app.conf") == b"one", "as with kubelet, subPath mounts get no updates"


async def test_a_folder_of_a_config_map_survives_the_next_update(rig: Rig) -> None:
    pod = pod_of(rig, mount("c", "/conf", subPath="sub"))
    found = await guest(rig, pod)
    rig.kube.config_map("cm", {"conf": "changed"})
    await rig.volumes.refresh(pod)
    assert found.read("/conf/conf") == b"one"


async def test_a_writable_single_file_writes_through(rig: Rig) -> None:
    (rig.folder / "host/file").write_text("before")
    found = await guest(rig, pod_of(rig, mount("h", "/etc/file", subPath="file")))
    found.write("/etc/file", b"after!")
    assert (rig.folder / "host/file").read_bytes() == b"after!"


async def test_a_host_file_is_mounted_alone(rig: Rig) -> None:
    (rig.folder / "host/file").write_text("x")
    (rig.folder / "host/link").symlink_to("file")
    pod = pod_of(rig, mount("f", "/run/thing"))
    pod["spec"]["volumes"].append({"name": "f", "hostPath": {"path": str(rig.folder / "host/link"), "type": "File"}})
    found = await guest(rig, pod)
    assert found.read("/run/thing") == b"x"
    with pytest.raises(OSError, match="WASI errno"):
        found.read("/run/link")
    pod = pod_of(rig, mount("f", "/run/thing", subPath="x"), uid="other")
    pod["spec"]["volumes"].append({"name": "f", "hostPath": {"path": str(rig.folder / "host/file")}})
    assert await refusal(rig, pod) == 'failed to prepare subPath for volumeMount "f" of container "main"'


async def test_files_with_the_same_parent_share_a_folder_and_read_only_ones_stay_unchanged(rig: Rig) -> None:
    (rig.folder / "host/rw").write_text("rw")
    (rig.folder / "host/ro").write_text("ro")
    pod = pod_of(
        rig, mount("h", "/etc/rw", subPath="rw"), mount("h", "/etc/ro", subPath="ro", readOnly=True), uid="shared"
    )
    found = await guest(rig, pod)
    found.write("/etc/rw", b"RW")
    with pytest.raises(OSError, match="WASI errno"):
        found.write("/dev/null/x", b"x")
    assert found.read("/etc/ro") == b"ro"
    assert (rig.folder / "host/ro").stat().st_nlink == 1, "a link in a writable folder could be written through"


async def test_a_secret_as_a_single_file_is_copied_in_memory_only(rig: Rig) -> None:
    mounts = await rig.mounts(pod_of(rig, mount("s", "/etc/key", subPath="key")))
    assert Path(mounts["/etc"].host).is_relative_to(rig.memory)
    assert Guest(list(mounts.values())).read("/etc/key") == b"s3cret"
    assert [path for path in rig.pods.rglob("*") if path.is_file() and path.read_bytes() == b"s3cret"] == []


async def test_pipes_and_devices_are_not_opened_by_a_sub_path(rig: Rig) -> None:
    os.mkfifo(rig.folder / "host/pipe")
    message = await refusal(rig, pod_of(rig, mount("h", "/v", subPath="pipe")))
    assert message == 'failed to prepare subPath for volumeMount "h" of container "main"'


async def test_a_single_file_where_a_volume_is_mounted_is_refused_by_name(rig: Rig) -> None:
    message = await refusal(rig, pod_of(rig, mount("e", "/etc/app"), mount("c", "/etc/app/conf", subPath="sub/conf")))
    assert 'volumeMount "c" of container "main" is a single file in /etc/app, where another volume is' in message


ALIASES = [{"ip": "10.0.0.9", "hostnames": ["db", "db.local"]}]


async def test_host_aliases_are_read_from_etc_hosts(rig: Rig) -> None:
    found = await guest(rig, pod_of(rig, hostAliases=ALIASES, subdomain="sub"))
    assert found.read("/etc/hosts").decode() == (
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
        "fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n"
        "10.1.2.3\tweb.sub.default.svc.cluster.local\tweb\n"
        "\n# Entries added by HostAliases.\n10.0.0.9\tdb\tdb.local\n"
    )
    with pytest.raises(OSError, match="WASI errno"):
        found.write("/etc/hosts", b"x")


async def test_every_pod_has_an_etc_hosts_unless_a_volume_is_mounted_above_it(rig: Rig) -> None:
    assert b"10.1.2.3\tweb" in (await guest(rig, pod_of(rig))).read("/etc/hosts")
    for index, path in enumerate(("/etc", "/")):
        found = await guest(rig, pod_of(rig, mount("e", path), uid=f"above-{index}"))
        with pytest.raises(OSError, match="WASI errno 44"):
            found.read("/etc/hosts")


async def test_what_no_volume_covers_can_be_written_and_ends_with_the_instance(rig: Rig) -> None:
    pod = pod_of(rig, mount("e", "/data/deep"))
    found = await guest(rig, pod)
    for path in ("/tmp/file", "/file", "relative", "/data/beside"):
        found.write(path, b"x")
        assert found.read(path) == b"x"
    found.write("/data/deep/kept", b"y")
    again = await guest(rig, pod, attempt=1)
    for path in ("/tmp/file", "/file", "relative", "/data/beside"):
        with pytest.raises(OSError, match="WASI errno 44"):
            again.read(path)
    assert again.read("/data/deep/kept") == b"y"
    with pytest.raises(OSError, match="WASI errno"):
        found.read("/../../../host")


async def test_preparing_the_same_instance_again_keeps_its_files_and_follows_no_link(rig: Rig) -> None:
    pod = pod_of(rig, mount("e", "/data/deep"))
    root = Path((await rig.mounts(pod))["/"].host)
    (root / "kept").write_text("x")
    (root / "data/deep").rmdir()
    (root / "data").rmdir()
    (root / "data").symlink_to(rig.folder / "host")
    found = await guest(rig, pod)
    assert found.read("/kept") == b"x"
    assert list((rig.folder / "host").iterdir()) == []


async def test_a_read_only_root_file_system_cannot_be_written(rig: Rig) -> None:
    security = {"securityContext": {"readOnlyRootFilesystem": True}}
    found = await guest(rig, pod_of(rig, mount("e", "/data"), container=security))
    found.write("/data/file", b"x")
    for path in ("/file", "/tmp/file"):
        with pytest.raises(OSError, match="WASI errno"):
            found.write(path, b"x")
    assert set(await rig.mounts(pod_of(rig, container={"workingDir": "/work", **security}, uid="b"))) == {
        *(".", "/work", "/dev", "/etc")
    }


async def test_a_volume_at_the_root_is_the_root(rig: Rig) -> None:
    found = await guest(rig, pod_of(rig, mount("h", "/")))
    found.write("/file", b"x")
    assert (rig.folder / "host/file").read_bytes() == b"x"


async def test_with_a_working_directory_tmp_is_a_folder_of_its_own(rig: Rig) -> None:
    found = await guest(rig, pod_of(rig, container={"workingDir": "/work"}))
    found.write("/tmp/file", b"x")
    found.write("file", b"y")
    assert found.read("/work/file") == b"y"
    with pytest.raises(OSError, match="WASI errno 44"):
        found.read("tmp/other")


async def test_a_hosts_file_of_the_user_wins_and_a_volume_at_etc_is_refused(rig: Rig) -> None:
    pod = pod_of(rig, mount("c", "/etc/hosts", subPath="sub/conf"), hostAliases=ALIASES)
    assert (await guest(rig, pod)).read("/etc/hosts") == b"one"
    message = await refusal(rig, pod_of(rig, mount("e", "/etc"), hostAliases=ALIASES, uid="b"))
    assert message.startswith("hostAliases need /etc/hosts")
    below = pod_of(rig, mount("c", "/etc/app", subPath="sub"), hostAliases=ALIASES, uid="c")
    found = await guest(rig, below)
    assert b"db.local" in found.read("/etc/hosts")
    assert found.read("/etc/app/conf") == b"one"


async def test_the_working_directory_is_the_folder_once_more_as_a_dot(rig: Rig) -> None:
    mounts = await rig.mounts(
        pod_of(rig, mount("e", "/data"), mount("c", "/data/config"), container={"workingDir": "/data"})
    )
    assert mounts["."].host == mounts["/data"].host
    assert mounts["config"].host == mounts["/data/config"].host
    assert mounts["config"].read_only


async def test_a_working_directory_inside_a_volume_is_made_and_confined(rig: Rig) -> None:
    host = rig.folder / "host"
    pod = pod_of(rig, mount("h", "/data"), container={"workingDir": "/data/a/b"})
    assert (await rig.mounts(pod))["."] == Mount(host=str(host / "a/b"), guest=".", root=str(host))
    (host / "evil").symlink_to("/etc")
    pod = pod_of(rig, mount("h", "/data"), container={"workingDir": "/data/evil"}, uid="b")
    assert "is no folder and cannot be made" in await refusal(rig, pod)


async def test_a_working_directory_in_no_volume_is_a_private_folder_of_the_instance(rig: Rig) -> None:
    pod = pod_of(rig, container={"workingDir": "/work"})
    found = await guest(rig, pod)
    found.write("/work/file", b"x")
    assert found.read("file") == b"x"
    again = await guest(rig, pod, attempt=1)
    with pytest.raises(OSError, match="WASI errno 44"):
        again.read("/work/file")
    read_only = pod_of(
        rig,
        container={"workingDir": "/work", "securityContext": {"readOnlyRootFilesystem": True}},
        uid="b",
    )
    assert (await rig.mounts(read_only))["."].read_only


@pytest.mark.parametrize("working_dir", ["", "/"])
async def test_without_a_working_directory_there_is_no_dot(rig: Rig, working_dir: str) -> None:
    pod = pod_of(rig, mount("e", "/data"), container={"workingDir": working_dir})
    assert set(await rig.mounts(pod)) == {"/", "/dev", "/etc", "/data"}


async def test_the_images_working_directory_counts_when_the_pod_names_none(rig: Rig) -> None:
    mounts = await rig.mounts(pod_of(rig, mount("e", "/data")), working_dir="/data")
    assert mounts["."].host == mounts["/data"].host


def message_of(rig: Rig, pod: dict[str, Any], attempt: int = 0) -> str:
    return rig.volumes.termination_message(pod, pod["spec"]["containers"][0], attempt=attempt)


async def test_the_termination_message_is_what_this_instance_wrote(rig: Rig) -> None:
    pod = pod_of(rig)
    found = await guest(rig, pod)
    assert message_of(rig, pod) == ""
    found.write("/dev/termination-log", b"first")
    assert message_of(rig, pod) == "first"
    again = await guest(rig, pod, attempt=1)
    assert message_of(rig, pod, attempt=1) == ""
    again.write("/dev/termination-log", b"second")
    assert (message_of(rig, pod), message_of(rig, pod, attempt=1)) == ("first", "second")
    await guest(rig, pod, attempt=2)
    assert message_of(rig, pod) == "", "only the last two instances are kept"
    assert message_of(rig, pod, attempt=1) == "second"


async def test_only_the_last_4096_bytes_are_the_message(rig: Rig) -> None:
    pod = pod_of(rig, container={"terminationMessagePath": "tmp/../msg/end"})
    found = await guest(rig, pod)
    found.write("/msg/end", b"a" * 5000 + b"b" * 100 + b"\xff")
    assert message_of(rig, pod) == "a" * 3995 + "b" * 100 + "\ufffd"


async def test_preparing_the_same_instance_again_keeps_its_message(rig: Rig) -> None:
    pod = pod_of(rig)
    (await guest(rig, pod)).write("/dev/termination-log", b"kept")
    await guest(rig, pod)
    assert message_of(rig, pod) == "kept"


async def test_no_path_means_no_message(rig: Rig) -> None:
    pod = pod_of(rig, container={"terminationMessagePath": ""})
    assert set(await rig.mounts(pod)) == {"/", "/etc"}
    assert message_of(rig, pod) == ""


@pytest.mark.parametrize("path", ["/data/end", "/data/deep/end"])
async def test_a_message_in_a_volume_is_a_file_of_that_volume(rig: Rig, path: str) -> None:
    old = rig.folder / "host" / path.removeprefix("/data/")
    old.parent.mkdir(exist_ok=True)
    old.write_text("from another life")
    pod = pod_of(rig, mount("h", "/data"), container={"terminationMessagePath": path})
    found = await guest(rig, pod)
    assert message_of(rig, pod) == ""
    assert old.read_text() == "from another life"
    rig.volumes.close()
    rig.volumes = rig.manager()
    found.write(path, b"the end")
    assert message_of(rig, pod) == "the end"


async def test_a_message_that_is_no_regular_file_is_not_opened(rig: Rig) -> None:
    (rig.folder / "secret").write_text("secret")
    pod = pod_of(rig, mount("h", "/data"), container={"terminationMessagePath": "/data/end"})
    await rig.mounts(pod)
    end = rig.folder / "host/end"
    end.symlink_to(rig.folder / "secret")
    assert message_of(rig, pod) == "Error on reading termination log: not a regular file"
    end.unlink()
    os.mkfifo(end)
    assert message_of(rig, pod) == "Error on reading termination log: not a regular file"
    end.unlink()
    end.mkdir()
    assert message_of(rig, pod) == "Error on reading termination log: not a regular file"


async def test_a_message_in_a_folder_that_became_a_link_is_not_followed(rig: Rig) -> None:
    (rig.folder / "secret").mkdir()
    (rig.folder / "secret/end").write_text("secret")
    pod = pod_of(rig, mount("h", "/data"), container={"terminationMessagePath": "/data/deep/end"})
    await rig.mounts(pod)
    (rig.folder / "host/deep").rmdir()
    (rig.folder / "host/deep").symlink_to(rig.folder / "secret")
    assert "secret" not in message_of(rig, pod)


async def test_a_read_only_volume_at_the_messages_folder_leaves_no_message(rig: Rig) -> None:
    pod = pod_of(rig, mount("c", "/conf"), container={"terminationMessagePath": "/conf/end"})
    assert set(await rig.mounts(pod)) == {"/", "/conf", "/etc"}
    assert message_of(rig, pod) == ""
