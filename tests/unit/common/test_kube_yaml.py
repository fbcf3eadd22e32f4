"""YAML is read as kubectl reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from wasilet_common.kube_yaml import Document, YamlError, field_name, load, load_all

pytestmark = pytest.mark.unit

CASES = yaml.safe_load((Path(__file__).parent / "cases" / "kube_yaml.yaml").read_text(encoding="utf-8"))


def the_same(value: Any, other: Any) -> bool:
    """Equal, and of the same type: JSON's 1 is not true."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(the_same(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(the_same(a, b) for a, b in zip(value, other, strict=True))
    if all(isinstance(number, int | float) and not isinstance(number, bool) for number in (value, other)):
        return float(value) == float(other)
    return type(value) is type(other) and bool(value == other)


@pytest.mark.parametrize("case", CASES, ids=[case["yaml"] for case in CASES])
def test_a_text_means_what_kubectl_makes_of_it(case: dict[str, str]) -> None:
    if "error" in case:
        with pytest.raises(YamlError):
            load(case["yaml"])
    else:
        assert the_same(load(case["yaml"]), json.loads(case["json"]))


def test_a_plain_parser_would_not_do() -> None:
    """The table is worth its length: PyYAML's own answers differ in many of its rows."""

    def agrees(case: dict[str, str]) -> bool:
        try:
            return the_same(yaml.safe_load(case["yaml"]), json.loads(case["json"]))
        except (yaml.YAMLError, ValueError, TypeError):
            return False

    assert sum(not agrees(case) for case in CASES if "json" in case) > 20


def test_without_libyaml_the_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CSafeLoader")
    for case in CASES:
        # Tabs after a colon are libyaml's alone.
        if "json" in case and "\t" not in case["yaml"]:
            assert the_same(load(case["yaml"]), json.loads(case["json"])), case["yaml"]


def test_every_value_knows_its_line() -> None:
    (document,) = load_all("a: 1\nb:\n  - c: x\n    d.e/f: 2026-01-02\n  - {g: [1,\n  2]}\n")
    assert {field_name(path): mark.line for path, mark in document.marks.items() if path} == {
        "a": 1,
        "b": 2,
        "b[0]": 3,
        "b[0].c": 3,
        "b[0][d.e/f]": 4,
        "b[1]": 5,
        "b[1].g": 5,
        "b[1].g[0]": 5,
        "b[1].g[1]": 6,
    }
    assert document.marks["b", 0, "d.e/f"].text == "2026-01-02"
    assert document.line(("b", 0, "missing", "deeper")) == 3
    assert Document(1).line(("a",)) == 0


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: [1", 3, "did not find expected"),
        ("a: 1\nb: @x", 2, "cannot start any token"),
        ("a: 1\nb: {c: !!int x}", 2, r"b\.c: 'x' is no !!int"),
        ("a: 1\nb: .inf", 2, r"b: \.inf is no number in JSON"),
        ("a: 1\nb: *c", 2, "undefined alias"),
        (b"a: 1\nb: \xff", 2, "UTF-8"),
        ("a: 1\nb: \x01", 2, "control characters are not allowed"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(text: str | bytes, line: int, message: str) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        load(text)
    assert caught.value.line == line


def test_a_byte_order_mark_is_no_content() -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        assert load("a: ñ".encode(encoding)) == {"a": "ñ"}


def test_json_may_do_what_yaml_may_not() -> None:
    assert load('{\n\t"a": "\\ud83d\\ude00",\n\t"b": 1.0\n}') == {"a": "\U0001f600", "b": 1}
    assert [d.value for d in load_all('{\n\t"a": 1\n}\n{\n\t"b": 2}\n')] == [{"a": 1}, {"b": 2}]


def test_anchors_that_stand_for_a_terabyte_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(YamlError, match="anchors are used too often"):
        load("\n".join(lines))


def test_what_an_alias_stands_for_can_be_changed_by_itself() -> None:
    value = load("a: &a {b: []}\nc: *a")
    value["a"]["b"].append(1)
    assert value == {"a": {"b": [1]}, "c": {"b": []}}


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000])
def test_nesting_without_end_is_an_error_and_no_crash(text: str) -> None:
    with pytest.raises(YamlError):
        load(text)
