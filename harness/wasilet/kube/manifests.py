"""The templates of everything that the harness itself applies: where they are, and how one becomes objects.

In a checkout they are in ``manifests/``; in a wheel they are package data. Values are quoted by the ``tojson`` filter
in the templates, so that no value can end a string and begin a field.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wasilet.errors import ApiError, HarnessError, UsageError
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.credentials import load_yaml
from wasilet.package_data import data_path

if TYPE_CHECKING:
    from collections.abc import Iterable

CONFLICT = 409

_COLLECTIONS = {
    "ClusterRole": ("clusterroles", "rbac.authorization.k8s.io", "v1"),
    "ClusterRoleBinding": ("clusterrolebindings", "rbac.authorization.k8s.io", "v1"),
    "EndpointSlice": ("endpointslices", "discovery.k8s.io", "v1"),
    "Service": ("services", "", "v1"),
    "Secret": ("secrets", "", "v1"),
    "CertificateSigningRequest": ("certificatesigningrequests", "certificates.k8s.io", "v1"),
}


def manifests_folder() -> Path:
    """Where the templates are. Raises HarnessError when the installation lacks them."""
    try:
        return data_path("manifests")
    except FileNotFoundError as error:
        raise HarnessError("the manifests of this installation are missing", hint="install Wasilet again") from error


def render_objects(template: str, **values: Any) -> list[KubeObject]:
    """The objects of ``manifests/<template>``. A value that the template asks for and does not get is an error."""
    documents = [load_yaml(part) for part in render_text(template, **values).split("\n---\n")]
    return [document for document in documents if document]


def render_text(template: str, **values: Any) -> str:
    """``manifests/<template>`` filled in, as :func:`render_objects` has it. Raises UsageError."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(manifests_folder()),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701  (YAML, not HTML; values pass through tojson)
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        return environment.get_template(template).render(**values)
    except jinja2.TemplateError as error:
        raise UsageError(f"manifests/{template}: {error}") from error


def object_path(obj: KubeObject, *, collection: bool = False) -> str:
    """The API path of an object of one of the kinds above, or of its collection."""
    plural, group, version = _COLLECTIONS[obj["kind"]]
    metadata = obj["metadata"]
    name = "" if collection else metadata["name"]
    return api_path(plural, name, group=group, version=version, namespace=metadata.get("namespace", ""))


def missing_objects(kube: Kube, objects: Iterable[KubeObject]) -> list[KubeObject]:
    """Those that the cluster lacks."""
    return [obj for obj in objects if kube.find(object_path(obj)) is None]


def create_missing(kube: Kube, objects: Iterable[KubeObject]) -> list[str]:
    """Create those that the cluster lacks, never touching what is there; returns ``Kind/name`` of the new ones."""
    made = []
    for obj in objects:
        try:
            kube.create(object_path(obj, collection=True), obj)
        except ApiError as error:
            # A Service that is there is refused for its address, which is taken (422), before its name is looked at.
            if error.code != CONFLICT and kube.find(object_path(obj)) is None:
                raise
        else:
            made.append(f"{obj['kind']}/{obj['metadata']['name']}")
    return made
