from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wasilet_node import instance
from wasilet_node.command_parser import UsageError
from wasilet_node.commandline import RunCommand, ShutdownCommand, parse
from wasilet_node.instance import AgentRecord, AlreadyRunningError, ForeignFolderError
from wasilet_node.runtime.linux import start_time
from wasilet_node.settings import NodeSettings
from wasilet_node.shutdown import shutdown

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
HOME = {"HOME": "/home/user"}


def run_command(*arguments: str, environ: Mapping[str, str] | None = None) -> RunCommand:
    command = parse(arguments, {**HOME, **(environ or {})}, version="x", hostname=lambda: "Machine.example")
    assert isinstance(command, RunCommand)
    return command


def settings(*arguments: str, environ: Mapping[str, str] | None = None) -> NodeSettings:
    return run_command(*arguments, environ=environ).settings


def test_nothing_needs_to_be_said() -> None:
    made = settings()
    assert made.node_name == made.hostname == "machine.example"
    assert made.paths.data == Path("/home/user/.local/share/wasilet/node")
    assert (made.port, made.max_pods, made.node_ip, made.taints, made.labels) == (10250, 110, None, (), {})


def test_the_nodes_name_is_its_host_name_too_where_a_label_can_hold_it() -> None:
    assert settings("--node-name=n1").hostname == "n1"
    assert settings("--node-name=n1", environ={"KRUSTLET_HOSTNAME": "h"}).hostname == "h"
    assert settings(f"--node-name={'n' * 64}").hostname == "machine.example"


def test_every_flag_arrives() -> None:
    made = settings(
        "--node-ip=192.0.2.7", "--node-name=n1", "--hostname=Host1", "--port=3000", "--data-dir=/d",
        "--bootstrap-file=/b", "--node-labels=a=b,example.com/c=d", "--node-labels=e=", "--max-pods=5",
        "--insecure-registries=reg.local:5000,10.0.0.1", "--taint=k=v:NoSchedule", "--taint=k:NoExecute",
        "--bind-address=127.0.0.1", "--provider-id=kind://x",
    )  # fmt: skip
    assert made.node_ip == "192.0.2.7"
    assert (made.node_name, made.hostname, made.port) == ("n1", "host1", 3000)
    assert (made.paths.data, made.bootstrap_file) == (Path("/d"), Path("/b"))
    assert made.labels == {"a": "b", "example.com/c": "d", "e": ""}
    assert made.max_pods == 5
    assert made.images.insecure_registries == ("reg.local:5000", "10.0.0.1")
    assert made.taints == ("k=v:NoSchedule", "k:NoExecute")
    assert (made.bind_address, made.provider_id) == ("127.0.0.1", "kind://x")


def test_krustlets_short_flags_and_names_mean_what_they_meant() -> None:
    made = settings("-n", "192.0.2.7", "-p", "3000", "-a", "0.0.0.0")
    assert (made.node_ip, made.port, made.bind_address) == ("192.0.2.7", 3000, "0.0.0.0")
    made = settings(
        environ={
            "KRUSTLET_NODE_IP": "192.0.2.7",
            "KRUSTLET_NODE_NAME": "krustlet",
            "KRUSTLET_HOSTNAME": "krustlet-host",
            "KRUSTLET_PORT": "3000",
            "KRUSTLET_ADDRESS": "192.0.2.8",
            "KRUSTLET_DATA_DIR": "/k",
            "KRUSTLET_BOOTSTRAP_FILE": "/k/bootstrap.conf",
            "KRUSTLET_INSECURE_REGISTRIES": "registry:5000",
            "MAX_PODS": "7",
            "NODE_LABELS": "a=b",
        }
    )
    assert (made.node_ip, made.node_name, made.hostname, made.port) == ("192.0.2.7", "krustlet", "krustlet-host", 3000)
    assert made.bind_address == "192.0.2.8"
    assert made.bootstrap_file == Path("/k/bootstrap.conf")
    assert (made.images.insecure_registries, made.max_pods, made.labels) == (("registry:5000",), 7, {"a": "b"})


def test_a_flag_wins_over_our_variable_and_that_over_krustlets() -> None:
    environ = {"WASILET_NODE_NAME": "ours", "KRUSTLET_NODE_NAME": "theirs"}
    assert settings(environ=environ).node_name == "ours"
    assert settings("--node-name=flag", environ=environ).node_name == "flag"
    assert settings(environ={**environ, "WASILET_NODE_NAME": ""}).node_name == "theirs"


def test_data_follows_xdg() -> None:
    assert settings(environ={"XDG_DATA_HOME": "/xdg"}).paths.data == Path("/xdg/wasilet/node")
    assert settings(environ={"XDG_DATA_HOME": "relative"}).paths.data == Path("/home/user/.local/share/wasilet/node")
    with pytest.raises(UsageError, match="--data-dir"):
        parse([], {}, version="x")


def test_kubeconfig_is_a_place_only_when_it_is_one_place() -> None:
    assert run_command(environ={"KUBECONFIG": "/k/config"}).kubeconfig == Path("/k/config")
    assert run_command(environ={"KUBECONFIG": "/a:/b"}).kubeconfig is None
    assert run_command("--kubeconfig=/c", environ={"KUBECONFIG": "/a:/b"}).kubeconfig == Path("/c")


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--port=x", "--port 'x': not a number from 0 to 65535"),
        ("--port=65536", "not a number from 0 to 65535"),
        ("--port=-1", "not a number"),
        ("--port=²", "not a number"),
        ("--max-pods=0", "not a number from 1"),
        ("--node-ip=localhost", "not an IP address"),
        ("--node-ip=0.0.0.0", "no other machine can reach"),
        ("--bind-address=here", "not an IP address"),
        ("--node-name=Big_Name", "lower-case letters"),
        ("--node-name=" + "a" * 254, "lower-case letters"),
        ("--hostname=a b", "not a host name"),
        ("--taint=k=v", "not KEY[=VALUE]:EFFECT"),
        ("--taint=k=v:Never", "not KEY[=VALUE]:EFFECT"),
        ("--taint=:NoSchedule", "not KEY[=VALUE]:EFFECT"),
        ("--taint=bad key:NoSchedule", "not a label key"),
        ("--node-labels=-x=1", "not a label key"),
        ("--node-labels=UPPER.Example/x=1", "not a DNS name"),
        ("--node-labels=x=" + "v" * 64, "not a label value"),
        ("--node-labels=node-role.kubernetes.io/wasm=", "NodeRestriction"),
        ("--node-labels=unknown.k8s.io/x=1", "NodeRestriction"),
        ("--node-labels=node-restriction.kubernetes.io/x=1", "NodeRestriction"),
        ("--node-labels=kubernetes.io/other=1", "NodeRestriction"),
        ("--insecure-registries=http://reg", "not HOST[:PORT]"),
        ("--log-level=loud", "not one of debug"),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("--node", "unrecognized arguments"),
        ("start", "invalid choice: 'start'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(argument: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(argument)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_environment_variable_is_named_when_it_is_wrong() -> None:
    with pytest.raises(UsageError, match="MAX_PODS 'many': not a number"):
        settings(environ={"MAX_PODS": "many"})


def test_two_taints_of_one_key_and_effect_are_refused() -> None:
    with pytest.raises(UsageError, match="another with this key and effect"):
        settings("--taint=k=a:NoSchedule", "--taint=k=b:NoSchedule")


@pytest.mark.parametrize(
    "label",
    [
        "kubernetes.io/arch=wasm32-wasi",
        "topology.kubernetes.io/zone=z",
        "node.kubernetes.io/x=1",
        "foo.kubelet.kubernetes.io/x=1",
        "example.com/x=1",
        "plain",
    ],
)
def test_labels_that_a_node_may_give_itself_pass(label: str) -> None:
    key, _, value = label.partition("=")
    assert settings(f"--node-labels={label}").labels == {key: value}


def test_a_machine_whose_name_no_node_can_have_is_told_what_to_say() -> None:
    with pytest.raises(UsageError, match="--hostname and --node-name"):
        parse([], HOME, version="x", hostname=lambda: "my_machine")


def test_shutdown_takes_the_folder_before_or_after() -> None:
    expected = ShutdownCommand(data=Path("/d"), timeout_seconds=10.0, log_level="info")
    assert parse(["shutdown", "--data-dir", "/d"], HOME, version="x") == expected
    assert parse(["--data-dir", "/d", "shutdown"], HOME, version="x") == expected
    timed = parse(["shutdown", "--data-dir=/d", "--timeout=3"], HOME, version="x")
    assert isinstance(timed, ShutdownCommand)
    assert timed.timeout_seconds == 3.0
    with pytest.raises(UsageError, match="--timeout"):
        parse(["shutdown", "--timeout", "nan"], HOME, version="x")


@given(st.lists(st.text(max_size=20), max_size=4))
def test_arguments_of_any_kind_end_in_settings_or_one_line(arguments: list[str]) -> None:
    try:
        parse(arguments, HOME, version="x", hostname=lambda: "h")
    except (UsageError, SystemExit):
        pass


def module(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "wasilet_node", *arguments],
        capture_output=True, text=True, timeout=30, check=False, cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **HOME, **(environ or {})},
    )  # fmt: skip


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    done = module("--port=x")
    assert done.returncode == 2
    assert done.stderr == "node: --port 'x': not a number from 0 to 65535; see --help\n"
    assert done.stdout == ""


def test_help_teaches_and_loads_nothing_heavy() -> None:
    done = module("--help")
    assert done.returncode == 0
    assert "--bootstrap-file bootstrap.conf" in done.stdout
    assert "KRUSTLET_NODE_IP" in done.stdout
    heavy = "('aiohttp', 'kubernetes', 'wasmtime')"
    code = f"import sys, wasilet_node.__main__; sys.exit(any(m in sys.modules for m in {heavy}))"
    check = subprocess.run(
        [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(ROOT)}, check=False, timeout=30
    )  # fmt: skip
    assert check.returncode == 0


def test_the_end_of_a_node_loads_nothing_heavy(tmp_path: Path) -> None:
    """`down` waits for it, and it was a third of a second."""
    code = f"""
import sys
from pathlib import Path
from wasilet_node import __main__, shutdown
from wasilet_node.runtime import client, stale_cleanup
from wasilet_node.volumes import pod_dirs
assert shutdown.shutdown(Path({str(tmp_path)!r}), timeout_seconds=5) == 0
print([name for name in ("aiohttp", "cryptography", "email", "kubernetes", "wasmtime") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_a_node_that_cannot_join_says_so_in_its_last_line_and_leaves_nothing_running(tmp_path: Path) -> None:
    done = module("--data-dir", str(tmp_path), "--node-name", "n1", "--bootstrap-file", str(tmp_path / "missing"))
    try:
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert f"there is no {tmp_path / 'missing'} to join with" in last
        assert "Traceback" not in done.stderr
    finally:
        assert module("shutdown", "--data-dir", str(tmp_path)).returncode == 0
    assert list((tmp_path / "supervisors").glob("*.json")) == []


def test_two_agents_cannot_share_a_data_folder(tmp_path: Path) -> None:
    lock = instance.acquire(tmp_path)
    try:
        instance.write(tmp_path, AgentRecord(pid=7, start_time=1, node_name="n1", address="192.0.2.7", port=10250))
        with pytest.raises(AlreadyRunningError, match=r"pid 7, node n1.*--data-dir"):
            instance.acquire(tmp_path)
        done = module("--data-dir", str(tmp_path))
        assert done.returncode == 2
        assert "another agent (pid 7, node n1)" in done.stderr
    finally:
        os.close(lock)
    os.close(instance.acquire(tmp_path))


def test_a_folder_with_other_things_in_it_is_never_made_private(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "thesis.txt").write_text("x")
    with pytest.raises(ForeignFolderError, match="--data-dir"):
        instance.acquire(shared)
    assert shared.stat().st_mode & 0o777 == 0o755
    done = module("--data-dir", str(shared))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)

    (shared / "thesis.txt").unlink()
    os.close(instance.acquire(shared))
    assert shared.stat().st_mode & 0o777 == 0o700


def test_the_record_is_private_and_comes_back(tmp_path: Path) -> None:
    record = AgentRecord(pid=1, start_time=2, node_name="n1", address="192.0.2.7", port=10250)
    instance.write(tmp_path, record)
    assert instance.read(tmp_path) == record
    assert (tmp_path / "agent.json").stat().st_mode & 0o777 == 0o600
    assert json.loads((tmp_path / "agent.json").read_text())["port"] == 10250


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x"}', "\x00"])
def test_a_damaged_record_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "agent.json").write_text(content)
    assert instance.read(tmp_path) is None


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ignores SIGTERM, ready once it wrote a line."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def record_of(process: subprocess.Popen[bytes]) -> AgentRecord:
    started = start_time(process.pid)
    assert started is not None
    return AgentRecord(pid=process.pid, start_time=started, node_name="n", address="", port=0)


def test_what_ignores_sigterm_is_killed(stubborn: subprocess.Popen[bytes]) -> None:
    assert instance.stop(record_of(stubborn), grace_seconds=0.2)
    assert stubborn.wait(timeout=5) == -signal.SIGKILL


def test_a_reused_pid_is_never_killed(stubborn: subprocess.Popen[bytes]) -> None:
    record = record_of(stubborn)
    other = AgentRecord(pid=record.pid, start_time=record.start_time + 1, node_name="n", address="", port=0)
    assert not instance.stop(other, grace_seconds=0.1)
    assert stubborn.poll() is None


def test_a_process_that_only_waits_to_be_reaped_counts_as_gone() -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(process.pid) is None
    process.wait()


def test_shutdown_of_a_folder_where_nothing_runs_is_done(tmp_path: Path) -> None:
    assert shutdown(tmp_path / "missing", timeout_seconds=1.0) == 0
    assert shutdown(tmp_path, timeout_seconds=1.0) == 0


def test_shutdown_does_not_race_an_agent_that_is_started_again(tmp_path: Path) -> None:
    lock = instance.acquire(tmp_path)
    try:
        assert shutdown(tmp_path, timeout_seconds=1.0) == 1
    finally:
        os.close(lock)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["shutdown", "--help"]])
def test_a_full_device_is_one_line_and_exit_code_2(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "wasilet_node", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "node: cannot write to stdout: No space left on device\n")


def test_modules_in_the_users_pythonpath_are_not_the_nodes(tmp_path: Path) -> None:
    for name in ("yaml", "aiohttp", "wasmtime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a foreign module')")
    environ = {"HOME": str(tmp_path), "PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = module("shutdown", "--data-dir", str(tmp_path / "data"), environ=environ)
    assert "a foreign module" not in done.stderr + done.stdout
