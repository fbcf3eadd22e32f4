"""The user's kubeconfig gets one context more, and loses it again, and nothing else happens to it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wasilet.errors import StateError
from wasilet.kube.kubeconfig import add, build, check_changeable, holds, locked, read_config, remove, user_kubeconfig
from wasilet_common import kube_yaml

pytestmark = pytest.mark.unit

OURS = build(name="wasilet", server="https://127.0.0.1:6443", ca=b"ca", certificate=b"crt", key=b"key")

USERS_FILE = """\
# My clusters. Do not lose this comment.
apiVersion: v1
kind: Config
preferences: {}
clusters:
- cluster:
    server: https://prod.example.com   # careful!
    certificate-authority-data: "Y2E="
  name: prod
# before dev
- cluster: {server: https://dev.example.com}
  name: dev
contexts:
- context: {cluster: prod, user: me}
  name: prod
- context:
    cluster: dev
    user: me
  name: dev
current-context: prod # the dangerous one
users:
- name: me
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1
      command: login
      args: ['--for', "prod"]
"""

INDENTED_FILE = """\
apiVersion: v1
kind: Config
clusters:
  - name: prod
    cluster:
      server: https://prod.example.com

  # the end of the clusters
contexts:
  - name: prod
    context:
      cluster: prod
      user: me
users:
  - name: me
    user:
      token: abc
current-context: prod
"""

EMPTY_SECTIONS = """\
apiVersion: v1
clusters: null
contexts: []
current-context: ""
kind: Config
preferences: {}
users: []
"""

FLOW_FILE = """{"apiVersion": "v1", "kind": "Config", "clusters": [{"name": "a", "cluster": {"server": "https://a"}}],
 "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}], "users": [], "current-context": "a"}
"""


def normal(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value}


@pytest.mark.parametrize("text", [USERS_FILE, INDENTED_FILE])
def test_what_was_added_is_taken_out_again_to_the_letter(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    path.chmod(0o640)
    assert add(path, OURS) == "prod"
    data = yaml.safe_load(path.read_text())
    assert data["current-context"] == "wasilet"
    assert holds(path, OURS)
    for section in ("clusters", "contexts", "users"):
        assert [e for e in data[section] if e["name"] != "wasilet"] == yaml.safe_load(text)[section]
    assert [line for line in text.splitlines() if "#" in line and "current" not in line] == [
        line for line in path.read_text().splitlines() if "#" in line and "current" not in line
    ]
    assert remove(path, "wasilet", previous="prod")
    assert path.read_text() == text


@pytest.mark.parametrize(
    "text", [EMPTY_SECTIONS, FLOW_FILE, "", "# only a comment\n", "apiVersion: v1\nkind: Config\n"]
)
def test_any_kubeconfig_gets_the_context_and_keeps_its_meaning(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    before = yaml.safe_load(text) or {}
    previous = add(path, OURS)
    assert holds(path, OURS)
    assert remove(path, "wasilet", previous=previous)
    after = yaml.safe_load(path.read_text())
    assert normal(after) == normal({"apiVersion": "v1", "kind": "Config", **before})


@pytest.mark.parametrize("name", ["1e3", "0o17", "1_000", "y", "2026-01-02", "12:30:45", "="])
def test_a_name_that_looks_like_something_else_stays_a_text(tmp_path: Path, name: str) -> None:
    """Also where the file has to be written again from its data: PyYAML would leave out quotes that kubectl needs."""
    path = tmp_path / "config"
    path.write_text(FLOW_FILE.replace('"name": "a"', f'"name": "{name}"'))
    add(path, OURS)
    assert holds(path, OURS)
    assert [entry["name"] for entry in read_config(path)["clusters"]] == [name, "wasilet"]
    remove(path, "wasilet", previous="a")
    assert [entry["name"] for entry in read_config(path)["contexts"]] == [name]


def test_adding_twice_is_as_once(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(USERS_FILE)
    add(path, OURS)
    once = path.read_text()
    assert add(path, OURS) == "wasilet"
    assert path.read_text() == once


def test_new_credentials_replace_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(USERS_FILE)
    add(path, OURS)
    renewed = build(name="wasilet", server="https://127.0.0.1:7443", ca=b"ca2", certificate=b"crt2", key=b"key2")
    add(path, renewed)
    assert holds(path, renewed)
    assert not holds(path, OURS)
    remove(path, "wasilet", previous="prod")
    assert path.read_text() == USERS_FILE


def test_a_file_that_was_not_there_is_private_and_goes_again(tmp_path: Path) -> None:
    path = tmp_path / "kube" / "config"
    assert add(path, OURS) == ""
    assert path.stat().st_mode & 0o777 == 0o600
    assert remove(path, "wasilet", delete_if_empty=True)
    assert not path.exists()
    assert list(path.parent.iterdir()) == []


def test_a_context_that_the_user_chose_meanwhile_stays_chosen(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(USERS_FILE)
    add(path, OURS)
    path.write_text(path.read_text().replace("current-context: wasilet", "current-context: dev"))
    remove(path, "wasilet", previous="prod")
    assert read_config(path)["current-context"] == "dev"


def test_a_previous_context_that_is_gone_is_not_brought_back(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(USERS_FILE)
    add(path, OURS)
    remove(path, "wasilet", previous="no-longer-there")
    assert not read_config(path).get("current-context")


def test_another_clusters_entry_of_our_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "config"
    add(path, OURS)
    before = path.read_text()
    assert not remove(path, "wasilet", server="https://127.0.0.1:9999")
    assert path.read_text() == before
    assert not remove(path, "unknown")
    assert not remove(tmp_path / "none", "wasilet")


def test_a_link_is_followed_not_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "dotfiles-config", tmp_path / "config"
    target.write_text(USERS_FILE)
    link.symlink_to(target)
    add(link, OURS)
    assert link.is_symlink()
    assert holds(target, OURS)


@pytest.mark.parametrize("text", ["[1, 2]\n", "clusters: 7\n", "{unclosed\n", "just words\n"])
def test_what_is_no_kubeconfig_is_never_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(StateError):
        add(path, OURS)
    assert path.read_text() == text


def test_kubectls_lock_is_respected_and_a_dead_one_of_ours_is_not(tmp_path: Path) -> None:
    path = tmp_path / "config"
    lock = tmp_path / "config.lock"
    lock.write_text("")
    with pytest.raises(StateError, match="locked by another program"), locked(path, timeout_seconds=0.2):
        pass
    lock.write_text(f"wasilet {2**22 + 1}\n")
    with locked(path, timeout_seconds=0.2):
        assert lock.read_text() == f"wasilet {os.getpid()}\n"
    assert not lock.exists()


def test_many_clusters_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(USERS_FILE)
    names = [f"wasilet-{number}" for number in range(8)]
    configs = [build(name=name, server=f"https://127.0.0.1:{number}", ca=None) for number, name in enumerate(names)]
    threads = [threading.Thread(target=add, args=(path, config)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(holds(path, config) for config in configs)
    for name in names:
        remove(path, name, previous="prod")
    assert normal(read_config(path)) | {"current-context": "prod"} == normal(yaml.safe_load(USERS_FILE))


@pytest.mark.parametrize(
    ("variable", "there", "expected"),
    [
        (":{0}/a:{0}/b", "", "b"),
        ("{0}/none:{0}/two:{0}/three", "two three", "two"),
        ("{0}/none:{0}/two:{0}/three", "three", "three"),
        ("{0}/none:{0}/two:{0}/three", "", "three"),
        ("{0}/none:{0}/none", "", "none"),
        ("{0}/one", "", "one"),
        ("relative:{0}/two", "relative", "relative"),
        ("relative", "", "relative"),
        ("~/x", "", "~/x"),
        ("", "", "home/.kube/config"),
        (":", "", "home/.kube/config"),
    ],
)
def test_the_file_is_the_one_kubectl_would_change(tmp_path: Path, variable: str, there: str, expected: str) -> None:
    """client-go's GetDefaultFilename: the first that exists, else the last."""
    for name in there.split():
        (tmp_path / name).write_text("")
    environ = {
        "KUBECONFIG": variable.format(tmp_path),
        "HOME": str(tmp_path / "home"),
        "WASILET_INVOCATION_DIR": str(tmp_path),
    }
    assert user_kubeconfig(environ) == tmp_path / expected


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o666, 0o600])
def test_a_file_with_our_key_is_for_its_owner_alone(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "config"
    path.write_text(USERS_FILE)
    path.chmod(mode)
    add(path, OURS)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(mode)
    assert holds(path, OURS) == (mode == 0o600)


@pytest.mark.parametrize("text", [USERS_FILE, INDENTED_FILE, EMPTY_SECTIONS, FLOW_FILE])
def test_a_file_keeps_its_line_ends(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    written = text.replace("\n", "\r\n").encode()
    path.write_bytes(written)
    add(path, OURS)
    added = path.read_bytes()
    assert added.count(b"\n") == added.count(b"\r\n") > written.count(b"\n") / 2
    assert holds(path, OURS)
    remove(path, "wasilet", previous=str((yaml.safe_load(text)).get("current-context") or ""))
    after = path.read_bytes()
    assert after.count(b"\n") == after.count(b"\r\n")
    if text in {USERS_FILE, INDENTED_FILE}:
        assert after == written


@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_the_last_line_may_have_no_end(tmp_path: Path, end: str) -> None:
    path = tmp_path / "config"
    written = INDENTED_FILE.replace("\n", end).rstrip().encode()
    path.write_bytes(written)
    add(path, OURS)
    assert holds(path, OURS)
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(end.encode())
    remove(path, "wasilet", previous="prod")
    assert path.read_bytes().rstrip() == written


def test_lines_that_end_in_both_ways_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "config"
    written = USERS_FILE.replace("\n", "\r\n").replace("# before dev\r\n", "# before dev\n").encode()
    path.write_bytes(written)
    add(path, OURS)
    remove(path, "wasilet", previous="prod")
    assert path.read_bytes() == written


NAMES = st.text(alphabet="abcxyz019-_.:@ ñ#'\"", min_size=1, max_size=12).filter(
    # PyYAML writes the files here, and without quotes that kubectl needs: y would be true.
    lambda name: kube_yaml.load(yaml.safe_dump([name])) == [name]
)


@given(
    names=st.lists(NAMES, unique=True, max_size=4),
    indent=st.sampled_from([None, 4]),
    flow=st.sampled_from(["", "all", "none"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_file_looks_like_only_our_entries_come_and_go(
    tmp_path: Path, names: list[str], indent: int | None, flow: str
) -> None:
    data: dict[str, Any] = {"apiVersion": "v1", "kind": "Config"}
    data["clusters"] = [{"name": n, "cluster": {"server": f"https://{i}"}} for i, n in enumerate(names)]
    data["contexts"] = [{"name": n, "context": {"cluster": n, "user": n}} for n in names]
    data["users"] = [{"name": n, "user": {"token": "t: #x"}} for n in names]
    data["current-context"] = names[0] if names else ""
    path = tmp_path / "config"
    path.write_text(
        yaml.safe_dump(
            data,
            indent=indent,
            default_flow_style={"": None, "all": True, "none": False}[flow],
            allow_unicode=True,
            sort_keys=False,
        )
    )
    previous = add(path, OURS)
    assert holds(path, OURS)
    assert [e["name"] for e in read_config(path)["clusters"]] == [*names, "wasilet"]
    remove(path, "wasilet", previous=previous)
    assert normal(read_config(path)) == normal(data)


def test_a_file_that_could_not_be_changed_is_refused_beforehand(tmp_path: Path) -> None:
    check_changeable(tmp_path / "new" / "folders" / "config")
    assert not (tmp_path / "new").exists()
    damaged = tmp_path / "damaged"
    damaged.write_text("{not: [yaml")
    with pytest.raises(StateError, match="is not YAML"):
        check_changeable(damaged)
    with pytest.raises(StateError, match="is a folder, not a kubeconfig"):
        check_changeable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="is no folder"):
        check_changeable(tmp_path / "file" / "config")


def test_a_folder_that_is_not_ones_own_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    with pytest.raises(StateError, match="is not yours to write to, or is read-only"):
        check_changeable(tmp_path / "config")
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "config")
    with pytest.raises(StateError, match="is not yours to write to"):
        check_changeable(link)
