"""An app's templates become objects for the API server.

Templates are Jinja2 and stay as close to the printed manifest as can be: what an image is called goes in, all else is
as its author wrote it. What a provider's cluster asks of every pod besides (:func:`place`) is added to the objects, not
to the templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wasilet.apps.samples import App
from wasilet.errors import UsageError
from wasilet.kube.client import KubeObject
from wasilet.kube.manifest_file import parse_objects

WASM_ARCHITECTURE = "wasm32-wasi"
ARCHITECTURE_LABEL = "kubernetes.io/arch"

__all__ = ["add_pull_secret", "parse_objects", "place", "pod_spec", "render", "render_file", "render_text"]

_TEMPLATES = {
    "Pod": ("spec",),
    "Job": ("spec", "template", "spec"),
    "Deployment": ("spec", "template", "spec"),
    "ReplicaSet": ("spec", "template", "spec"),
    "StatefulSet": ("spec", "template", "spec"),
    "DaemonSet": ("spec", "template", "spec"),
    "CronJob": ("spec", "jobTemplate", "spec", "template", "spec"),
}
"""Where each kind keeps its pod spec."""


def render(app: App, variables: Mapping[str, Any], *, lenient: bool = False) -> list[KubeObject]:
    """The objects of all the app's templates, in their order. ``lenient`` leaves out variables that no one set: enough
    to know kinds and names.

    Raises UsageError that names the template: it is missing, asks for a variable that no one set, is no YAML, or holds
    something that is no Kubernetes object.
    """
    objects: list[KubeObject] = []
    for name in app.demo.manifests:
        text = render_file(app.folder, name, {**app.demo.variables, **variables}, lenient=lenient)
        objects += parse_objects(text, app.folder / name)
    return objects


def render_file(folder: Path, name: str, variables: Mapping[str, Any], *, lenient: bool = False) -> str:
    """One template's text. Raises UsageError."""
    import jinja2

    try:
        return str(_environment(folder, lenient=lenient).get_template(name).render(variables))
    except jinja2.TemplateNotFound as error:
        raise UsageError(f"{folder} holds no template {error.name}", hint="demo.yaml lists the templates") from error
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"{folder / name}, line {error.lineno}: {error.message}") from error
    except jinja2.TemplateError as error:
        raise UsageError(f"{folder / name}: {error.message}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{folder / name} is not UTF-8 text") from error


def render_text(text: str, variables: Mapping[str, Any]) -> str:
    """A value of ``demo.yaml`` that may hold ``{{ variables }}``. Raises UsageError."""
    if "{{" not in text and "{%" not in text:
        return text
    import jinja2

    try:
        return str(_environment(None).from_string(text).render(variables))
    except jinja2.TemplateError as error:
        raise UsageError(f"demo.yaml: {text!r}: {error.message}") from error


def pod_spec(obj: KubeObject) -> KubeObject | None:
    """The pod spec inside an object, itself and not a copy; None when the kind has none."""
    steps = _TEMPLATES.get(str(obj.get("kind")))
    if steps is None:
        return None
    spec: Any = obj
    for step in steps:
        spec = spec.get(step) if isinstance(spec, dict) else None
    return spec if isinstance(spec, dict) else None


def place(objects: list[KubeObject]) -> None:
    """Keep every pod on wasm nodes, for clusters that have other nodes too: a node selector, and tolerations for the
    taints that wasm nodes register there. What a manifest sets itself is left as it is."""
    for obj in objects:
        spec = pod_spec(obj)
        if spec is None:
            continue
        spec.setdefault("nodeSelector", {}).setdefault(ARCHITECTURE_LABEL, WASM_ARCHITECTURE)
        tolerations = spec.setdefault("tolerations", [])
        for effect in ("NoSchedule", "NoExecute"):
            toleration = {
                "key": ARCHITECTURE_LABEL,
                "operator": "Equal",
                "value": WASM_ARCHITECTURE,
                "effect": effect,
            }
            if not any(_tolerates(existing, effect) for existing in tolerations):
                tolerations.append(toleration)


def add_pull_secret(objects: list[KubeObject], name: str) -> None:
    """Let every pod pull with the Secret ``name``, besides what its manifest names itself."""
    for obj in objects:
        spec = pod_spec(obj)
        if spec is None:
            continue
        secrets = spec.setdefault("imagePullSecrets", [])
        if {"name": name} not in secrets:
            secrets.append({"name": name})


def _tolerates(toleration: Any, effect: str) -> bool:
    if not isinstance(toleration, dict):
        return False
    key_fits = toleration.get("key", "") in {"", ARCHITECTURE_LABEL}
    value_fits = toleration.get("operator") == "Exists" or toleration.get("value") == WASM_ARCHITECTURE
    return key_fits and value_fits and toleration.get("effect", "") in {"", effect}


def _environment(folder: Path | None, *, lenient: bool = False) -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder) if folder is not None else None,
        undefined=jinja2.ChainableUndefined if lenient else jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  (YAML, not HTML)
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
