"""YAML as kubectl reads it: the rules of sigs.k8s.io/yaml, whose values are JSON's and nothing else.

PyYAML follows YAML 1.1 and makes Python objects: an unquoted date becomes a ``date``, ``12:30:45`` the number 45045,
``1e3`` a text. kubectl reads a date and a time as text and ``1e3`` as a number, and the API server only knows JSON. So
libyaml parses, and the scalars are resolved here. Each rule was compared with sigs.k8s.io/yaml 1.6.0, which Kubernetes
1.34 uses; ``tests/unit/cases/kube_yaml.yaml`` holds the answers that it gave.

Every value keeps its line, so that a mistake can be named by file, line and field.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_NODES = 1_000_000
"""Of one document, aliases counted as often as they are used: a kilobyte of anchors can stand for a terabyte."""

FieldPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_PLAIN = "plain"
"""The tag of a scalar without quotes and without a tag: only these are resolved by their looks."""

_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"), True),
    **dict.fromkeys(("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"([-+]?)(?:(0[xX])([0-9a-fA-F]+)|(0[bB])([01]+)|(0[oO]?)([0-7]+)|()([1-9][0-9]*|0))")
_BASES = {"0x": 16, "0b": 2, "0o": 8, "0": 8, "": 10}
_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1


class YamlError(ValueError):
    """A text that kubectl could not read. ``line`` counts from 1; 0: not known."""

    def __init__(self, message: str, *, line: int = 0) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
        self.message = message
        self.line = line


@dataclass(frozen=True)
class Mark:
    """Where a value stands."""

    line: int
    """Counts from 1."""

    text: str = ""
    """A scalar as it was written, quotes aside."""


@dataclass(frozen=True)
class Document:
    """One document of a stream."""

    value: Any
    """dict, list, str, int, float, bool or None, all the way down."""

    marks: dict[FieldPath, Mark] = field(default_factory=dict)
    """Where each value stands, by its path; a key's value counts as standing where the key does. Empty for JSON."""

    def line(self, path: FieldPath) -> int:
        """The line of a field, or of the nearest one around it that is there; 0: not known."""
        while path not in self.marks and path:
            path = path[:-1]
        return self.marks[path].line if path in self.marks else 0


def field_name(path: FieldPath) -> str:
    """A path as the API server writes it: ``spec.containers[0].name``; keys with dots in brackets."""
    words = ""
    for step in path:
        if isinstance(step, int) or "." in step or "/" in step:
            words += f"[{step}]"
        else:
            words += f".{step}" if words else step
    return words


def load(text: str | bytes) -> Any:
    """The first document's value; None when there is none. Raises YamlError."""
    return next((document.value for document in load_all(text)), None)


def load_all(text: str | bytes) -> list[Document]:
    """Every document that is not empty. Raises YamlError."""
    text = decoded(text)
    try:
        return list(_yaml_documents(text))
    except YamlError:
        # JSON may do what YAML may not: indent by tabs, and write one character as two escapes. kubectl looks first.
        if not text.lstrip().startswith("{") or (found := _json_documents(text)) is None:
            raise
        return found


def decoded(text: str | bytes) -> str:
    """Text without its byte order mark: UTF-8, or UTF-16 when the mark requires it. Raises YamlError."""
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        encoding = "utf-16" if text[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8"
        return text.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise YamlError("is not UTF-8 text", line=text[: error.start].count(b"\n") + 1) from error


def _yaml_documents(text: str) -> Iterator[Document]:
    import yaml

    try:
        for node in yaml.compose_all(text, Loader=_loader(_base_loader())):
            document = _Builder().document(node)
            if document.value is not None:
                yield document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(str(error.problem or error.context), line=mark.line + 1 if mark else 0) from error
    except yaml.YAMLError as error:
        raise YamlError(_reader_problem(error), line=_reader_line(error, text)) from error
    except RecursionError as error:
        raise YamlError("is nested too deeply") from error


def _reader_problem(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason) if reason else (str(error).splitlines() or ["cannot be read"])[0]


def _reader_line(error: Exception, text: str) -> int:
    position = getattr(error, "position", None)
    return text.encode()[:position].count(b"\n") + 1 if isinstance(position, int) else 0


def _json_documents(text: str) -> list[Document] | None:
    decoder = json.JSONDecoder()
    found, position = [], 0
    try:
        while text[position:].strip():
            position += len(text[position:]) - len(text[position:].lstrip())
            value, position = decoder.raw_decode(text, position)
            found.append(Document(_whole(value)))
    except (ValueError, RecursionError):
        return None
    return found


def _whole(value: Any) -> Any:
    """Numbers as Go's encoder prints them: an integer for 1.0."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return _number(value) if isinstance(value, float) else value


def _base_loader() -> Any:
    """libyaml's where there is one; it is ten times as fast."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def _loader(base: Any) -> Any:
    import yaml

    class Loader(base):  # type: ignore[misc]
        """Leaves plain scalars to the builder."""

        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            if kind is yaml.ScalarNode:
                return _PLAIN if implicit[0] else _TAG + "str"
            return super().resolve(kind, value, implicit)

    return Loader


class _Builder:
    """Values from the nodes of one document."""

    def __init__(self) -> None:
        self._marks: dict[FieldPath, Mark] = {}
        self._open: set[int] = set()
        self._count = 0

    def document(self, node: Any) -> Document:
        return Document(self._value(node, (), _line(node)), self._marks)

    def _value(self, node: Any, path: FieldPath, line: int) -> Any:
        self._count += 1
        if self._count > MAX_NODES:
            raise YamlError(f"stands for more than {MAX_NODES} values: its anchors are used too often", line=line)
        kind = node.id
        if node.tag.startswith(_TAG + "python/"):
            # kubectl takes no notice of tags that it does not know; one that asks for an object is no accident.
            raise YamlError(f"{field_name(path)}: the tag {node.tag} is refused", line=line)
        self._marks[path] = Mark(line, node.value if kind == "scalar" else "")
        if kind == "scalar":
            return _field_value(node, path)
        if id(node) in self._open:
            raise YamlError(f"{field_name(path)}: an anchor contains itself", line=line)
        self._open.add(id(node))
        try:
            if kind == "sequence":
                return [self._value(item, (*path, index), _line(item)) for index, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: Any, path: FieldPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.value:
            if key.id == "scalar" and (key.tag == _TAG + "merge" or (key.tag == _PLAIN and key.value == "<<")):
                self._merge(value, result, path)
            else:
                name = _key(key, path)
                result[name] = self._value(value, (*path, name), _line(key))
        return result

    def _merge(self, node: Any, result: dict[str, Any], path: FieldPath) -> None:
        """``<<``: the first of several mappings wins; what stands above the merge in this mapping is overwritten."""
        sources = list(reversed(node.value)) if node.id == "sequence" else [node]
        for source in sources:
            if source.id != "mapping":
                raise YamlError(f"{field_name((*path, '<<'))} takes a mapping, or a list of them", line=_line(source))
            if id(source) in self._open:
                raise YamlError(f"{field_name(path)}: an anchor contains itself", line=_line(source))
            self._open.add(id(source))
            result.update(self._mapping(source, path))
            self._open.discard(id(source))


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _key(node: Any, path: FieldPath) -> str:
    if node.id != "scalar":
        raise YamlError(f"{field_name(path) or 'the document'} has a key that is a {node.id}", line=_line(node))
    value = _scalar(node)
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or (isinstance(value, int) and value >= 2**63):
        shown = "null" if value is None else str(value)
        raise YamlError(f"{field_name(path) or 'the document'} has a key that is {shown}", line=_line(node))
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else '+'}.inf"
    return str(_number(value) if isinstance(value, float) else value)


def _scalar(node: Any) -> Any:
    tag, text = node.tag, node.value
    if tag == _PLAIN:
        return _resolved(text)
    name = tag.removeprefix(_TAG) if tag.startswith(_TAG) else ""
    if name == "binary":
        return _binary(text, _line(node))
    if name not in {"bool", "int", "float", "null"}:
        return text
    value = _resolved(text)
    if name == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if _kind(value) != name:
        raise YamlError(f"{text!r} is no !!{name}", line=_line(node))
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _binary(text: str, line: int) -> str:
    """The bytes as text, since JSON has no bytes; what is not UTF-8 is replaced, as Go's encoder does."""
    try:
        return base64.b64decode("".join(text.split()), validate=True).decode(errors="replace")
    except binascii.Error as error:
        raise YamlError("!!binary takes base64", line=line) from error


def _resolved(text: str) -> Any:
    """What a scalar without quotes is."""
    if text in _WORDS:
        return _WORDS[text]
    if not text[:1].isascii() or text[:1] not in "+-.0123456789":
        return text
    plain = text.replace("_", "")
    if found := _INTEGER.fullmatch(plain):
        sign, *groups = found.groups()
        prefix, digits = next((p, d) for p, d in zip(groups[::2], groups[1::2], strict=True) if d is not None)
        value = int(digits, _BASES[prefix.lower()]) * (-1 if sign == "-" else 1)
        if _INT64_MIN <= value <= (2**63 - 1 if sign else _UINT64_MAX):
            return value
    if _FLOAT.fullmatch(plain):
        number = float(plain)
        return number if math.isfinite(number) else text
    return text


def _field_value(node: Any, path: FieldPath) -> Any:
    try:
        value = _scalar(node)
    except YamlError as error:
        raise YamlError(f"{field_name(path)}: {error.message}", line=error.line) from error
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        raise YamlError(f"{field_name(path)}: {node.value} is no number in JSON", line=_line(node))
    return _number(value)


def _number(value: float) -> int | float:
    """As Go's encoder prints it, without ``.0``: the API server refuses ``1.0`` where it wants 1."""
    return int(value) if value.is_integer() and abs(value) < 1e21 else value
