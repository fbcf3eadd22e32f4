"""Kubernetes objects from a manifest: YAML or JSON, one document or several, lists taken apart, as kubectl takes them.

A mistake is named by file, line and field, also one that only the API server finds: an object that came from a file
remembers where its fields stand (:class:`Manifest`), and :func:`manifest_errors` looks the field of a refusal up there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wasilet_common.kube_yaml import Document, FieldPath, YamlError, field_name, load_all

from wasilet.errors import ApiError, UsageError
from wasilet.kube.client import KubeObject

_CONTAINER_LISTS = frozenset({"containers", "initContainers", "ephemeralContainers"})
_CONTAINER_TEXTS = frozenset({"name", "image", "workingDir", "imagePullPolicy", "command", "args"})
_TEXT_MAPS = frozenset({"matchLabels", "nodeSelector"})
_NAMES = frozenset({"name", "generateName", "namespace"})
_DATA = {"ConfigMap": ("data", "binaryData"), "Secret": ("data", "stringData")}

_FIELD = re.compile(r"\.?[A-Za-z_][\w-]*(?:\[[^\]]*\]|\.[A-Za-z_][\w-]*)+")
_STEP = re.compile(r"\[(\d+)\]|\[\w+=\"?([^\"\]]*)\"?\]|\[([^\]]*)\]|\.?([\w-]+)")
_GO_TYPE = re.compile(r"cannot unmarshal (\w+)")
_GO_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "bool": bool,
    "number": (int, float),
    "array": list,
    "object": dict,
}


class Manifest(dict[str, Any]):
    """An object of a file. Equal to a plain dict with the same content."""

    def __init__(self, value: Mapping[str, Any], source: str, document: Document, path: FieldPath = ()) -> None:
        super().__init__(value)
        self.source = source
        """The file, as messages name it."""

        self._document = document
        self._path = path

    def __reduce__(self) -> Any:
        """dict's own would lose where it came from."""
        return (Manifest, (dict(self), self.source, self._document, self._path))

    def place(self, path: FieldPath = ()) -> str:
        """``pod.yaml, line 7``."""
        return _place(self.source, self._document.line((*self._path, *path)))

    def text(self, path: FieldPath) -> str:
        """A scalar as it was written."""
        mark = self._document.marks.get((*self._path, *path))
        return mark.text if mark else ""


def parse_objects(text: str | bytes, source: Path) -> list[KubeObject]:
    """The objects of a manifest. Raises UsageError that names ``source``, the line and the field."""
    try:
        documents = load_all(text)
    except YamlError as error:
        raise UsageError(f"{_place(str(source), error.line)} is not YAML: {error.message}") from error
    objects: list[KubeObject] = []
    for document in documents:
        for obj in _taken_apart(document.value, (), str(source), document):
            _check(obj)
            objects.append(obj)
    return objects


@contextlib.contextmanager
def manifest_errors(obj: KubeObject) -> Iterator[None]:
    """Add file and line to what the API server states about an object that came from a file."""
    try:
        yield
    except ApiError as error:
        if not isinstance(obj, Manifest) or error.code not in {400, 422, 500}:
            raise
        message = f"{obj.place(_named_field(obj, error.message))}: {error.message}"
        raise ApiError(message, code=error.code, reason=error.reason, hint=error.hint) from error


def _place(source: str, line: int) -> str:
    words = f"{source}, line {line}" if line else source
    return f"{words} of what it renders to" if line and source.endswith(".j2") else words


def _taken_apart(value: Any, path: FieldPath, source: str, document: Document) -> Iterator[Manifest]:
    """The object itself, or those of a list (``List``, ``PodList``)."""
    if not isinstance(value, dict):
        raise UsageError(
            f"{_place(source, document.line(path))} holds something without apiVersion, kind and metadata.name"
        )
    kind, items = value.get("kind"), value.get("items")
    if kind != "List" and not (isinstance(kind, str) and kind.endswith("List") and "items" in value):
        yield Manifest(value, source, document, path)
        return
    if not isinstance(items, list | None):
        raise UsageError(f"{_place(source, document.line((*path, 'items')))}: items must be a list")
    for index, item in enumerate(items or []):
        if isinstance(item, dict) and kind != "List":
            # The items of a PodList need not say that they are Pods.
            item.setdefault("kind", kind.removesuffix("List"))
            item.setdefault("apiVersion", value.get("apiVersion"))
        yield from _taken_apart(item, (*path, "items", index), source, document)


def _check(obj: Manifest) -> None:
    for path, value in _leaves(obj, ()):
        if not isinstance(value, str) and value is not None and _takes_text(obj, path):
            written = obj.text(path) or str(value)
            what = "true or false" if isinstance(value, bool) else "a number"
            raise UsageError(
                f"{obj.place(path)}: {field_name(path)} takes a text, and {written} is {what} in YAML",
                hint=f'write "{written}"',
            )
    metadata = obj.get("metadata")
    names = metadata if isinstance(metadata, dict) else {}
    missing = [key for key in ("apiVersion", "kind") if not obj.get(key)]
    if not names.get("name") and not names.get("generateName"):
        missing.append("metadata.name")
    if missing:
        raise UsageError(
            f"{obj.place()} holds something without apiVersion, kind and metadata.name: "
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
        )


def _leaves(value: Any, path: FieldPath) -> Iterator[tuple[FieldPath, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _takes_text(obj: KubeObject, path: FieldPath) -> bool:
    """Whether Kubernetes' own kinds hold a text there: the places where people forget the quotes."""
    names = [step for step in path if isinstance(step, str)]
    if names in (["apiVersion"], ["kind"]):
        return True
    above = names[-2] if len(names) > 1 else ""
    if "metadata" in names[-3:-1] and (
        above in {"labels", "annotations"} or (above == "metadata" and names[-1] in _NAMES)
    ):
        return True
    if "." in str(obj.get("apiVersion")).partition("/")[0]:
        return False  # a kind of others may hold anything
    if len(names) == 2 and above in _DATA.get(str(obj.get("kind")), ()):
        return True
    if above in _TEXT_MAPS or (obj.get("kind") == "Service" and names[:-1] == ["spec", "selector"]):
        return True
    if names[-2:] == ["exec", "command"]:
        return True
    if above in _CONTAINER_LISTS:
        return names[-1] in _CONTAINER_TEXTS
    return above == "env" and names[-1] in {"name", "value"} and not _CONTAINER_LISTS.isdisjoint(names)


# --- the field of a refusal ------------------------------------------------------------------------------------------


def _named_field(obj: Manifest, message: str) -> FieldPath:
    """The field that a message of the API server is about; empty when it names none."""
    found = _GO_TYPE.search(message)
    kind = _GO_TYPES.get(found[1]) if found else None
    best: FieldPath = ()
    for words in _FIELD.findall(message):
        steps = [next(group for group in step.groups() if group is not None) for step in _STEP.finditer(words)]
        # "Go struct field ObjectMeta.metadata.labels": the first word is a type.
        for tail in (steps, steps[1:]):
            if tail and tail[0] in obj:
                best = max(best, _followed(obj, tail, kind), key=len)
    return best


def _followed(value: Any, steps: list[str], kind: type | tuple[type, ...] | None) -> FieldPath:
    """As far as ``steps`` lead; where they pass a list without an index, by the entry that fits best."""
    if not steps:
        return ()
    step, rest = steps[0], steps[1:]
    if isinstance(value, dict):
        return (step, *_followed(value[step], rest, kind)) if step in value else ()
    if not isinstance(value, list):
        return ()
    if step.isdigit():
        index = int(step)
        return (index, *_followed(value[index], rest, kind)) if index < len(value) else ()
    for index, item in enumerate(value):
        if isinstance(item, dict) and item.get("name") == step:
            return (index, *_followed(item, rest, kind))
    paths = [(index, *_followed(item, steps, kind)) for index, item in enumerate(value)]
    fitting = [path for path in paths if kind is None or isinstance(_at(value, path), kind)]
    return max(fitting or paths, key=len, default=())


def _at(value: Any, path: FieldPath) -> Any:
    for step in path:
        value = value[step]
    return value
