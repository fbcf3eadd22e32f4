"""The pytest plugin: fixtures and assertions for wasm apps on a cluster. See docs/testing.md.

Every pytest run where Wasilet is installed loads this module, so it imports nothing but pytest; what a fixture
needs is imported when a test first asks for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from wasilet.testing.cluster import WasmCluster, Wish
    from wasilet.testing.fixtures import (
        Apply,
        AssertHttp,
        AssertLogs,
        GetPod,
        HttpLoad,
        Kubectl,
        MakeService,
        RunPod,
        WasmApp,
    )
    from wasilet.testing.test_namespace import TestNamespace

CONTROLLER_KEY = "wasilet_controller_pid"
REPORT_KEY = "wasilet_report_folder"
JOINED_KEY = "wasilet_joined"

_JOINED = pytest.StashKey[bool]()
_SCENE = pytest.StashKey["TestNamespace"]()
_VERSION = pytest.StashKey["tuple[str, str]"]()
_FAILED = pytest.StashKey[bool]()
_LEFT = pytest.StashKey[str]()
_REPORT_FOLDER = pytest.StashKey[Path]()

_MARKERS = (
    "wasilet: uses a cluster (given by the plugin to every test that asks for the fixture `cluster`)",
    "wasilet_provider(name, ...): runs only on these providers, and is skipped on others",
    "wasilet_within(seconds): the limit of this test's waits that name none",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """All begin with ``--wasilet-``: other plugins own the short names."""
    group = parser.getgroup("wasilet", "Wasilet: wasm apps on a Kubernetes cluster")
    group.addoption("--wasilet-provider", default="", metavar="NAME", help="host (default), kind, k3d, ...")
    group.addoption("--wasilet-name", default="", metavar="NAME", help="the cluster (default: wasilet)")
    group.addoption(
        "--wasilet-kubeconfig", default="", metavar="FILE", help="test on this cluster; nothing is stood up or ended"
    )
    group.addoption("--wasilet-registry", default="", metavar="HOST:PORT", help="push images there")
    group.addoption(
        "--wasilet-keep",
        action="store_true",
        help="leave the cluster running, and the namespaces of failed tests in it",
    )
    group.addoption(
        "--wasilet-artifacts",
        default="wasilet-artifacts",
        metavar="DIR",
        help="where failed tests leave logs, events and objects (default: %(default)s)",
    )
    group.addoption(
        "--wasilet-within", type=float, default=None, metavar="SECONDS", help="the limit of waits (default: 30)"
    )
    group.addoption("--wasilet-report", default="", metavar="FILE", help="write an HTML page of what the pods did")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers, so that ``--strict-markers`` knows them."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if config.getoption("wasilet_report") and not _is_worker(config):
        import tempfile

        config.stash[_REPORT_FOLDER] = Path(tempfile.mkdtemp(prefix="wasilet-report-"))


# --- xdist -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """The process that starts the workers stands for the whole run; see wasilet.testing.cluster."""
    node.workerinput[CONTROLLER_KEY] = os.getpid()
    folder = node.config.stash.get(_REPORT_FOLDER, None)
    if folder is not None:
        node.workerinput[REPORT_KEY] = str(folder)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker that crashed may have used the cluster: then the file is asked."""
    if error is not None or getattr(node, "workeroutput", {}).get(JOINED_KEY):
        node.config.stash[_JOINED] = True


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _worker_input(config: pytest.Config) -> Mapping[str, Any]:
    given: Mapping[str, Any] = getattr(config, "workerinput", {})
    return given


# --- the life of a run -----------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives the marker before ``-m`` looks at it."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("wasilet")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is for other providers."""
    marker = item.get_closest_marker("wasilet_provider")
    if marker is None:
        return
    with _clearly():
        provider = _wish(item.config).settings().provider
    if provider not in marker.args:
        pytest.skip(f"for {', '.join(map(str, marker.args))} only; the provider is {provider}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """While the namespace is still there, a failed test's artifacts are gathered and named in its report."""
    report = yield
    test_namespace = item.stash.get(_SCENE, None)
    if report.failed:
        item.stash[_FAILED] = True
    if test_namespace is None or not report.failed or report.when == "teardown":
        return report
    from wasilet.testing.artifacts import gather

    root = item.config.invocation_params.dir / item.config.getoption("wasilet_artifacts")
    try:
        folder = gather(test_namespace, root, item.nodeid, report.longreprtext)
    except OSError as error:
        report.sections.append(("wasilet", f"no artifacts: {error}"))
        return report
    _property(item, "wasilet.artifacts", str(folder))
    report.user_properties.append(("wasilet.artifacts", str(folder)))
    kept = " and kept" if item.config.getoption("wasilet_keep") else ""
    report.sections.append(("wasilet", f"artifacts: {folder}\nnamespace: {test_namespace.namespace}{kept}"))
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After xdist's own: all workers are done. The last run that uses the cluster brings back what was before."""
    config = session.config
    if _is_worker(config):
        config.workeroutput[JOINED_KEY] = config.stash.get(_JOINED, False)  # type: ignore[attr-defined]
        return
    if config.stash.get(_JOINED, False):
        from wasilet.errors import HarnessError
        from wasilet.testing.cluster import leave, own_process

        try:
            config.stash[_LEFT] = leave(_wish(config), own_process(os.getpid()))
        except HarnessError as error:
            config.stash[_LEFT] = f"error: {error}"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    folder = config.stash.get(_REPORT_FOLDER, None)
    if folder is not None:
        from wasilet.testing.timeline import write_report

        target = config.invocation_params.dir / config.getoption("wasilet_report")
        config.stash[_LEFT] = f"{config.stash.get(_LEFT, '')}\n{write_report(folder, target)}".strip()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Annotations for GitHub, and what was left."""
    if left := config.stash.get(_LEFT, ""):
        for line in left.splitlines():
            terminalreporter.write_line(f"wasilet: {line}")
    other = "pytest_github_actions_annotate_failures"
    if os.environ.get("GITHUB_ACTIONS") != "true" or config.pluginmanager.hasplugin(other):
        return
    from wasilet.testing.annotations import annotation

    for outcome in ("failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if any(name.startswith("wasilet.") for name, _ in getattr(report, "user_properties", ())):
                terminalreporter.write_line(annotation(report, root=config.rootpath))


def _property(item: pytest.Item, name: str, value: str) -> None:
    """Goes into JUnit's ``<properties>`` of the test."""
    item.user_properties[:] = [pair for pair in item.user_properties if pair[0] != name]
    item.user_properties.append((name, value))


def _pytest_kinds_name(config: pytest.Config) -> str:
    """What pytest-kind calls its cluster, where that plugin is installed and kind is asked for without a name of its
    own; empty elsewhere. It is never imported: its options and its fixture are all that is used."""
    provider = config.getoption("wasilet_provider") or os.environ.get("WASILET_PROVIDER", "")
    if provider != "kind" or config.getoption("wasilet_name") or config.getoption("wasilet_kubeconfig"):
        return ""
    absent = object()
    if config.getoption("kind_kubectl_bin", absent) is absent:
        return ""
    return str(config.getoption("cluster_name", ""))


def _wish(config: pytest.Config) -> Wish:
    from wasilet.testing.cluster import Wish

    kubeconfig = config.getoption("wasilet_kubeconfig")
    return Wish(
        provider=config.getoption("wasilet_provider"),
        name=config.getoption("wasilet_name") or _pytest_kinds_name(config),
        kubeconfig=str(config.invocation_params.dir / Path(kubeconfig).expanduser()) if kubeconfig else "",
        registry=config.getoption("wasilet_registry"),
        keep=config.getoption("wasilet_keep"),
    )


def _clearly() -> AbstractContextManager[None]:
    from wasilet.testing.fixtures import clear_failures

    return clear_failures()


def _progress_printer(config: pytest.Config) -> Callable[[str], None]:
    """Reports what takes long, past pytest's capturing; a worker has no one to report to."""
    capture = config.pluginmanager.getplugin("capturemanager")

    def say(line: str) -> None:
        if not _is_worker(config):
            with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
                sys.stderr.write(f"\nwasilet: {line}")
                sys.stderr.flush()

    return say


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[WasmCluster]:
    """A running cluster with a Ready wasm node (wasilet.testing.cluster.WasmCluster), shared by all tests and workers.

    One that runs already is used and left running; else one is started, and deleted after the last test. With
    pytest-kind installed and provider kind, its fixture makes the cluster, and this one joins a node to it."""
    from wasilet.testing.cluster import join, own_process

    if _pytest_kinds_name(pytestconfig):
        request.getfixturevalue("kind_cluster")
    with _clearly():
        user = own_process(int(_worker_input(pytestconfig).get(CONTROLLER_KEY) or os.getpid()))
        pytestconfig.stash[_JOINED] = True
        made = join(_wish(pytestconfig), user, say=_progress_printer(pytestconfig))
    yield made
    made.kube.close()


@pytest.fixture(scope="session")
def registry(cluster: WasmCluster) -> str:
    """``host:port`` of the registry that the cluster's nodes pull from."""
    if not cluster.registry:
        pytest.fail(
            "no registry is known: name one with --wasilet-registry HOST:PORT, or let `invoke up` bring a cluster "
            "that has one",
            pytrace=False,
        )
    return cluster.registry


@pytest.fixture(scope="session")
def wasm_app(cluster: WasmCluster, pytestconfig: pytest.Config) -> WasmApp:
    """``wasm_app("hello-world")``: the image of a sample, a folder or a ``.wasm`` file, built and pushed once."""
    from wasilet.testing.fixtures import WasmApp
    from wasilet.testing.images import Images

    return WasmApp(Images(cluster, (pytestconfig.invocation_params.dir, pytestconfig.rootpath)))


@pytest.fixture
def namespace(cluster: WasmCluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a namespace of this test's own, removed after it."""
    from wasilet.testing.cluster import own_process, run_identity
    from wasilet.testing.test_namespace import create_namespace, remove_namespace

    config = request.config
    run = run_identity(own_process(int(_worker_input(config).get(CONTROLLER_KEY) or os.getpid())))
    with _clearly():
        made = create_namespace(cluster, request.node.name, run)
    name = str(made["metadata"]["name"])
    request.node.stash[_VERSION] = (name, str(made["metadata"]["resourceVersion"]))
    yield name
    if not (config.getoption("wasilet_keep") and request.node.stash.get(_FAILED, False)):
        with _clearly():
            remove_namespace(cluster, name)


@pytest.fixture
def wasilet_scene(cluster: WasmCluster, namespace: str, request: pytest.FixtureRequest) -> Iterator[TestNamespace]:
    """What the fixtures below share: the test's namespace, and what is seen in it
    (wasilet.testing.test_namespace.TestNamespace)."""
    from wasilet.testing.test_namespace import DEFAULT_WITHIN_SECONDS, TestNamespace

    config, node = request.config, request.node
    marker = node.get_closest_marker("wasilet_within")
    limit = float(marker.args[0]) if marker is not None else config.getoption("wasilet_within")
    own, version = node.stash.get(_VERSION, ("", ""))
    test_namespace = TestNamespace(
        cluster,
        namespace,
        version=version if own == namespace else "",
        within_seconds=DEFAULT_WITHIN_SECONDS if limit is None else limit,
    )
    node.stash[_SCENE] = test_namespace
    _property(node, "wasilet.cluster", f"{cluster.name} ({cluster.provider})")
    _property(node, "wasilet.namespace", namespace)
    yield test_namespace
    folder = config.stash.get(_REPORT_FOLDER, None) or _worker_input(config).get(REPORT_KEY)
    if folder:
        from wasilet.testing.timeline import save

        save(test_namespace, node.nodeid, Path(folder), failed=node.stash.get(_FAILED, False))
    test_namespace.close()
    with _clearly():
        test_namespace.remove_strays(everything=own != namespace)


@pytest.fixture
def run_pod(wasilet_scene: TestNamespace) -> RunPod:
    """``run_pod(image, env={"NAME": "x"})``: a pod with one container in the test's namespace.

    Also: ``name, command, args, restart_policy="Never", labels, annotations``, and ``container={...}``,
    ``spec={...}`` for any further field of these two."""
    from wasilet.testing.fixtures import RunPod

    return RunPod(wasilet_scene)


@pytest.fixture
def apply(wasilet_scene: TestNamespace, request: pytest.FixtureRequest) -> Apply:
    """``apply("pod.yaml")``: create objects in the test's namespace, from a file, YAML text, an object or a list.

    A file whose name ends in ``.j2`` is a Jinja2 template that gets the keyword arguments. Returns one entry per
    object: for a Pod the same as ``run_pod``, else the object as the API server answered."""
    from wasilet.testing.fixtures import Apply

    return Apply(wasilet_scene, (request.path.parent, request.config.invocation_params.dir, request.config.rootpath))


@pytest.fixture
def get_pod(wasilet_scene: TestNamespace) -> GetPod:
    """``get_pod("name")``: a pod of the test's namespace, waited for when it is not there yet."""
    from wasilet.testing.fixtures import GetPod

    return GetPod(wasilet_scene)


@pytest.fixture
def assert_logs(wasilet_scene: TestNamespace) -> AssertLogs:
    """``assert_logs(pod, contains="x", within_seconds=30)``: wait until a log holds what it must; its lines.

    ``contains``: a text or several, in any order; ``matches``: regular expressions; ``in_order``: each in a later line
    than the one before; ``absent``: in no line until then (alone: until the pod is over, or the limit). ``pod``: what
    ``run_pod`` returned, a pod's name, ``job/x`` or ``deployment/x``. ``container``: only this one's."""
    from wasilet.testing.fixtures import AssertLogs

    return AssertLogs(wasilet_scene)


@pytest.fixture
def kubectl(cluster: WasmCluster, namespace: str) -> Kubectl:
    """``kubectl("get", "pods")``: what it prints; in the test's namespace unless told otherwise.

    A failure is the test's, with kubectl's own message; ``check=False`` leaves that to the test. Further:
    ``input``, ``timeout_seconds`` (60)."""
    from wasilet.testing.fixtures import Kubectl

    return Kubectl(cluster, namespace)


@pytest.fixture
def service(wasilet_scene: TestNamespace) -> MakeService:
    """``service("web", selector={"app": "web"}, port=80, target_port=8080)``: a Service of the test's namespace.

    Without ``selector`` and ``endpoints`` the one that is there. It has ``wait_endpoints()`` and ``get("/path")``."""
    from wasilet.testing.fixtures import MakeService

    return MakeService(wasilet_scene)


@pytest.fixture
def assert_http(wasilet_scene: TestNamespace) -> AssertHttp:
    """``assert_http(target, "/path", status=200, contains="x")``: ask until the answer is as it must be; the answer.

    ``target``: a URL, a pod (with ``port=``) or what ``service`` gives. Also ``headers``, ``matches``, ``absent``,
    ``method``, ``send_headers``, ``body``, ``within_seconds``."""
    from wasilet.testing.fixtures import AssertHttp

    return AssertHttp(wasilet_scene)


@pytest.fixture
def http_load(wasilet_scene: TestNamespace) -> HttpLoad:
    """``with http_load(target, per_second=100) as load: ...``: requests meanwhile; then ``load.result.failed``.

    It ends with its block, and after ``max_seconds`` (60)."""
    from wasilet.testing.fixtures import HttpLoad

    return HttpLoad(wasilet_scene)
