"""What a failed test leaves to be read: pods, logs, events, nodes and the agents' logs of its namespace, in a folder.

Gathered before the namespace goes. Nothing here may fail the test once more: what cannot be had is noted in the folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wasilet_common.file_names import MAX_BYTES, shortened

from wasilet.errors import HarnessError
from wasilet.kube.client import KubeObject, api_path
from wasilet.testing.test_namespace import TestNamespace

MAX_NAME_CHARACTERS = 100
MAX_LOG_BYTES = 2_000_000
MAX_AGENT_LOG_BYTES = 500_000
REQUEST_SECONDS = 5.0
_GITIGNORE = "# made by Wasilet's pytest plugin\n*\n"


def folder_of(root: Path, test: str) -> Path:
    """The folder of a test, by its node id: below ``root`` whatever that says, and of no other test."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", test).strip("-.")
    parameters = test.partition("[")[2].removesuffix("]")
    # [a/b] and [a b] read alike.
    ambiguous = re.search(r"[^A-Za-z0-9._-]", parameters) is not None
    if not name or len(name) > MAX_NAME_CHARACTERS or ambiguous:
        name = f"{name[:MAX_NAME_CHARACTERS]}-{hashlib.sha256(test.encode()).hexdigest()[:8]}"
    return root / name


def gather(test_namespace: TestNamespace, root: Path, test: str, report: str) -> Path:
    """Write everything to ``root/<test>``, replacing what was there. Raises OSError only when the folder cannot be
    written."""
    folder = folder_of(root, test)
    shutil.rmtree(folder, ignore_errors=True)
    for sub in ("pods", "logs", "nodes"):
        (folder / sub).mkdir(parents=True)
    ignore = root / ".gitignore"
    if not ignore.exists():
        ignore.write_text(_GITIGNORE)
    problems: list[str] = []
    (folder / "report.txt").write_text(report)
    for name, lines in (("events.txt", _events(test_namespace)), ("cluster.txt", _cluster(test_namespace))):
        (folder / name).write_text("".join(f"{line}\n" for line in _tried(lines, problems)))
    for pod in _tried(_items(test_namespace, "pods"), problems):
        _write_yaml(folder / "pods" / _file_name(str(pod["metadata"]["name"]), ".yaml"), "Pod", pod)
        _logs(test_namespace, pod, folder / "logs", problems)
    for node in _tried(_wasm_nodes(test_namespace), problems):
        _write_yaml(folder / "nodes" / _file_name(str(node["metadata"]["name"]), ".yaml"), "Node", node)
    for name, log in test_namespace.cluster.node_logs.items():
        _tail(log, folder / "nodes" / _file_name(name, ".log"), problems)
    if problems:
        (folder / "problems.txt").write_text("".join(f"{line}\n" for line in problems))
    return folder


def _file_name(stem: str, suffix: str) -> str:
    """Names of pods alone may be as long as those of files."""
    return shortened(stem, MAX_BYTES - len(suffix)) + suffix


def _tried(items: Iterator[Any], problems: list[str]) -> Iterator[Any]:
    try:
        yield from items
    except (HarnessError, KeyError, TypeError, ValueError) as error:
        problems.append(str(error))


def _items(test_namespace: TestNamespace, plural: str) -> Iterator[KubeObject]:
    kube = test_namespace.cluster.kube
    yield from (
        kube.get(api_path(plural, namespace=test_namespace.namespace), timeout_seconds=REQUEST_SECONDS).get("items")
        or []
    )


def _wasm_nodes(test_namespace: TestNamespace) -> Iterator[KubeObject]:
    from wasilet.apps.render import ARCHITECTURE_LABEL, WASM_ARCHITECTURE

    answer = test_namespace.cluster.kube.get(
        api_path("nodes"), timeout_seconds=REQUEST_SECONDS, labelSelector=f"{ARCHITECTURE_LABEL}={WASM_ARCHITECTURE}"
    )
    yield from answer.get("items") or []


def _events(test_namespace: TestNamespace) -> Iterator[str]:
    from wasilet.testing.pod_status import event_order

    for event in sorted(_items(test_namespace, "events"), key=event_order):
        about = event.get("involvedObject") or {}
        count = f" (x{event['count']})" if (event.get("count") or 1) > 1 else ""
        stamp = event.get("eventTime") or event.get("lastTimestamp") or ""
        yield (
            f"{stamp} {event.get('type')} {str(about.get('kind')).lower()}/{about.get('name')} "
            f"{event.get('reason')}: {event.get('message')}{count}"
        )


def _cluster(test_namespace: TestNamespace) -> Iterator[str]:
    cluster = test_namespace.cluster
    yield f"cluster    {cluster.name} ({cluster.provider})"
    yield f"namespace  {test_namespace.namespace}"
    yield f"API server {cluster.server}"
    yield f"registry   {cluster.registry or '-'}"
    version = cluster.kube.get("/version", timeout_seconds=REQUEST_SECONDS)
    yield f"version    {version.get('gitVersion')}"


def _logs(test_namespace: TestNamespace, pod: KubeObject, folder: Path, problems: list[str]) -> None:
    name = str(pod["metadata"]["name"])
    status = pod.get("status") or {}
    for entry in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        stem = f"{name}-{entry['name']}"
        chosen = [(False, _file_name(stem, ".log"))] if _ran(entry, "state") else []
        if _ran(entry, "lastState"):
            chosen.append((True, _file_name(stem, "-previous.log")))
        for previous, file in chosen:
            query = {"container": str(entry["name"]), "limitBytes": str(MAX_LOG_BYTES), "timestamps": "true"}
            if previous:
                query["previous"] = "true"
            path = api_path("pods", name, namespace=test_namespace.namespace, sub="log")
            try:
                with test_namespace.cluster.kube.stream(path, idle_seconds=REQUEST_SECONDS, **query) as lines:
                    (folder / file).write_text("".join(f"{line}\n" for line in lines))
            except HarnessError as error:
                problems.append(f"{file}: {error}")


def _ran(entry: KubeObject, key: str) -> bool:
    state = entry.get(key) or {}
    return state.get("running") is not None or state.get("terminated") is not None


def _write_yaml(file: Path, kind: str, obj: KubeObject) -> None:
    import yaml

    dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    file.write_text(
        yaml.dump({"apiVersion": "v1", "kind": kind, **obj, "metadata": metadata}, Dumper=dumper, sort_keys=False)
    )


def _tail(source: Path, target: Path, problems: list[str]) -> None:
    try:
        with source.open("rb") as file:
            size = source.stat().st_size
            file.seek(max(0, size - MAX_AGENT_LOG_BYTES))
            target.write_bytes(file.read(MAX_AGENT_LOG_BYTES))
    except OSError as error:
        problems.append(f"{source}: {error.strerror}")
