"""Manifests as people write them become objects, and a mistake is named by file, line and field."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from wasilet.errors import ApiError, UsageError
from wasilet.kube.manifest_file import manifest_errors, parse_objects

pytestmark = pytest.mark.unit

POD = """\
apiVersion: v1
kind: Pod
metadata:
  name: x
  annotations:
    built: {value}
spec:
  containers:
  - name: a
    image: b
"""


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2026-01-02", "2026-01-02"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("2026-01-02 03:04:05", "2026-01-02 03:04:05"),
        ("12:30:45", "12:30:45"),
        ("12:30", "12:30"),
        ("=", "="),
        ("!!binary aGVsbG8=", "hello"),
        ("!!str yes", "yes"),
        ("'no'", "no"),
        ("1.2.3", "1.2.3"),
        ("0x", "0x"),
        ("~", None),
    ],
)
def test_what_is_text_to_kubectl_is_text(written: str, value: str | None) -> None:
    (pod,) = parse_objects(POD.format(value=written), Path("pod.yaml"))
    assert json.loads(json.dumps(pod))["metadata"]["annotations"] == {"built": value}


@pytest.mark.parametrize("written", ["yes", "no", "on", "y", "true", "5", "1.10", "1e3", "0777", "0x1F"])
def test_a_value_that_the_server_would_refuse_for_its_type_is_named_with_what_to_type(written: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_objects(POD.format(value=written), Path("pod.yaml"))
    assert str(caught.value).startswith("pod.yaml, line 6: metadata.annotations.built takes a text, and " + written)
    assert caught.value.hint == f'write "{written}"'


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("spec: {containers: [{name: a, env: [{name: A, value: yes}]}]}", r"spec\.containers\[0\]\.env\[0\]\.value"),
        ("spec: {initContainers: [{name: a, args: [a, 5]}]}", r"spec\.initContainers\[0\]\.args\[1\]"),
        ("spec: {containers: [{name: a, image: 1.5}]}", r"spec\.containers\[0\]\.image"),
        ("spec: {nodeSelector: {a.b/c: on}}", r"spec\.nodeSelector\[a\.b/c\]"),
        ("spec: {containers: [{livenessProbe: {exec: {command: [1]}}}]}", r"livenessProbe\.exec\.command\[0\]"),
    ],
)
def test_fields_of_text_are_known_in_pods_wherever_they_are(text: str, field: str) -> None:
    with pytest.raises(UsageError, match=f"line 4: .*{field} takes a text"):
        parse_objects(f"apiVersion: v1\nkind: Pod\nmetadata: {{name: x}}\n{text}", Path("pod.yaml"))
    template = text.replace("spec: ", "spec: {template: {metadata: {labels: {}}, spec: ") + "}}"
    with pytest.raises(UsageError, match=r"line 4: spec\.template\.spec"):
        parse_objects(f"apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: x}}\n{template}", Path("pod.yaml"))


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {a: 1}", False),
        ("apiVersion: v1\nkind: Secret\nmetadata: {name: x}\nstringData: {a: no}", False),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {selector: {a: 1}}", False),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: 5}", False),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x, labels: {a: 1}}", False),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x, generation: 1}\nspec: {hostNetwork: yes}", True),
        ("apiVersion: example.com/v1\nkind: Other\nmetadata: {name: x}\ndata: {a: 1}\nspec: {env: {name: 1}}", True),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: 80}]}", True),
    ],
)
def test_only_fields_of_text_take_no_numbers(text: str, accepted: bool) -> None:  # noqa: FBT001
    if accepted:
        assert parse_objects(text, Path("x.yaml"))
    else:
        with pytest.raises(UsageError, match="takes a text"):
            parse_objects(text, Path("x.yaml"))


def test_documents_and_lists_are_taken_apart() -> None:
    text = """\
# first
apiVersion: v1
kind: List
metadata: {resourceVersion: ""}
items:
- {apiVersion: v1, kind: ConfigMap, metadata: {name: a}}
- apiVersion: v1
  kind: List
  items: [{apiVersion: v1, kind: Secret, metadata: {name: b}}]
---
---
# nothing here
---
{"apiVersion": "v1", "kind": "PodList", "items": [{"metadata": {"name": "c"}}]}
--- # and
apiVersion: v1
kind: Pod
metadata: {generateName: d-}
...
---
apiVersion: v1
kind: List
items: []
"""
    objects = parse_objects(text, Path("x.yaml"))
    assert [(o["kind"], o["metadata"].get("name") or o["metadata"]["generateName"]) for o in objects] == [
        ("ConfigMap", "a"),
        ("Secret", "b"),
        ("Pod", "c"),
        ("Pod", "d-"),
    ]
    assert parse_objects(("\ufeff" + text.replace("\n", "\r\n")).encode(), Path("x.yaml")) == objects


def test_anchors_and_merge_keys_are_followed() -> None:
    text = """\
apiVersion: v1
kind: Pod
metadata: {name: x}
spec:
  containers:
  - &one {name: a, image: i, env: &env [{name: A, value: b}]}
  - {<<: *one, name: b}
  - {name: c, env: *env}
"""
    (pod,) = parse_objects(text, Path("x.yaml"))
    one, two, three = pod["spec"]["containers"]
    assert two == one | {"name": "b"}
    assert three["env"] == one["env"]
    assert three["env"] is not one["env"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x", r"^x\.yaml, line \d is not YAML: "),
        ("a: 1\n---\nkind: Pod\nmetadata: {name: x}", r"line 1 holds something without apiVersion.*are missing"),
        ("kind: List\nitems:\n- apiVersion: v1\n  kind: Pod", r"line 3 holds .*: metadata\.name is missing"),
        ("kind: List\nitems: 7", "line 2: items must be a list"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n---\njust text", "line 5 holds something"),
    ],
)
def test_what_is_no_object_is_named_by_its_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_objects(text, Path("x.yaml"))


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ('Pod "x" is invalid: spec.containers[0].image: Required value', 10),
        ("json: cannot unmarshal bool into Go struct field ObjectMeta.metadata.annotations of type string", 5),
        ("json: cannot unmarshal number into Go struct field Container.spec.containers.name of type string", 9),
        ("failed to create typed patch object (d/x; v1, Kind=Pod): .spec.foo: field not declared in schema", 7),
        ('.spec.containers[name="a"].image: expected string, got &{1}', 10),
        ('strict decoding error: unknown field "spec.containers[0].ima"', 9),
        ("something else altogether", 1),
    ],
)
def test_what_the_server_says_of_a_field_is_found_in_the_file(message: str, line: int) -> None:
    (pod,) = parse_objects(POD.format(value="2026-01-02"), Path("pod.yaml"))
    with pytest.raises(ApiError) as caught, manifest_errors(copy.deepcopy(pod)):
        raise ApiError(message, code=422, reason="Invalid")
    assert caught.value.message == f"pod.yaml, line {line}: {message}"
    assert (caught.value.code, caught.value.reason) == (422, "Invalid")


def test_what_has_nothing_to_do_with_the_file_stays_as_it_is() -> None:
    (pod,) = parse_objects(POD.format(value="a"), Path("pod.yaml"))
    for code, obj in ((403, pod), (422, dict(pod))):
        with pytest.raises(ApiError, match=r"^no$"), manifest_errors(obj):
            raise ApiError("no", code=code)


def test_an_object_of_a_file_is_a_mapping_like_any_other() -> None:
    (pod,) = parse_objects(POD.format(value="a"), Path("pod.yaml.j2"))
    assert pickle.loads(pickle.dumps(pod)) == dict(pod) == json.loads(json.dumps(pod))  # noqa: S301
    with pytest.raises(UsageError, match=r"pod\.yaml\.j2, line 6 of what it renders to: "):
        parse_objects(POD.format(value="yes"), Path("pod.yaml.j2"))
