"""Objects for the API server from what a test writes down: a few words, a manifest, a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wasilet.errors import UsageError
from wasilet.kube.client import KubeObject


def pod_object(
    image: str,
    *,
    name: str,
    command: Sequence[str] | None = None,
    args: Sequence[str] | None = None,
    env: Mapping[str, object] | None = None,
    restart_policy: str = "Never",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    container: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any] | None = None,
) -> KubeObject:
    """A pod with one container. ``container`` and ``spec`` hold what else is to be in these two."""
    made: KubeObject = {"name": name, "image": image}
    if command is not None:
        made["command"] = list(command)
    if args is not None:
        made["args"] = list(args)
    if env:
        made["env"] = [{"name": key, "value": str(value)} for key, value in env.items()]
    metadata: KubeObject = {"name": name}
    if labels:
        metadata["labels"] = dict(labels)
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"restartPolicy": restart_policy, "containers": [{**made, **(container or {})}], **(spec or {})},
    }


def read_objects(source: Any, variables: Mapping[str, Any], folders: Sequence[Path]) -> list[KubeObject]:
    """What ``apply`` is given: an object, a list of them, YAML, or a file (``.j2``: a template). Raises UsageError."""
    import copy

    from wasilet.apps.render import render_file
    from wasilet.kube.manifest_file import parse_objects

    if isinstance(source, Mapping):
        return [copy.deepcopy(dict(source))]
    if isinstance(source, list | tuple):
        return [obj for part in source for obj in read_objects(part, variables, folders)]
    if isinstance(source, str) and "\n" in source:
        return parse_objects(source, Path("the YAML text"))
    given = Path(source).expanduser()
    found = next((folder / given for folder in folders if (folder / given).is_file()), None)
    if found is None:
        raise UsageError(f"there is no file {given}", hint=f"looked in {', '.join(map(str, folders))}")
    if found.suffix == ".j2":
        return parse_objects(render_file(found.parent, found.name, variables), found)
    try:
        return parse_objects(found.read_bytes(), found)
    except OSError as error:
        raise UsageError(f"{found} cannot be read: {error.strerror}") from error
