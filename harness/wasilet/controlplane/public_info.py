"""Nothing of a ``host`` cluster answers who shows no credential, health included.

Kubernetes binds the role ``system:public-info-viewer`` (``/healthz``, ``/livez``, ``/readyz``, ``/version``) to clients
without a credential too. The API server refuses those itself here; controller-manager and scheduler ask it what such a
client may, so the binding is what closes their health paths. It is Kubernetes' own object: taken out of the API
server's reconciliation by Kubernetes' annotation for that, or each start of it would put the group back.
"""

from __future__ import annotations

from wasilet.errors import ApiError
from wasilet.kube.client import Kube, KubeObject
from wasilet.kube.manifests import object_path, render_objects

BINDING = "system:public-info-viewer"
_TEMPLATE = "public-info.yaml.j2"
_CONFLICT = 409
_ATTEMPTS = 5


def _wanted() -> KubeObject:
    (binding,) = render_objects(_TEMPLATE, name=BINDING)
    return binding


def is_closed(kube: Kube) -> bool:
    """Whether the binding is as :func:`close` leaves it. Raises ApiError."""
    wanted = _wanted()
    found = kube.find(object_path(wanted))
    return found is not None and _is_like(found, wanted)


def close(kube: Kube) -> None:
    """Bind the role to clients with a credential alone. The API server may be making the binding in the same moment:
    whichever comes second finds the other's. Raises ApiError."""
    wanted = _wanted()
    for attempt in range(_ATTEMPTS):
        try:
            found = kube.find(object_path(wanted))
            if found is None:
                kube.create(object_path(wanted, collection=True), wanted)
            elif not _is_like(found, wanted):
                kube.patch(object_path(wanted), {**wanted, "metadata": _metadata(found, wanted)})
            return
        except ApiError as error:
            if error.code != _CONFLICT or attempt == _ATTEMPTS - 1:
                raise


def _metadata(found: KubeObject, wanted: KubeObject) -> KubeObject:
    """With the version, so that a change in between is a conflict."""
    return {**wanted["metadata"], "resourceVersion": found["metadata"]["resourceVersion"]}


def _is_like(found: KubeObject, wanted: KubeObject) -> bool:
    annotations = found["metadata"].get("annotations") or {}
    right = all(annotations.get(key) == value for key, value in wanted["metadata"]["annotations"].items())
    return right and found.get("subjects") == wanted["subjects"]
