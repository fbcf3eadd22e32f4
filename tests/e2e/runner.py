"""Runs one case on a cluster: applies, waits, judges; each in a namespace of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wasilet.errors import ApiError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.resources import Resources

from tests.e2e.casefiles import Case, filled, whole_object
from tests.e2e.guests import Guests
from tests.e2e.matching import mismatches
from tests.e2e.stage import POLL_SECONDS, Stage

KEEP_SECONDS = 2.0
LOG_TIMEOUT_SECONDS = 120.0
_PATCHES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
}


def run_case(case: Case, stage: Stage, values: Mapping[str, str]) -> float:
    """Raises AssertionError with what was missing and what was there instead. Returns the seconds it took."""
    began = time.monotonic()
    with stage.namespace(f"case-{case.id}", pod_security=case.level) as namespace:
        scratch = Path(values["scratch"]) / namespace
        scratch.mkdir()
        with stage.kube() as kube:
            own = {**case.values(values), "namespace": namespace, "scratch": str(scratch)}
            _Run(case, stage, kube, namespace, own).run()
    return time.monotonic() - began


class _Run:
    def __init__(self, case: Case, stage: Stage, kube: Kube, namespace: str, values: Mapping[str, str]) -> None:
        self.case = case
        self.stage = stage
        self.namespace = namespace
        self.values = values
        self.kube = kube
        self.resources = Resources(kube, namespace)

    def run(self) -> None:
        for number, step in enumerate(self.case.steps, 1):
            try:
                self._step(step)
            except AssertionError as error:
                raise AssertionError(f"step {number}: {error}\n{self._scene()}") from None

    def _step(self, step: Mapping[str, Any]) -> None:
        within = float(step.get("within") or self.case.within)
        if "apply" in step:
            for obj in step["apply"]:
                self.stage.create(self.kube, self.namespace, whole_object(obj, self.values))
        elif "see" in step:
            expected = filled(step["see"], self.values)
            poll = POLL_SECONDS if expected.keys() & {"log", "logs", "objects"} else 5.0
            self.stage.wait(lambda: list(self._missing(expected)), within=within, poll=poll)
        elif "keep" in step:
            self._keep(filled(step["keep"], self.values), float(step.get("for") or KEEP_SECONDS))
        elif "patch" in step:
            patch = filled(step["patch"], self.values)
            path = self._path(patch)
            if patch.get("subresource"):
                path += f"/{patch['subresource']}"
            self.kube.patch(path, patch["body"], content_type=_PATCHES[patch.get("type", "merge")])
        elif "delete" in step:
            self._delete(filled(step["delete"], self.values))
        elif "refused" in step:
            self._refused(step["refused"])

    def _path(self, given: Mapping[str, Any]) -> str:
        version, kind = given.get("apiVersion", "v1"), given.get("kind", "Pod")
        obj = {"apiVersion": version, "kind": kind, "metadata": {"name": given.get("name", "pod")}}
        return self.resources.path(obj)

    def _delete(self, given: Mapping[str, Any]) -> None:
        body: KubeObject = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if "grace" in given:
            body["gracePeriodSeconds"] = given["grace"]
        self.kube.request("DELETE", self._path(given), body=body)

    def _refused(self, given: Mapping[str, Any]) -> None:
        obj = whole_object(given["object"], self.values)
        try:
            self.stage.create(self.kube, self.namespace, obj)
        except ApiError as error:
            wrong = mismatches(given["message"], str(error), "the refusal")
            assert not wrong, "; ".join(wrong)
        else:
            raise AssertionError("it was accepted")

    def _keep(self, expected: Mapping[str, Any], seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            missing = list(self._missing(expected))
            assert not missing, "it did not stay so: " + "; ".join(missing)
            if time.monotonic() >= until:
                return
            time.sleep(POLL_SECONDS)

    # --- what is seen ----------------------------------------------------------------------------------------------

    def _missing(self, expected: Mapping[str, Any]) -> Iterator[str]:
        pods = dict(expected.get("pods") or {})
        if "pod" in expected:
            pods["pod"] = expected["pod"]
        for name, status in pods.items():
            pod = self.stage.pod(self.namespace, name)
            if pod is None:
                yield f"there is no pod {name}"
            else:
                yield from mismatches(status, pod.get("status") or {}, name)
        for name in expected.get("gone") or ():
            if self.stage.pod(self.namespace, name) is not None:
                yield f"pod {name} is still there"
        yield from self._missing_events(expected)
        for entry in expected.get("objects") or ():
            found = self.kube.find(self._path(entry))
            if found is None:
                yield f"there is no {entry['kind']} {entry['name']}"
            else:
                yield from mismatches(entry["like"], found, f"{entry['kind']} {entry['name']}")
        if "log" in expected:
            yield from self._missing_log({"lines": expected["log"]})
        for entry in expected.get("logs") or ():
            yield from self._missing_log(entry)

    def _missing_events(self, expected: Mapping[str, Any]) -> Iterator[str]:
        events = self.stage.events(self.namespace)
        for entry in expected.get("events") or ():
            if not any(_is_event(entry, event) for event in events):
                there = ", ".join(sorted({str(e.get("reason")) for e in events})) or "none"
                yield f"no event like {entry} (there are: {there})"
        for entry in expected.get("no_events") or ():
            for event in events:
                if _is_event(entry, event):
                    yield f"an event {event['reason']}: {event['message']}"

    def _missing_log(self, entry: Mapping[str, Any]) -> Iterator[str]:
        query = {"container": "main", **{k: str(v) for k, v in (entry.get("query") or {}).items()}}
        if "container" in entry:
            query["container"] = str(entry["container"])
        path = api_path("pods", str(entry.get("pod", "pod")), namespace=self.namespace, sub="log")
        try:
            # Undecodable bytes come as U+FFFD from the small client; sizes are those of the text.
            text = read_log(self.stage, path, query)
        except ApiError as error:
            if "error" in entry:
                yield from mismatches(entry["error"], str(error), "the log's error")
            else:
                yield f"no log: {error}"
            return
        if "error" in entry:
            yield "the log was given"
        yield from _log_mismatches(entry, text)

    def _scene(self) -> str:
        """What is there, for readers of a failure."""
        pods = self.stage.pods(self.namespace)
        lines = [f"  pod {pod['metadata']['name']}: {pod.get('status')}" for pod in pods]
        for event in self.stage.events(self.namespace):
            about = event["involvedObject"].get("name")
            lines.append(f"  event {about} {event.get('type')} {event.get('reason')}: {event.get('message')}")
        for pod in pods[:3]:
            path = api_path("pods", pod["metadata"]["name"], namespace=self.namespace, sub="log")
            for container in pod["spec"]["containers"][:2]:
                try:
                    text = read_log(self.stage, path, {"container": container["name"], "tailLines": "20"})
                except ApiError as error:
                    text = str(error).encode()
                lines.append(f"  log of {container['name']}: {text[-1500:]!r}")
        return "\n".join(lines)


def _is_event(expected: Mapping[str, Any], event: KubeObject) -> bool:
    wanted = {key: value for key, value in expected.items() if key != "of"}
    about = event["involvedObject"].get("name") == expected.get("of", "pod")
    return about and not mismatches(wanted, event)


def _log_mismatches(entry: Mapping[str, Any], text: bytes) -> Iterator[str]:
    lines = text.decode(errors="replace").splitlines()
    for line in entry.get("lines") or ():
        wanted = str(line)
        if wanted.startswith("~"):
            found = any(not mismatches(wanted, each) for each in lines)
        else:
            found = any(wanted in each for each in lines)
        if not found:
            yield f"the log has no line {wanted!r}"
    for line in entry.get("without") or ():
        if any(str(line) in each for each in lines):
            yield f"the log has a line {line!r}"
    if "equal" in entry and lines != [str(line) for line in entry["equal"]]:
        yield f"the log is {lines[:20]}, not {entry['equal']}"
    if "size" in entry:
        yield from mismatches(entry["size"], len(text), "the log's size")


def read_log(stage: Stage, path: str, query: Mapping[str, str]) -> bytes:
    """A container's log as bytes. Raises ApiError with kubelet's message."""
    with stage.kube() as kube:
        return kube.body(path, timeout_seconds=LOG_TIMEOUT_SECONDS, **query)


def case_values(guests: Guests, node: KubeObject, scratch: Path) -> dict[str, str]:
    """What ``${...}`` means in cases."""
    addresses: Sequence[KubeObject] = node["status"]["addresses"]
    return {
        "registry": guests.registry,
        "registry_port": guests.registry.rpartition(":")[2],
        "scratch": str(scratch),
        "dockerconfig": guests.dockerconfig,
        "node": node["metadata"]["name"],
        "node_ip": next(a["address"] for a in addresses if a["type"] == "InternalIP"),
        **{f"image:{name}": reference for name, reference in guests.references.items()},
        **{f"digest:{name}": digest for name, digest in guests.digests.items()},
    }
