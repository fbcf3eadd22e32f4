"""The pytest plugin as its users have it: a pytest of its own, in a folder of its own, on a real cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
import wasmtime
from wasilet.apps.new_app import new_app
from wasilet.controlplane import pod_network
from wasilet.controlplane.local_registry import login_file
from wasilet.kube.client import api_path
from wasilet.state import State

from tests.clusters import TestCluster, temporary_settings
from tests.e2e.guests import needs_a_component_host

pytestmark = pytest.mark.e2e

RUN_LIMIT_SECONDS = 300
GONE_LIMIT_SECONDS = 60
SERVER = Path(__file__).resolve().parents[1] / "guests" / "http_p2.wasm"
HELLO = """
def test_hello(wasm_app, run_pod, assert_logs):
    pod = run_pod(wasm_app("hello-wasm"))
    assert_logs(pod, contains="Hello, World!", absent="panic")
    assert pod.wait_finished() == 0
    assert pod.logs() == "Hello, World!\\n"
"""
FAILING = """
def test_wrong(wasm_app, run_pod, assert_logs):
    pod = run_pod(wasm_app("hello-wasm"))
    assert_logs(pod, contains="Hello, Wrold!")
"""


class Project:
    """A folder with tests in it, and a pytest that is run there."""

    def __init__(self, folder: Path, cluster: TestCluster) -> None:
        self.folder = folder
        self.environ = {
            **{k: v for k, v in cluster.settings.environ.items() if k != "GITHUB_ACTIONS"},
            "WASILET_NAME": cluster.settings.name,
            "WASILET_OFFLINE": "1",
        }
        (folder / "pytest.ini").write_text(
            "[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n"
            "asyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        )

    def pytest(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *words],
            cwd=self.folder,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_SECONDS,
            check=False,
        )

    def write(self, text: str, name: str = "test_it.py") -> None:
        (self.folder / name).write_text(text)


@pytest.fixture
def project(tmp_path: Path, cluster: TestCluster) -> Project:
    return Project(tmp_path, cluster)


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: TestCluster) -> Iterator[None]:
    """The namespaces that a test run made are gone soon after it, and no other is."""
    before = namespaces(cluster)
    yield
    deadline = time.monotonic() + GONE_LIMIT_SECONDS
    while (left := namespaces(cluster)) - before:
        assert time.monotonic() < deadline, f"left behind: {left - before}"
        time.sleep(0.2)
    assert left == before


def namespaces(cluster: TestCluster) -> set[str]:
    return {item["metadata"]["name"] for item in cluster.kube.get(api_path("namespaces"))["items"]}


def passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_app_from_its_sample_to_asserted_logs(project: Project, cluster: TestCluster) -> None:
    project.write(HELLO)
    passed(project.pytest("--junitxml", "junit.xml"))
    assert not (project.folder / "wasilet-artifacts").exists()
    properties = {p.get("name"): p.get("value") for p in ET.parse(project.folder / "junit.xml").iter("property")}  # noqa: S314
    assert properties["wasilet.cluster"] == f"{cluster.settings.name} ({cluster.settings.provider})"
    assert str(properties["wasilet.namespace"]).startswith("test-hello-")
    assert cluster.status()["ready"], "a cluster that ran before is left running"


def test_every_fixture_in_plain_and_asynchronous_tests(project: Project) -> None:
    (project.folder / "map.yaml.j2").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: greeting}\ndata: {text: '{{ text }}'}\n"
    )
    project.write("""
import asyncio
import pytest

def test_objects(apply, kubectl, get_pod, wasm_app, namespace, cluster, registry):
    (made,) = apply("map.yaml.j2", text="hello there")
    assert made["metadata"]["namespace"] == namespace
    assert "hello there" in kubectl("get", "configmap", "greeting", "-o", "yaml")
    assert wasm_app("hello-wasm").startswith(registry + "/hello-wasm:")
    (pod,) = apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": {"restartPolicy": "Never",
                    "containers": [{"name": "c", "image": wasm_app("hello-wasm")}]}})
    assert get_pod("one").wait_finished() == pod.exit_code == 0
    assert any("Pulled" in event for event in pod.events())
    assert "error" in kubectl("get", "nonsense", check=False)

@pytest.mark.wasilet_within(60)
def test_long_running(run_pod, wasm_app, assert_logs):
    pod = run_pod(wasm_app("hello-world"), env={"INTERVAL_SECONDS": "0.05"})
    assert_logs(pod, in_order=["Hello", "Hello", "Hello"])
    assert pod.phase == "Running"
    pod.delete()

async def test_asynchronous(run_pod, wasm_app, assert_logs):
    pods = [run_pod(wasm_app("hello-wasm")) for _ in range(3)]
    logs = await asyncio.gather(*(asyncio.to_thread(assert_logs, pod, matches="^Hello") for pod in pods))
    assert [log for log in logs] == [["Hello, World!"]] * 3
    assert len({pod.name for pod in pods}) == 3

def test_a_job(apply, wasm_app, assert_logs):
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": wasm_app("hello-wasm")}]}
    apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": {"template": {"spec": pod}}})
    assert_logs("job/j", contains="Hello, World!")
""")
    passed(project.pytest())


LONG = """
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "EARLY\\nline of forty bytes to make the log long\\nLATE\\n")
  (func $say (param $at i32) (param $bytes i32)
    (i32.store (i32.const 0) (local.get $at)) (i32.store (i32.const 4) (local.get $bytes))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "_start") (local $left i32)
    (call $say (i32.const 64) (i32.const 6))
    (local.set $left (i32.const 120000))
    (loop $more
      (call $say (i32.const 70) (i32.const 41))
      (br_if $more (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
    (call $say (i32.const 111) (i32.const 5))))
"""


def test_a_log_of_120_000_lines_is_judged_whole_by_every_assertion_in_any_order(project: Project) -> None:
    (project.folder / "long.wasm").write_bytes(wasmtime.wat2wasm(LONG))
    project.write("""
import pytest

LINES = 120_002

@pytest.mark.wasilet_within(90)
def test_it(run_pod, wasm_app, assert_logs):
    p = run_pod(wasm_app("./long.wasm"))
    assert p.wait_finished() == 0
    with pytest.raises(AssertionError, match="holds 'LATE'"):
        assert_logs(p, contains="EARLY", absent="LATE")
    for _ in range(2):
        assert len(assert_logs(p, contains="LATE")) == LINES
        assert assert_logs(p, contains="EARLY")[0] == "EARLY"
        assert_logs(p, matches=["^LATE$", "^EARLY$"])
        assert_logs(p, in_order=["EARLY", "forty bytes", "LATE"], absent="NEVER")
        assert_logs(p, absent="NEVER")
        for wanted in ({"absent": "EARLY"}, {"absent": "LATE"}, {"in_order": ["LATE", "EARLY"]}, {"contains": "NEVER"}):
            with pytest.raises(AssertionError, match="120002 lines in"):
                assert_logs(p, **wanted)

def test_a_container_that_is_started_again_before_it_is_asked_for(run_pod, wasm_app, assert_logs):
    p = run_pod(wasm_app("./long.wasm"), restart_policy="Always")
    p.wait_for(lambda pod: any(c.get("restartCount") for c in pod.get("status", {}).get("containerStatuses", [])))
    lines = assert_logs(p, in_order=["EARLY", "LATE", "EARLY", "LATE"], absent="NEVER", within_seconds=60)
    assert len(lines) >= 2 * LINES
    p.delete()
    assert_logs(p, in_order=["EARLY", "LATE", "EARLY", "LATE"])
""")
    passed(project.pytest())


def test_services_their_endpoints_and_http(project: Project) -> None:
    """A Service of pods, and one of addresses with a server of this machine behind it."""
    project.write("""
import http.server
import threading
import pytest
from wasilet.testing import AssertHttp, HttpLoad, MakeService, RunPod, WasmApp, WasmCluster

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = 503 if self.path == "/broken" else 200
        self.send_response(status)
        self.send_header("X-Path", self.path)
        self.end_headers()
        self.wfile.write(b"hello from a server")

    def log_message(self, *_):
        pass

@pytest.fixture
def address(cluster: WasmCluster):
    (node, *_) = cluster.kube.get("/api/v1/nodes")["items"]
    host = next(a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP")
    server = http.server.ThreadingHTTPServer((host, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_address
    server.shutdown()
    server.server_close()
    thread.join()

def test_of_addresses(address, service: MakeService, assert_http: AssertHttp, http_load: HttpLoad) -> None:
    host, port = address
    web = service("web", port=80, target_port=port, endpoints=[host])
    assert web.wait_endpoints() == [host]
    answer = assert_http(web, "/a", contains="hello from", headers={"X-Path": "/a"})
    assert (answer.status, web.get("/broken").status) == (200, 503)
    assert service("web").cluster_ip == web.cluster_ip
    assert_http(f"http://{host}:{port}", "/a", matches="^hello")
    with http_load(web, per_second=100, max_seconds=20) as load:
        while load.result.sent < 20:
            pass
    assert load.result.failed == 0, str(load.result)
    with pytest.raises(AssertionError, match=r"status 503, not 200[\\s\\S]*HTTP 503[\\s\\S]*hello from a server"):
        assert_http(web, "/broken", within_seconds=0.3)

def test_of_pods(run_pod: RunPod, wasm_app: WasmApp, service: MakeService) -> None:
    web = service("pods", selector={"app": "x"})
    with pytest.raises(AssertionError, match="1 ready endpoints did not come within 0.3 s; there are: none"):
        web.wait_endpoints(within_seconds=0.3)
    pod = run_pod(wasm_app("hello-world"), labels={"app": "x"})
    assert pod.wait_phase("Running")
    assert web.wait_endpoints() == [pod.ip]
""")
    passed(project.pytest())


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="a pod network needs root and nft")
def test_pods_that_this_machine_has_no_way_to_are_asked_by_a_forward(project: Project, cluster: TestCluster) -> None:
    """As on kind and minikube, for which the routes to the pods are left out here."""
    if absent := pod_network.why_absent(State.of(cluster.settings)):
        pytest.skip(absent)
    needs_a_component_host()
    shutil.copy(SERVER, project.folder / "web.wasm")
    project.write("""
import pytest
from wasilet.testing import AssertHttp, MakeService, RunPod, WasmApp, reach

@pytest.fixture(autouse=True)
def no_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "machine_networks", list)

def test_it(run_pod: RunPod, wasm_app: WasmApp, service: MakeService, assert_http: AssertHttp) -> None:
    pod = run_pod(wasm_app("./web.wasm"), labels={"app": "web"}, container={"ports": [{"containerPort": 8080}]})
    assert pod.url(8080).startswith("http://127.0.0.1:")
    assert_http(pod, "/hello", port=8080)
    web = service("web", selector={"app": "web"}, port=80, target_port=8080)
    assert web.wait_endpoints() == [pod.ip]
    assert_http(web, "/hello")
""")
    passed(project.pytest())


def test_a_failure_shows_the_log_the_status_and_the_events_and_names_the_artifacts(project: Project) -> None:
    project.write(FAILING)
    done = project.pytest(GITHUB_ACTIONS="true", GITHUB_WORKSPACE=str(project.folder))
    assert done.returncode == 1
    for words in (
        r"MISSING  contains 'Hello, Wrold!'",
        r"line 1 is most like it",
        r"1  Hello, World!",
        r"pod/hello-wasm: Succeeded on ",
        r"Normal Pulled: Successfully pulled image",
        r"artifacts: .*/wasilet-artifacts/test_it.py-test_wrong",
        r"(?m)^::error file=test_it.py,line=4,title=test_it.py%3A%3Atest_wrong::AssertionError",
    ):
        assert re.search(words, done.stdout), f"{words}\n{done.stdout}"
    assert "harness/" not in done.stdout.replace("harness/data", ""), "the plugin's own frames are of no interest"
    folder = project.folder / "wasilet-artifacts/test_it.py-test_wrong"
    assert "Hello, World!" in (folder / "logs/hello-wasm-hello-wasm.log").read_text()
    assert "kind: Pod" in (folder / "pods/hello-wasm.yaml").read_text()
    assert "Scheduled" in (folder / "events.txt").read_text()
    assert list((folder / "nodes").glob("*.yaml"))
    assert list((folder / "nodes").glob("*.log"))
    assert not (folder / "problems.txt").exists()


def test_an_image_that_is_not_there_fails_at_once_with_the_registrys_word(project: Project) -> None:
    project.write("""
def test_it(run_pod, registry, assert_logs):
    assert_logs(run_pod(registry + "/nobody:v1"), contains="x", within_seconds=120)
""")
    done = project.pytest()
    assert done.returncode == 1
    assert "ImagePullBackOff" in done.stdout
    assert "nobody:v1" in done.stdout


def test_an_app_that_does_not_compile_shows_the_compilers_words(project: Project) -> None:
    broken = project.folder / "broken"
    broken.mkdir()
    (broken / "main.c").write_text("int main(void) { return nonsense; }\n")
    project.write('def test_it(wasm_app):\n    wasm_app("./broken")\n')
    done = project.pytest()
    assert done.returncode == 1
    assert "use of undeclared identifier 'nonsense'" in done.stdout
    assert "Traceback" not in done.stdout


def test_what_is_no_app_is_said_with_what_there_is(project: Project) -> None:
    project.write('def test_it(wasm_app):\n    wasm_app("helo-wasm")\n')
    assert "hello-wasm" in project.pytest().stdout


def test_one_failure_among_workers_leaves_the_others_alone(project: Project) -> None:
    project.write("import pytest\n" + HELLO.replace("(wasm_app, run", "(n, wasm_app, run").replace(
        "def test_hello", '@pytest.mark.parametrize("n", range(6))\ndef test_hello') + FAILING)  # fmt: skip
    done = project.pytest("-n", "2", "--wasilet-report", "report.html")
    assert done.returncode == 1
    assert "1 failed, 6 passed" in done.stdout
    page = (project.folder / "report.html").read_text()
    assert page.count("<section>") == 7


def test_kept_namespaces_of_failed_tests_stay(project: Project, cluster: TestCluster) -> None:
    project.write(HELLO + FAILING)
    before = namespaces(cluster)
    done = project.pytest("--wasilet-keep")
    left = namespaces(cluster) - before
    failed = {name for name in left if name.startswith("test-wrong-")}
    assert len(failed) == 1
    assert f"namespace: {failed.pop()} and kept" in done.stdout
    for name in left:
        cluster.kube.delete(api_path("namespaces", name))


def test_a_kubeconfig_alone_is_enough(project: Project, cluster: TestCluster) -> None:
    project.write(HELLO)
    address = cluster.status()["registry"]
    passed(project.pytest(
        "--wasilet-kubeconfig", str(cluster.admin_kubeconfig), "--wasilet-registry", address,
        WASILET_STATE_HOME=str(project.folder / "nothing"),
        DOCKER_CONFIG=str(login_file(cluster.cluster.state).parent),
    ))  # fmt: skip
    done = project.pytest(
        "--wasilet-kubeconfig", str(cluster.admin_kubeconfig), WASILET_STATE_HOME=str(project.folder / "nothing")
    )
    assert "--wasilet-registry" in done.stdout


def test_the_template_of_new_passes_its_own_test(project: Project) -> None:
    new_app("greeter", str(project.folder))
    passed(project.pytest("greeter"))


def test_a_cluster_of_its_own_is_shared_by_workers_and_gone_afterwards(project: Project) -> None:
    with temporary_settings("shared") as settings:
        project.write("import pytest\n" + HELLO.replace("(wasm_app, run", "(n, wasm_app, run").replace(
            "def test_hello", '@pytest.mark.parametrize("n", range(4))\ndef test_hello'))  # fmt: skip
        state = settings.environ["WASILET_STATE_HOME"]
        kubeconfig = Path(settings.environ["KUBECONFIG"])
        passed(project.pytest("-n", "2", WASILET_STATE_HOME=state, WASILET_NAME="shared", KUBECONFIG=str(kubeconfig)))
        assert not (Path(state) / "shared").exists()
        assert not list(Path(state).glob(".pytest-*.json"))
        assert not kubeconfig.exists(), "the user's kubeconfig is left alone"


def _installed(site: Path) -> set[str]:
    """The top-level packages that the wheel brings."""
    (record,) = site.glob("wasilet-*.dist-info/RECORD")
    tops = {line.partition("/")[0] for line in record.read_text().splitlines()}
    return {top for top in tops if top.isidentifier()}


def _commands_work(programs: Path, folder: Path, environ: dict[str, str]) -> None:
    """Both commands, from a folder that holds names which must not count."""
    (folder / "node").mkdir()
    (folder / "node" / "__init__.py").write_text("raise SystemExit('a folder of the user was imported')\n")
    (folder / "yaml.py").write_text("raise SystemExit('a file of the user was imported')\n")
    (folder / "tasks.py").write_text("raise SystemExit('tasks of the user were loaded')\n")

    def printed(*words: str) -> str:
        done = subprocess.run(
            [programs / words[0], *words[1:]], cwd=folder, env=environ, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert {"up", "demo", "doctor", "status"} <= {
        line.split()[0] for line in printed("wasilet", "--list").splitlines() if line.strip()
    }
    assert "hello-world" in printed("wasilet", "samples")
    assert "complete -F" in printed("wasilet", "completion", "bash", "--program", "wasilet")
    assert "--bootstrap-file" in printed("wasilet-node", "--help")
    for name in ("node", "yaml.py", "tasks.py"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def test_the_wheel_alone_is_enough(project: Project, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Installed into an empty environment, with nothing of the checkout on the path but the dependencies."""
    root = Path(__file__).resolve().parents[2]
    work = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(work)]
    subprocess.run(build, cwd=root, check=True, capture_output=True, timeout=120)
    (wheel,) = work.glob("*.whl")
    venv = work / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    python = venv / "bin/python"
    (site,) = venv.glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index",
         "--disable-pip-version-check", wheel], check=True, timeout=120,
    )  # fmt: skip
    # The dependencies, but not this project's own editable installation.
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if not entry.name.startswith(("wasilet", "_wasilet", "_editable")) and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    for leftover in site.glob("*wasilet*.pth"):
        leftover.unlink()
    assert _installed(site) == {"wasilet", "wasilet_common", "wasilet_node"}
    environ = {k: v for k, v in project.environ.items() if k != "PYTHONPATH"}
    _commands_work(venv / "bin", project.folder, environ)
    # The wheel brings the component host's sources, the very same: what was built of them is found by either.
    key = "from wasilet_node.runtime.component_host import locate; print(locate.key())"
    keys = [
        subprocess.run([each, "-P", "-c", key], env=environ, capture_output=True, text=True, timeout=60, check=True)
        for each in (python, sys.executable)
    ]
    assert keys[0].stdout == keys[1].stdout
    project.write(HELLO + "\ndef test_where():\n    import wasilet\n    assert 'venv' in wasilet.__file__\n")
    done = subprocess.run(
        [python, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--wasilet-report", "r.html"],
        cwd=project.folder, env=environ, capture_output=True, text=True, timeout=RUN_LIMIT_SECONDS, check=False,
    )  # fmt: skip
    passed(done)
    assert (project.folder / "r.html").is_file()
    shutil.rmtree(work)
