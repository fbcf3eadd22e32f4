"""Small parts of the plugin: annotations, what ``apply`` reads, pods from a few words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from wasilet.errors import UsageError
from wasilet.testing.annotations import annotation
from wasilet.testing.artifacts import folder_of
from wasilet.testing.objects import pod_object, read_objects
from wasilet.testing.observe import seconds_of

pytestmark = pytest.mark.unit


def test_an_annotation_names_file_and_line_and_escapes_what_would_end_it(tmp_path: Path) -> None:
    report = SimpleNamespace(
        location=("tests/test_a.py", 3, "test_a"),
        nodeid="tests/test_a.py::test_a[x,y]",
        longrepr=SimpleNamespace(
            reprcrash=SimpleNamespace(path=str(tmp_path / "tests/test_a.py"), lineno=9, message="100%\n::error::no")
        ),
        user_properties=[("wasilet.artifacts", "/a")],
    )
    line = annotation(report, root=tmp_path, environ={"GITHUB_WORKSPACE": str(tmp_path)})
    assert "\n" not in line
    assert line.startswith("::error file=tests/test_a.py,line=9,title=tests/test_a.py%3A%3Atest_a[x%2Cy]::100%25%0A")
    assert line.endswith("artifacts: /a")


def test_a_long_failure_still_says_where_its_artifacts_are(tmp_path: Path) -> None:
    report = SimpleNamespace(
        location=("test_a.py", 3, "test_a"),
        nodeid="n",
        longrepr="x" * 100_000,
        user_properties=[("wasilet.artifacts", "/a")],
    )
    line = annotation(report, root=tmp_path, environ={})
    assert line.endswith("xxx%0A%0Aartifacts: /a")
    assert len(line) < 5000


def test_apply_reads_objects_lists_yaml_files_and_templates(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n")
    (tmp_path / "b.yaml.j2").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: {{ name }}}\n")
    inline = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: d}\n"
    objects = read_objects(["a.yaml", Path("b.yaml.j2"), inline, text], {"name": "b"}, [tmp_path])
    assert [obj["metadata"]["name"] for obj in objects] == ["a", "b", "c", "d"]
    objects[2]["metadata"]["name"] = "changed"
    assert inline["metadata"]["name"] == "c"  # type: ignore[index]


def test_apply_names_the_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file pod\.yaml"):
        read_objects("pod.yaml", {}, [tmp_path])


def test_a_pod_of_few_words_takes_further_fields() -> None:
    pod = pod_object(
        "r/x:1", name="x", env={"N": 1}, container={"stdin": True}, spec={"activeDeadlineSeconds": 5}, labels={"a": "b"}
    )
    container = pod["spec"]["containers"][0]
    assert container["env"] == [{"name": "N", "value": "1"}]
    assert container["stdin"] is True
    assert pod["spec"]["activeDeadlineSeconds"] == 5
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["metadata"]["labels"] == {"a": "b"}


def test_no_two_tests_share_a_folder_of_artifacts(tmp_path: Path) -> None:
    tests = [f"test_a.py::test_x{parameters}" for parameters in ("", "[1]", "[-1]", "[a/b]", "[a b]", "[a-b]", "[ü]")]
    assert len({folder_of(tmp_path, test) for test in tests}) == len(tests)
    assert folder_of(tmp_path, "tests/test_a.py::test_x[1]").name == "tests-test_a.py-test_x-1"


@pytest.mark.parametrize("test", ["a.py::test[../../../etc]", "..", "a/b.py::C::t[" + "x" * 500 + "]"])
def test_the_folder_of_artifacts_stays_below_its_root(tmp_path: Path, test: str) -> None:
    folder = folder_of(tmp_path, test)
    assert folder.parent == tmp_path
    assert len(folder.name) <= 120


@pytest.mark.parametrize(
    ("stamp", "seconds"),
    [
        ("1970-01-01T00:00:01Z", 1.0),
        ("1970-01-01T00:00:01.5Z", 1.5),
        ("1970-01-01T01:00:01.123456789+01:00", 1.123456789),
        ("yesterday", 0.0),
        ("1970-01-01T00:00:0xZ", 0.0),
        ("1970-01-01T00:00:01.5xZ", 0.0),
        (None, 0.0),
    ],
)
def test_time_stamps_are_read_or_passed_over(stamp: object, seconds: float) -> None:
    assert seconds_of(stamp) == pytest.approx(seconds)
