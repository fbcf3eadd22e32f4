"""What a demo.yaml may say, when an expectation is met, what is replaced and what is never touched."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from wasilet.apps.samples import Expectation, Line, LocalSpec, find_app, sample_names
from wasilet.demo import local_run as runs
from wasilet.demo.expect import ExpectationError, missing_line, wait_for
from wasilet.errors import ApiError, HarnessError, StateError, UsageError, WaitTimeoutError
from wasilet.kube.manifest_file import parse_objects
from wasilet.kube.resources import FIELD_MANAGER, Resources

from tests.unit.harness.fake_kube import FakeKube, jobs_of, pods_of

pytestmark = pytest.mark.unit

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": []}}


# --- demo.yaml -------------------------------------------------------------------------------------------------------


def demo_of(tmp_path: Path, text: str) -> Any:
    folder = tmp_path / "app"
    folder.mkdir(exist_ok=True)
    (folder / "demo.yaml").write_text(text)
    return find_app(str(folder)).demo


def test_every_sample_has_a_description_and_something_to_type_next() -> None:
    assert {"hello-world", "hello-wasm", "cat-facts"} <= set(sample_names())
    for name in sample_names():
        demo = find_app(name).demo
        assert demo.description
        assert demo.next
        assert (find_app(name).folder / "README.md").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expect: [{pod: a, lgo: [x]}]", "unknown key 'lgo'"),
        ("exepct: []", "unknown key 'exepct'"),
        ("expect: [{log: [x]}]", "must name one pod, job, deployment or service"),
        ("expect: [{pod: a, job: b}]", "must name one pod, job, deployment or service"),
        ("expect: [{service: a}]", "a service is asked nothing else"),
        ("expect: [{pod: a, http: [{path: /}]}]", "a service is asked nothing else"),
        ("expect: [{pod: a, rolling_update: a}]", "rolling_update needs the service"),
        ("expect: [{service: a, http: [{pth: /}]}]", r"expect\[0\].http\[0\] has an unknown key 'pth'"),
        ("local: {http: {path: /}}", "local.http must be a list"),
        ("expect: {pod: a}", "expect must be a list"),
        ("expect: [{pod: a, log: [{matches: '['}]}]", "no regular expression"),
        ("expect: [{pod: a, log: [{matches: a, contains: b}]}]", "one of contains, matches and absent"),
        ("expect: [{pod: a, log: x}]", "must be a list"),
        ("expect: [{pod: a, exit_code: zero}]", "must be int"),
        ("expect: [{pod: a, within_seconds: soon}]", "must be int or float"),
        ("expect: [{pod: a, exit_code: true}]", "must be int"),
        ("local: {env: {A: 1}}", "write it in quotes"),
        ("local: [a]", "local must be a mapping"),
        ("manifests: pod.yaml", "must be a list"),
        ("- a", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_demo_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        demo_of(tmp_path, text)
    assert "demo.yaml" in error.value.message


def test_a_folder_without_demo_is_an_app_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "My_App").mkdir()
    app = find_app(str(tmp_path / "My_App"))
    assert (app.name, app.demo.expect) == ("my-app", ())


def test_an_unknown_sample_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sample 'hello-wrold'") as error:
        find_app("hello-wrold", environ={"WASILET_INVOCATION_DIR": str(tmp_path)})
    assert "hello-world" in error.value.hint
    with pytest.raises(UsageError, match="there is no folder"):
        find_app("./hello-wrold", environ={"WASILET_INVOCATION_DIR": str(tmp_path)})


def test_a_path_is_relative_to_where_the_person_is(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    assert find_app("./cat", environ={"WASILET_INVOCATION_DIR": str(tmp_path)}).folder == tmp_path / "cat"


# --- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        ([Line(contains="one"), Line(contains="three")], ""),
        ([Line(contains="three"), Line(contains="one")], "a line with 'one'"),
        ([Line(contains="two"), Line(contains="two")], "a line with 'two'"),
        ([Line(matches="^t.o$")], ""),
        ([Line(matches="^wo")], "a line that matches '^wo'"),
        ([Line(absent="four"), Line(contains="one")], ""),
        ([Line(absent="two")], "no line with 'two'"),
        ([], ""),
    ],
)
def test_lines_are_wanted_in_their_order_each_its_own(wanted: list[Line], missing: str) -> None:
    assert missing_line(wanted, ["one", "two", "three"]) == missing


# --- expectations ----------------------------------------------------------------------------------------------------


def pod(phase: str, **state: Any) -> dict[str, Any]:
    status = {"name": "main", "restartCount": 0, "containerID": "wasmtime://1", "state": state}
    return {
        "kind": "Pod",
        "metadata": {"name": "x", "namespace": "default", "uid": "1"},
        "spec": {"nodeName": "n"},
        "status": {"phase": phase, "containerStatuses": [status]},
    }


def show(kube: FakeKube, obj: dict[str, Any]) -> None:
    kube.show((jobs_of if obj["kind"] == "Job" else pods_of)("default"), obj)


def ended(code: int, reason: str = "Completed") -> dict[str, Any]:
    return {"exitCode": code, "reason": reason, "containerID": "wasmtime://1"}


FAILED = {
    "metadata": {},
    "involvedObject": {"uid": "1"},
    "type": "Warning",
    "reason": "Failed",
    "message": "no such image",
}


def wait(kube: FakeKube, **expected: Any) -> Any:
    expectation = Expectation(**{"pod": "x", "within_seconds": 2.0, **expected})
    return wait_for(kube, expectation, namespace="default")


def test_a_line_in_the_log_of_a_running_pod_is_enough() -> None:
    kube = FakeKube()
    kube.logs["x"] = ["Hello"]
    show(kube, pod("Running", running={}))
    seen = wait(kube, log=(Line(contains="Hello"),), phase="Running")
    assert seen.lines == ("Hello",)
    (query,) = kube.log_queries
    assert query["path"] == "/api/v1/namespaces/default/pods/x/log"
    assert (query["container"], query["follow"]) == ("main", "true")


def test_news_that_comes_late_is_not_missed() -> None:
    kube = FakeKube()
    kube.logs["x"] = ["Hello"]
    timer = threading.Timer(0.15, show, [kube, pod("Running", running={})])
    timer.start()
    assert wait(kube, log=(Line(contains="Hello"),)).seconds >= 0.1
    timer.join()


def test_the_end_before_the_restart_counts() -> None:
    kube = FakeKube()
    shown = pod("Running", waiting={"reason": "CrashLoopBackOff"})
    shown["status"]["containerStatuses"][0]["lastState"] = {"terminated": ended(0)}
    kube.logs["x previous"] = ["Hello, World!"]
    show(kube, shown)
    assert wait(kube, log=(Line(contains="Hello"),), exit_code=0, reason="Completed").lines == ("Hello, World!",)


def test_a_pod_that_ends_without_the_line_fails_at_once_and_shows_why() -> None:
    kube = FakeKube()
    kube.logs["x"] = ["Good bye"]
    kube.put("/api/v1/namespaces/default/events/e", FAILED)
    show(kube, pod("Failed", terminated=ended(3, "Error")))
    with pytest.raises(ExpectationError) as error:
        wait(kube, log=(Line(contains="Hello"),), within_seconds=30.0)
    text = error.value.message
    assert "pod/x is over (Failed) without a line with 'Hello' in the log of pod/x" in text
    assert "| Good bye" in text
    assert "main state terminated (exit code 3): Error" in text
    assert "event  Warning Failed: no such image" in text


def test_a_wrong_exit_code_is_named() -> None:
    kube = FakeKube()
    show(kube, pod("Succeeded", terminated=ended(0)))
    with pytest.raises(ExpectationError, match="without exit code 7"):
        wait(kube, exit_code=7)


def test_an_image_that_cannot_be_pulled_is_not_waited_for() -> None:
    kube = FakeKube()
    show(kube, pod("Pending", waiting={"reason": "ImagePullBackOff", "message": "Back-off pulling image"}))
    with pytest.raises(ExpectationError, match="pod/x waits: ImagePullBackOff: Back-off pulling image"):
        wait(kube, phase="Running", within_seconds=30.0)


def test_a_line_that_must_not_be_there_fails_at_once() -> None:
    kube = FakeKube()
    kube.logs["x"] = ["ERROR: cat"]
    show(kube, pod("Running", running={}))
    with pytest.raises(ExpectationError, match="holds 'ERROR', which it must not"):
        wait(kube, log=(Line(absent="ERROR"), Line(contains="never")), within_seconds=30.0)


def test_what_never_comes_is_named_when_the_time_is_over() -> None:
    with pytest.raises(ExpectationError, match=r"pod/x to appear did not come within 0\.3 s"):
        wait(FakeKube(), within_seconds=0.3)


def test_a_job_is_judged_by_its_own_condition_and_its_pods_restarts() -> None:
    kube = FakeKube()
    job = {"kind": "Job", "metadata": {"name": "j"}, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    shown = pod("Succeeded", terminated=ended(0))
    shown["metadata"]["labels"] = {"batch.kubernetes.io/job-name": "j"}
    shown["status"]["containerStatuses"][0]["restartCount"] = 1
    show(kube, job)
    show(kube, shown)
    assert wait(kube, pod="", job="j", phase="Complete", restarts=1)
    failed = FakeKube()
    job["status"]["conditions"] = [{"type": "Failed", "status": "True", "message": "BackoffLimitExceeded"}]  # type: ignore[index]
    show(failed, job)
    with pytest.raises(ExpectationError, match="job/j failed: BackoffLimitExceeded"):
        wait(failed, pod="", job="j", phase="Complete", within_seconds=30.0)


# --- what is applied -------------------------------------------------------------------------------------------------


PATH = "/api/v1/namespaces/default/pods/x"


def resources(kube: FakeKube) -> Resources:
    return Resources(kube, "default")


def test_a_pod_is_created_and_the_second_time_replaced() -> None:
    kube = FakeKube()
    assert resources(kube).apply([POD]) == ["pod/x created"]
    first = kube.objects[PATH]["metadata"]["uid"]
    assert resources(kube).apply([POD]) == ["pod/x replaced"]
    assert kube.objects[PATH]["metadata"]["uid"] != first
    assert POD["metadata"] == {"name": "x"}, "the manifest itself was changed"


@pytest.mark.parametrize("kind", ["Pod", "ConfigMap"])
def test_a_generated_name_is_another_each_time_and_only_the_last_stays(kind: str) -> None:
    kube = FakeKube()
    obj = {"apiVersion": "v1", "kind": kind, "metadata": {"generateName": "job-"}}
    path = f"/api/v1/namespaces/default/{kind.lower()}s"
    for name, manager in (("job-theirs", "kubectl"), ("job", "wasilet")):
        kube.put(f"{path}/{name}", obj if manager == "kubectl" else {**obj, "metadata": {}}, manager=manager)
    others = set(kube.objects)
    (first,) = resources(kube).apply([obj])
    assert re.fullmatch(rf"{kind.lower()}/job-\d+ created", first)
    (second,) = resources(kube).apply([obj])
    assert re.fullmatch(rf"{kind.lower()}/job-\d+ replaced", second)
    (left,) = set(kube.objects) - others
    assert f"{kind.lower()}/{left.rpartition('/')[2]} replaced" == second
    assert obj["metadata"] == {"generateName": "job-"}, "the manifest itself was changed"
    assert resources(kube).remove([obj]) == [second.removesuffix(" replaced")]
    assert set(kube.objects) == others


def test_what_the_server_refuses_is_named_with_the_line_of_its_file() -> None:
    kube = FakeKube()
    kube.refusals["POST"] = ApiError('Pod "x" is invalid: spec.foo: Invalid value: 1', code=422, reason="Invalid")
    objects = parse_objects("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec:\n  foo: 1\n", Path("pod.yaml"))
    with pytest.raises(ApiError, match=r'^pod\.yaml, line 5: Pod "x" is invalid'):
        resources(kube).apply(objects)


@pytest.mark.parametrize("obj", [POD, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}])
def test_a_namespace_that_is_not_there_is_told_with_what_makes_it(obj: Any) -> None:
    kube = FakeKube()
    missing = ApiError('namespaces "default" not found', code=404, reason="NotFound")
    kube.refusals |= {"POST": missing, "PATCH": missing}
    with pytest.raises(UsageError, match="there is no namespace 'default'") as error:
        resources(kube).apply([obj])
    assert error.value.hint == "kubectl create namespace default"


def test_what_somebody_else_made_is_named_and_nothing_is_changed() -> None:
    kube = FakeKube()
    kube.put(PATH, POD, manager="kubectl-client-side-apply")
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    with pytest.raises(UsageError, match="pod/x exists in namespace default, and something else made it") as error:
        resources(kube).apply([config, POD])
    assert error.value.hint.startswith("kubectl delete pod/x -n default")
    assert kube.requests == []


def test_removing_takes_only_what_was_made_here() -> None:
    kube = FakeKube()
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    resources(kube).apply([POD])
    kube.put("/api/v1/namespaces/default/configmaps/c", config, manager="kubectl")
    assert resources(kube).remove([config, POD]) == ["pod/x"]
    assert list(kube.objects) == ["/api/v1/namespaces/default/configmaps/c"]
    assert resources(kube).remove([POD]) == []


def test_what_does_not_go_is_an_error_that_names_its_finalizers() -> None:
    kube = FakeKube()
    resources(kube).apply([POD])
    kube.stuck.add(PATH)
    kube.objects[PATH]["metadata"]["finalizers"] = ["example.org/wait"]
    with pytest.raises(WaitTimeoutError, match=r"pod/x is not gone after 0\.2 s \(finalizers: example\.org/wait\)"):
        resources(kube).apply([POD], timeout_seconds=0.2)


def test_other_kinds_are_applied_in_place_and_unknown_kinds_are_asked_of_the_server() -> None:
    kube = FakeKube()
    kube.objects["/apis/example.org/v1"] = {
        "resources": [{"name": "cats", "kind": "Cat", "namespaced": True}, {"name": "cats/status", "kind": "Cat"}]
    }
    cat = {"apiVersion": "example.org/v1", "kind": "Cat", "metadata": {"name": "tom"}}
    assert resources(kube).apply([cat]) == ["cat/tom created"]
    assert resources(kube).apply([cat]) == ["cat/tom applied"]
    assert kube.requests[-1][:2] == ("PATCH", "/apis/example.org/v1/namespaces/default/cats/tom")
    with pytest.raises(UsageError, match=r"no kind Dog in example\.org/v1"):
        resources(kube).apply([{**cat, "kind": "Dog"}])


def test_the_field_manager_is_what_marks_our_objects() -> None:
    kube = FakeKube()
    resources(kube).apply([POD])
    assert kube.objects[PATH]["metadata"]["managedFields"] == [{"manager": FIELD_MANAGER}]


# --- the local run ---------------------------------------------------------------------------------------------------


HELLO = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 16) "Hello\\n")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 16)) (i32.store (i32.const 4) (i32.const 6))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
    %s))"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    import os

    return {**os.environ, "WASILET_CACHE": str(tmp_path / "cache")}


def hello(tmp_path: Path, then: str) -> Path:
    import wasmtime

    path = tmp_path / "hello.wasm"
    path.write_bytes(wasmtime.wat2wasm(HELLO % then))
    return path


def quiet(_: str) -> None:
    """Says nothing."""


def test_a_program_that_never_ends_passes_once_its_line_is_there(tmp_path: Path, environ: dict[str, str]) -> None:
    module = hello(tmp_path, "(loop $l (br $l))")
    seen = runs.check(module, LocalSpec(log=(Line(contains="Hello"),)), say=quiet, environ=environ)
    assert seen == "1 lines: Hello"


def test_a_wrong_code_and_a_missing_line_are_told_with_the_output(tmp_path: Path, environ: dict[str, str]) -> None:
    module = hello(tmp_path, "(call $exit (i32.const 7))")
    passed = LocalSpec(log=(Line(contains="Hello"),), exit_code=7)
    assert runs.check(module, passed, say=quiet, environ=environ) == "exit code 7, 1 lines"
    with pytest.raises(HarnessError, match="its exit code is 7, not 0") as error:
        runs.check(module, LocalSpec(exit_code=0), say=quiet, environ=environ)
    assert "| Hello" in error.value.message
    with pytest.raises(HarnessError, match="exit code 7 and without a line with 'Bye'"):
        runs.check(module, LocalSpec(log=(Line(contains="Bye"),)), say=quiet, environ=environ)


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path, environ: dict[str, str]) -> None:
    module = hello(tmp_path, "(loop $l (br $l))")
    with pytest.raises(HarnessError, match="did not end within 2 s"):
        runs.check(module, LocalSpec(exit_code=0, timeout_seconds=2.0), say=quiet, environ=environ)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dirs": ["/tmp"]}, "write --dir|is not understood"),
        ({"dirs": ["/nowhere/at/all::/x"]}, "there is no folder /nowhere/at/all"),
        ({"dirs": ["/tmp::/x::rw"]}, "is not understood"),
        ({"env": ["=x"]}, "sets no variable"),
        ({"env": ["NOT_THERE"]}, "this environment has no such variable"),
        ({"allow": ["catfact.ninja"]}, "is no origin"),
        ({"allow": ["https://catfact.ninja/fact"]}, "is no origin"),
        ({"port": 65536}, "is no port"),
    ],
)
def test_what_is_typed_wrongly_is_explained(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        runs.make_spec(Path("x.wasm"), environ={}, **given)


def test_what_is_typed_becomes_what_the_module_gets(tmp_path: Path) -> None:
    spec = runs.make_spec(
        Path("x.wasm"),
        args=["-v"],
        env=["A=1=2", "HOME"],
        dirs=[".::/work", f"{tmp_path}::/data::ro"],
        allow=["http://127.0.0.1:80/"],
        environ={"HOME": "/home/cat", "WASILET_INVOCATION_DIR": str(tmp_path)},
    )
    assert spec.env == {"A": "1=2", "HOME": "/home/cat"}
    assert spec.dirs == ((str(tmp_path), "/work", False), (str(tmp_path), "/data", True))
    assert spec.allow == ("http://127.0.0.1:80",)
    assert json.dumps(spec.argv) == '["-v"]'


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.EROFS, StateError, r"cannot write .*compiled.*: the file system is read-only"),
        (errno.ENOSPC, StateError, r"cannot write .*compiled.*: the disk is full"),
        (errno.EACCES, UsageError, r"x\.wasm cannot be read: Permission denied"),
    ],
)
def test_a_cache_that_cannot_be_written_is_not_taken_for_a_bad_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[HarnessError], words: str
) -> None:
    def fails(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("wasilet_node.runtime.foreground.run_local", fails)
    spec = runs.make_spec(tmp_path / "x.wasm", environ={})
    with pytest.raises(kind, match=words):
        runs.run(spec, environ={"WASILET_CACHE": str(tmp_path)})
