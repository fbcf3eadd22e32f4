"""Case files: what is applied, and what must then be seen. A new case needs no code.

A file holds ``area`` (a heading) and ``cases``. A case::

    - case: what holds                    # a sentence; names the test
      kubernetes: "..."                   # the conformance test of Kubernetes that says the same, if there is one
      objects: [...]                      # applied first: manifests, namespace left out
      pod: {...}                          # a pod spec, or a whole pod; called "pod" unless it says otherwise
      within: 30                          # seconds for each wait
      level: privileged                   # the namespace's PodSecurity level, where the default would refuse the pods
      also: component                     # a second time with the toolbox as a component (``only``: no other time)
      see: {...}                          # waited for
      then: [...]                         # further steps, in order

A step is one of::

    see: {...}             # wait until all of it is so
    keep: {...}            # all of it stays so ``for: 3`` seconds
    apply: [...]           # create objects
    patch: {kind, name, body, subresource, type}       # type: merge (default), strategic or json
    delete: {kind, name, grace}
    refused: {object: {...}, message: "~..."}          # the API server or its admission refuses it

What can be seen::

    pod: {...}             # a part of the status of the pod "pod" (tests.e2e.matching)
    pods: {name: {...}}    # of others
    gone: [name]           # pods that are no more
    events: [{reason, message, type, count, of}]       # each must be there; of: the object's name, if not "pod"
    no_events: [...]       # none of these
    log: [line]            # each is part of a line of container ``main``; "~..." is a regular expression
    logs: [{pod, container, query, lines, equal, without, size, error}]
    objects: [{kind, apiVersion, name, like}]          # any object; like: a part of it

In strings, ``${registry}``, ``${namespace}``, ``${node}``, ``${node_ip}``, ``${image:NAME}``, ``${digest:NAME}``,
``${dockerconfig}`` (the login of the private registry), ``${registry_port}`` (a number where it stands alone) and
``${scratch}`` (a folder of this machine) are filled in. A container without ``name`` is called ``main``; its ``image``
is a guest's name (``tests.e2e.guests``), by default ``toolbox``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "cases"
_STEPS = frozenset({"see", "keep", "apply", "patch", "delete", "refused"})
_FIELDS = frozenset({"case", "kubernetes", "objects", "pod", "within", "see", "then", "note", "also", "only", "level"})
_REFERENCE = re.compile(
    r"\$\{(registry|registry_port|scratch|namespace|node|node_ip|dockerconfig|image:[a-z0-9-]+|digest:[a-z0-9-]+)\}"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case."""

    name: str
    area: str
    file: str
    kubernetes: str = ""
    note: str = ""
    """For the table of what is supported."""

    within: float = 90.0
    level: str = ""
    """PodSecurity's; empty: the cluster's default."""

    steps: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)
    component: bool = False
    """Whether the image ``toolbox`` is the component."""

    also_component: bool = False
    """Whether there is a second case, which is that."""

    @property
    def id(self) -> str:
        """For pytest and namespaces."""
        name = f"component {self.name}" if self.component else self.name
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

    def values(self, values: Mapping[str, str]) -> Mapping[str, str]:
        """Those that ``whole_object`` and ``filled`` take, for this case."""
        if not self.component:
            return values
        as_component = {f"{what}:toolbox": values[f"{what}:toolbox-component"] for what in ("image", "digest")}
        return {**values, **as_component}


def load(folder: Path = FOLDER) -> list[Case]:
    """All cases, in the order of files and lines. Raises ValueError for what cannot be meant."""
    found: list[Case] = []
    for file in sorted(folder.glob("*.yaml")):
        data = yaml.safe_load(file.read_text())
        for case in (_case(entry, str(data["area"]), file.stem) for entry in data["cases"]):
            found.append(case)
            if case.also_component:
                found.append(replace(case, component=True, also_component=False))
    ids = [case.id for case in found]
    if doubled := {name for name in ids if ids.count(name) > 1}:
        raise ValueError(f"two cases of one name: {', '.join(sorted(doubled))}")
    return found


def _case(entry: Mapping[str, Any], area: str, file: str) -> Case:
    where = f"{file}: {entry.get('case')}"
    if unknown := entry.keys() - _FIELDS:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}")
    if entry.keys() >= {"also", "only"} or {entry.get("also"), entry.get("only")} - {None, "component"}:
        raise ValueError(f"{where}: also or only is component, or nothing")
    steps: list[Mapping[str, Any]] = []
    objects = [*(entry.get("objects") or ()), *([_pod(entry["pod"])] if "pod" in entry else [])]
    if objects:
        steps.append({"apply": objects})
    if "see" in entry:
        steps.append({"see": entry["see"]})
    for step in entry.get("then") or ():
        if len(step.keys() & _STEPS) != 1:
            raise ValueError(f"{where}: no step: {step}")
        steps.append(step)
    if not any(step.keys() & {"see", "keep", "refused"} for step in steps):
        raise ValueError(f"{where}: nothing must be seen")
    return Case(
        name=str(entry["case"]),
        area=area,
        file=file,
        kubernetes=str(entry.get("kubernetes") or ""),
        note=str(entry.get("note") or ""),
        within=float(entry.get("within") or 90),
        level=str(entry.get("level") or ""),
        steps=tuple(steps),
        component="only" in entry,
        also_component="also" in entry,
    )


def _pod(given: Mapping[str, Any]) -> dict[str, Any]:
    if "spec" in given:
        return dict(given)
    return {"kind": "Pod", "spec": given}


def whole_object(obj: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """An object with everything filled in that a case may leave out. ``values``: see ``filled``."""
    made: dict[str, Any] = filled(copy.deepcopy(dict(obj)), values)
    made.setdefault("kind", "Pod")
    made.setdefault("apiVersion", "v1")
    metadata = made.setdefault("metadata", {})
    metadata.setdefault("name", "pod")
    spec = made if made["kind"] == "PodTemplate" else made.get("spec") or {}
    if made["kind"] == "Pod":
        _complete(spec, values)
    elif made["kind"] == "CronJob":
        _complete(spec["jobTemplate"]["spec"]["template"]["spec"], values)
    elif isinstance(spec, dict) and "template" in spec:
        _complete(spec["template"]["spec"], values)
    return made


def _complete(spec: dict[str, Any], values: Mapping[str, str]) -> None:
    for kind in ("containers", "initContainers"):
        for container in spec.get(kind) or ():
            container.setdefault("name", "main")
            name = str(container.setdefault("image", "toolbox"))
            container["image"] = values.get(f"image:{name}", name)


def filled(value: Any, values: Mapping[str, str]) -> Any:
    """``value`` with every ``${...}`` in its strings replaced. Raises KeyError for an unknown one."""
    if value == "${registry_port}":
        return int(values["registry_port"])
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: values[match[1]], value)
    if isinstance(value, Mapping):
        return {filled(key, values): filled(each, values) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [filled(each, values) for each in value]
    return value
