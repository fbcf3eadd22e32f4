"""Tests reach into nothing: what a test must change about the object it tests is a parameter of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
FILES = sorted(path for path in (ROOT / "tests").rglob("*.py") if "files" not in path.relative_to(ROOT).parts)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def overwritten(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each private attribute that is assigned on another object than ``self``, or monkeypatched."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=targets):
                yield from ((node.lineno, name) for target in targets if (name := foreign(target)))
            case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                if name := foreign(target):
                    yield node.lineno, name
            case ast.Call(func=ast.Attribute(attr="setattr"), args=[owner, *more]):
                if name := patched(owner, more):
                    yield node.lineno, name


def foreign(target: ast.expr) -> str:
    """The private attribute of another object that is assigned; empty: none is."""
    match target:
        case ast.Attribute(value=ast.Name(id="self" | "cls")):
            return ""
        case ast.Attribute(attr=name) if is_private(name):
            return name
    return ""


def patched(owner: ast.expr, more: list[ast.expr]) -> str:
    """The private name in ``setattr(owner, "name", value)`` or ``setattr("module.name", value)``; else empty."""
    match owner, more:
        case ast.Attribute(attr=name), _ if is_private(name):
            return name
        case (ast.Constant(value=str(path)), _) | (_, [ast.Constant(value=str(path)), *_]):
            name = path.rpartition(".")[2]
            return name if is_private(name) else ""
    return ""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("thing._period = 1", ["_period"]),
        ("rig.thing._period += 1", ["_period"]),
        ("monkeypatch.setattr(module, '_PERIOD', 1)", ["_PERIOD"]),
        ("monkeypatch.setattr('a.module._PERIOD', 1)", ["_PERIOD"]),
        ("monkeypatch.setattr(module._Thing, '__init__', f)", ["_Thing"]),
        ("self._mine = 1", []),
        ("monkeypatch.setattr(module, 'PERIOD', 1)", []),
        ("monkeypatch.setattr(sys, '__stdout__', 1)", []),
        ("thing.period = other._period", []),
    ],
)
def test_what_counts(source: str, found: list[str]) -> None:
    assert [name for _, name in overwritten(ast.parse(source))] == found


def test_no_test_overwrites_a_private_attribute() -> None:
    assert len(FILES) > 200
    reached = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in FILES
        for line, name in overwritten(ast.parse(path.read_text()))
    ]
    assert reached == []
