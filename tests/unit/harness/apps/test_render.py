"""Templates become objects, and what is wrong with one is said with its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from wasilet.apps.render import add_pull_secret, parse_objects, place, pod_spec, render, render_text
from wasilet.apps.samples import App, Demo, find_app, sample_names
from wasilet.errors import UsageError

pytestmark = pytest.mark.unit

VARIABLES = {
    "image": "localhost:5000/x:latest@sha256:" + "0" * 64,
    "namespace": "default",
    "cat_facts_url": "http://127.0.0.1:1/fact",
    "cat_facts_origin": "http://127.0.0.1:1",
    "cat_facts_is_local": True,
}


def app_with(folder: Path, text: str) -> App:
    (folder / "pod.yaml.j2").write_text(text)
    return App(name="x", folder=folder, demo=Demo())


@pytest.mark.parametrize("name", sample_names())
def test_every_samples_manifests_render_with_and_without_values(name: str) -> None:
    app = find_app(name)
    objects = render(app, VARIABLES)
    assert objects
    kinds = [(obj["kind"], obj["metadata"]["name"]) for obj in objects]
    assert [(obj["kind"], obj["metadata"]["name"]) for obj in render(app, {}, lenient=True)] == kinds
    named = {name for _, name in kinds}
    for expectation in app.demo.expect:
        assert expectation.object_name.partition("/")[2] in named
        asserts = expectation.log or expectation.http or expectation.phase or expectation.exit_code is not None
        assert asserts, "a demo that asserts nothing"


def test_the_manifest_of_2020_is_the_printed_one_with_its_keys_put_back() -> None:
    assert render(find_app("hello-world"), VARIABLES) == [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "wasi-hello-world"},
            "spec": {
                "containers": [
                    {"name": "wasi-hello-world", "image": VARIABLES["image"], "imagePullPolicy": "IfNotPresent"}
                ],
                "tolerations": [
                    {"key": "krustlet/arch", "operator": "Equal", "value": "wasm32-wasi", "effect": "NoExecute"}
                ],
            },
        }
    ]


def test_the_cat_facts_pod_carries_what_the_tutorial_prints() -> None:
    (pod,) = render(
        find_app("cat-facts"), {**VARIABLES, "cat_facts_is_local": False, "cat_facts_origin": "https://a.b"}
    )
    assert pod["metadata"]["annotations"] == {
        "alpha.wasi.krustlet.dev/allowed-domains": '["https://a.b"]',
        "alpha.wasi.krustlet.dev/max-concurrent-requests": "42",
    }
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert [entry["name"] for entry in pod["spec"]["containers"][0]["env"]] == ["RUST_LOG", "RUST_BACKTRACE"]
    assert "imagePullSecrets" not in pod["spec"]


def test_a_pull_secret_is_added_to_those_that_a_manifest_names() -> None:
    named, plain, config = pod(imagePullSecrets=[{"name": "own"}]), pod(), {"kind": "ConfigMap", "data": {}}
    for _ in range(2):
        add_pull_secret([named, plain, config], "login")
    assert named["spec"]["imagePullSecrets"] == [{"name": "own"}, {"name": "login"}]
    assert plain["spec"]["imagePullSecrets"] == [{"name": "login"}]
    assert config == {"kind": "ConfigMap", "data": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: {{ nobody_set_this }}", r"pod\.yaml\.j2: 'nobody_set_this' is undefined"),
        ("kind: Pod\n{% if %}", r"pod\.yaml\.j2, line 2: "),
        ("kind: [", "not YAML"),
        ("kind: Pod\nmetadata: {name: x}", "without apiVersion"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {}", "without apiVersion"),
        ("- a\n- b", "without apiVersion"),
    ],
)
def test_what_is_wrong_with_a_template_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        render(app_with(tmp_path, text), {})


def test_a_template_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no template pod\.yaml\.j2"):
        render(App(name="x", folder=tmp_path, demo=Demo()), {})


def test_empty_documents_are_skipped() -> None:
    text = "---\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\n"
    assert [obj["metadata"]["name"] for obj in parse_objects(text, Path("x"))] == ["a"]


def test_values_of_a_demo_may_be_templates() -> None:
    assert render_text("{{ a }}/fact", {"a": "http://x"}) == "http://x/fact"
    assert render_text("plain { text }", {}) == "plain { text }"
    with pytest.raises(UsageError, match="'b' is undefined"):
        render_text("{{ b }}", {})


def pod(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}


def test_where_other_nodes_are_pods_are_kept_on_wasm_nodes() -> None:
    obj = pod(containers=[])
    place([obj])
    assert obj["spec"]["nodeSelector"] == {"kubernetes.io/arch": "wasm32-wasi"}
    assert {entry["effect"] for entry in obj["spec"]["tolerations"]} == {"NoSchedule", "NoExecute"}


def test_what_a_manifest_says_itself_stays() -> None:
    toleration = {"key": "kubernetes.io/arch", "operator": "Equal", "value": "wasm32-wasi", "effect": "NoSchedule"}
    obj = pod(nodeSelector={"kubernetes.io/arch": "amd64"}, tolerations=[toleration])
    place([obj])
    assert obj["spec"]["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    assert len(obj["spec"]["tolerations"]) == 2
    everything = pod(tolerations=[{"operator": "Exists"}])
    place([everything])
    assert everything["spec"]["tolerations"] == [{"operator": "Exists"}]


@pytest.mark.parametrize("kind", ["Job", "Deployment", "StatefulSet", "DaemonSet"])
def test_pods_inside_other_objects_are_placed_too(kind: str) -> None:
    obj = {"kind": kind, "spec": {"template": {"spec": {"containers": []}}}}
    place([obj])
    spec = pod_spec(obj)
    assert spec is not None
    assert spec["nodeSelector"]


def test_objects_without_pods_are_left_alone() -> None:
    obj = {"kind": "ConfigMap", "data": {"a": "b"}}
    place([obj])
    assert obj == {"kind": "ConfigMap", "data": {"a": "b"}}
