"""The command line: one clear line for bad input, exit codes, and pytest's own options."""

from __future__ import annotations

import inspect
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from invoke.exceptions import Exit
from wasilet.errors import UsageError
from wasilet.settings import invocation_path, load
from wasilet.terminal.cli import command
from wasilet_common.process_start import tighten_umask
from wasilet_dev import docs_tasks
from wasilet_dev.test_runner import needs_binaries, pytest_command

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[4]


def invoke(*words: str, state: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, "-P", "-m", "invoke", *words, state=state, **environ)


def run(*words: str, state: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return _run(str(ROOT / "run"), *words, state=state, **environ)


def _run(*argv: str, state: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("WASILET_")},
        "WASILET_STATE_HOME": str(state / "state"),
        "KUBECONFIG": str(state / "config"),
        "HOME": str(state),
        **environ,
    }
    return subprocess.run(argv, cwd=ROOT, env=env, text=True, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["up", "--provider", "clouds"], "unknown provider 'clouds'"),
        (["up", "--name", "Not_A_Label"], "'Not_A_Label' is no name for a cluster"),
        (["up", "--taint", "nonsense"], "'nonsense' is no taint"),
        (["up", "--output", "xml"], "unknown output 'xml'"),
        (["status", "--name", "unknown"], "there is no cluster 'unknown'"),
        (["down", "--name", "unknown"], "there is no cluster 'unknown'"),
        (["logs", "etcd", "--name", "unknown"], "there is no cluster 'unknown'"),
        (["kubeconfig"], "there is no cluster 'wasilet'"),
        (["kubectl", "--", "get", "nodes"], "there is no cluster 'wasilet'"),
        (["token", "list"], "cluster 'wasilet' is not up"),
        (["approve"], "cluster 'wasilet' is not up"),
        (["token", "frobnicate"], "unknown action 'frobnicate' (create, list, delete)"),
        (["demo", "hello-world", "--namespace", "Not_A_Label"], "'Not_A_Label' is no name for a namespace"),
        (["diagnose", "--name", "unknown"], "there is no cluster 'unknown'"),
        (["approve", "--all", "--output", "xml"], "unknown output 'xml'"),
        (["token", "create", "--output", "xml"], "unknown output 'xml'"),
        (["nonsense"], "no idea what 'nonsense' is (`invoke --list`"),
        (["up", "--nonsense"], "no idea what '--nonsense' is (`invoke up --help`"),
        (["--help", "nonsense"], "no idea what 'nonsense' is"),
        (["logs"], "'logs' did not receive required positional arguments: 'component'"),
        (["up", "--nodes", "many"], "an option takes a number, and was given 'many'"),
    ],
)
def test_bad_input_is_one_clear_line_and_2(tmp_path: Path, words: list[str], expected: str) -> None:
    done = invoke(*words, state=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "config").exists()
    assert not list(tmp_path.glob("state/*/cluster.json"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nonsense"], "no idea what 'nonsense' is (`./run --list`"),
        (["up", "--nonsense"], "no idea what '--nonsense' is (`./run up --help`"),
        (["--help", "nonsense"], "no idea what 'nonsense' is (`./run --list`"),
        (["--collection", "nonsense", "up"], "can't find any collection named 'nonsense'"),
        (["demo"], "'demo' did not receive required positional arguments: 'app'"),
        (["approve", "csr-x"], "no idea what 'csr-x' is (`./run approve --help`"),
        (["up", "--nodes", "many"], "an option takes a number, and was given 'many'"),
        (["up", "--node-ip", "1.2.3"], "'1.2.3' is no IP address"),
        (["up", "--node-ip", "0.0.0.0"], "'0.0.0.0' is no address that nodes can have"),
        (["kubectl", "--name", "unknown", "get", "pods"], "there is no cluster 'unknown'"),
        (["kubectl", "--name=unknown", "exec", "pod", "--", "ls"], "there is no cluster 'unknown'"),
        (["kubectl", "get", "pods", "--help"], "there is no cluster 'wasilet'"),
        (["kubectl", "--", "get", "pods"], "there is no cluster 'wasilet'"),
    ],
)
def test_what_run_cannot_make_sense_of_is_one_clear_line_and_2(tmp_path: Path, words: list[str], expected: str) -> None:
    done = run(*words, state=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"INVOKE_WASILET_NODES": "x"}, "INVOKE_WASILET_NODES must be a whole number, not 'x'"),
        ({"INVOKE_WASILET_PORTS_APISERVER": "x"}, "INVOKE_WASILET_PORTS_APISERVER must be a whole number"),
        ({"INVOKE_WASILET_DOWNLOAD": "maybe"}, "INVOKE_WASILET_DOWNLOAD must be true or false"),
        ({"INVOKE_WASILET_TIMEOUTS_READY_SECONDS": "nan"}, "INVOKE_WASILET_TIMEOUTS_READY_SECONDS must be a number"),
        ({"INVOKE_RUN_ECHO": "maybe"}, "INVOKE_RUN_ECHO must be true or false"),
        ({"INVOKE_RUN_WATCHERS": "x"}, "INVOKE_RUN_WATCHERS cannot be set by the environment"),
        ({"WASILET_NODES": "x"}, "WASILET_NODES must be a whole number, not 'x'"),
        ({"WASILET_DOWNLOAD": "maybe"}, "WASILET_DOWNLOAD must be true or false"),
        ({"WASILET_NAME": "A B"}, "'A B' is no name for a cluster"),
    ],
)
@pytest.mark.parametrize("start", [invoke, run], ids=["invoke", "run"])
def test_a_wrong_value_in_the_environment_is_one_clear_line_and_2(
    tmp_path: Path, start: Any, environ: dict[str, str], expected: str
) -> None:
    done = start("up", "--check", state=tmp_path, **environ)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wasilet: 7\n", "/.invoke.yaml: wasilet must be a mapping"),
        ("wasilet: [\n", ".invoke.yaml, line 2 cannot be used"),
        ("wasilet:\n  nodes: x\n", "setting nodes must be a whole number, not 'x'"),
        ("wasilet:\n  download: maybe\n", "setting download must be true or false, not 'maybe'"),
        ("wasilet:\n  name: 2026-01-02\n", "setting name must be a text"),
        ("wasilet:\n  ports: 7\n", "/.invoke.yaml: wasilet.ports must be a mapping"),
        ("wasilet:\n  nodes: {a: 1}\n", "/.invoke.yaml: wasilet.nodes must be no mapping"),
    ],
)
def test_a_wrong_value_in_the_users_file_is_one_clear_line_and_2(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / ".invoke.yaml").write_text(text)
    done = run("up", "--check", state=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_a_no_in_the_environment_is_a_no(tmp_path: Path) -> None:
    """Invoke takes every text but 0 for true."""
    (tmp_path / "config.yaml").write_text("wasilet:\n  install: 'no'\n")
    code = (
        "import invoke, sys; from wasilet.terminal.cli import settings_of;"
        "from wasilet.terminal.program import load_shell_env;"
        "from invoke.config import Config; from invoke.context import Context;"
        "c = Config(project_location='.', runtime_path=sys.argv[1]); c.load_project(); c.load_runtime();"
        "load_shell_env(c); s = settings_of(Context(c)); print(s.download, s.install, s.nodes)"
    )
    argv = (sys.executable, "-P", "-c", code, str(tmp_path / "config.yaml"))
    done = _run(*argv, state=tmp_path, INVOKE_WASILET_DOWNLOAD="false", INVOKE_WASILET_NODES="3")
    assert done.stdout == "False False 3\n", done.stderr


@pytest.mark.parametrize("words", [["--list"], ["--help"], ["up", "--help"], ["--version"], ["completion", "bash"]])
def test_a_full_device_is_one_clear_line_and_2(tmp_path: Path, words: list[str]) -> None:
    env = {**os.environ, "WASILET_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [str(ROOT / "run"), *words],
            env=env,
            text=True,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "error: cannot write to stdout: the disk is full\n")


def test_what_cannot_be_told_on_stderr_keeps_its_exit_code(tmp_path: Path) -> None:
    env = {**os.environ, "WASILET_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    with Path("/dev/full").open("w") as full:
        argv = [str(ROOT / "run"), "status", "--name", "unknown"]
        done = subprocess.run(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=full, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("start", [invoke, run], ids=["invoke", "run"])
def test_modules_in_the_users_pythonpath_are_not_ours(tmp_path: Path, start: Any) -> None:
    for name in ("yaml", "jinja2", "rich", "harness_settings", "platformdirs"):
        (tmp_path / f"{name}.py").write_text("import sys; print('a foreign module', __name__, file=sys.stderr)")
    done = start("doctor", "--output", "json", state=tmp_path, PYTHONPATH=str(tmp_path))
    # Invoke itself looks for yaml, before it knows of any tasks.
    said = done.stderr.replace("a foreign module yaml\n", "") if start is invoke else done.stderr
    assert "a foreign module" not in said
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith(("{", "["))


def test_nothing_that_is_made_can_be_written_by_others(tmp_path: Path) -> None:
    argv = ["sh", "-c", 'umask 000; exec "$0" new app', str(ROOT / "run")]
    done = _run(*argv, state=tmp_path, WASILET_INVOCATION_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    made = [tmp_path / "app", *(tmp_path / "app").rglob("*")]
    assert len(made) > 2
    assert [path for path in made if path.stat().st_mode & 0o022] == []


@pytest.mark.parametrize(
    ("before", "after"), [(0, 0o022), (0o002, 0o002), (0o022, 0o022), (0o077, 0o077), (0o005, 0o027)]
)
def test_a_umask_that_lets_others_write_is_tightened(before: int, after: int) -> None:
    mask = os.umask(before)
    try:
        tighten_umask()
        assert os.umask(0) == after
    finally:
        os.umask(mask)


def test_run_gives_pytest_its_own_words(tmp_path: Path) -> None:
    words = ["test", "-m", "unit", "--co", "-q", "-k", "test_the_shipped_file", "tests/unit/harness/test_settings.py"]
    done = run(*words, state=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test_the_shipped_file_says_what_the_defaults_are" in done.stdout


@pytest.mark.parametrize(
    "words", [[], ["kubectl", "--help"], ["test", "--help"], ["up", "--help"], ["--help"], ["--list"]]
)
def test_help_is_helps_own(tmp_path: Path, words: list[str]) -> None:
    done = run(*words, state=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout or "Available tasks" in done.stdout


def test_a_home_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    done = invoke("up", state=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot ")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_purging_what_is_not_there_is_done_already(tmp_path: Path) -> None:
    assert invoke("down", "--purge", state=tmp_path).returncode == 0


def test_every_task_has_a_help_of_one_line_and_examples() -> None:
    tasks = list(docs_tasks.tasks())
    assert len(tasks) > 20
    for task in tasks:
        first, _, rest = (inspect.getdoc(task.body) or "").partition("\n")
        assert 0 < len(first) < 80, task.name
        assert re.search(r"^Examples?:\n  \S", rest, re.MULTILINE), f"{task.name} shows no example"
        assert re.search(rf"(invoke|\./run) {task.name}\b", rest), f"{task.name} is not in its own examples"


@pytest.mark.parametrize("words", [["--list"], ["--help", "up"]])
def test_a_reader_of_the_help_may_go(tmp_path: Path, words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        argv = [sys.executable, "-P", "-m", "invoke", *words]
        done = subprocess.run(argv, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_bug_of_ours_shows_its_stack_and_ends_like_any_failure(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def task() -> None:
        raise KeyError("nobody thought of it")

    with pytest.raises(Exit, match="internal error: KeyError: 'nobody thought of it'") as caught:
        task()
    assert caught.value.code == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(UsageError("bad"), 2), (KeyboardInterrupt(), 130), (OSError(28, "x"), 2)])
def test_a_task_ends_with_its_exit_code(error: BaseException, code: int) -> None:
    @command
    def task() -> None:
        raise error

    with pytest.raises(Exit) as caught:
        task()
    assert caught.value.code == code


def test_sigterm_ends_a_task_in_order() -> None:
    before = signal.getsignal(signal.SIGTERM)

    @command
    def task() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(Exit) as caught:
        task()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_paths_are_relative_to_where_run_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WASILET_INVOCATION_DIR", "/somewhere/else")
    assert invocation_path("kc") == "/somewhere/else/kc"
    assert invocation_path("../kc") == "/somewhere/kc"
    assert invocation_path("/kc") == "/kc"


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        ([], True),
        (["-m", "unit"], False),
        (["-m", "e2e"], True),
        (["-m", "unit or component"], True),
        (["tests/unit/test_x.py::test_y"], False),
        (["tests/unit", "tests/e2e"], True),
        (["--co"], False),
        (["-k", "approver"], True),
    ],
)
def test_binaries_are_brought_only_for_tests_that_need_them(words: list[str], needed: bool) -> None:  # noqa: FBT001
    assert needs_binaries(words) is needed


def test_pytest_gets_its_words_as_typed_and_the_provider_by_environment() -> None:
    from wasilet.steps import SilentReporter

    words = ["--provider", "host", "-m", "unit", "-k", "a and b", "tests/unit"]
    argv, env = pytest_command(load(environ={}), words, reporter=SilentReporter())
    assert argv[1:] == ["-P", "-m", "pytest", "-m", "unit", "-k", "a and b", "tests/unit"]
    assert env["WASILET_PROVIDER"] == "host"
    with pytest.raises(UsageError, match="unknown provider"):
        pytest_command(load(environ={}), ["--provider=clouds"], reporter=SilentReporter())
