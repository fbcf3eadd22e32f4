"""What a cluster must offer before wasm nodes can join it, asked without changing anything; and the one thing that can
only be tried.

Whether bootstrap tokens are accepted is not reported by the API. Where the control plane runs as static pods (kubeadm
and all that build on it) its command lines say it; elsewhere a token is made, used once and deleted
(:func:`try_bootstrap_token`), which is a change and so waits for the user's consent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from wasilet.errors import ApiError, HarnessError, UsageError
from wasilet.kube.bootstrap_token import create_token, delete_token
from wasilet.kube.client import Kube, KubeObject, api_path
from wasilet.kube.credentials import Credentials
from wasilet.kube.manifests import missing_objects, render_objects
from wasilet.process import check_cancelled
from wasilet.providers.client_credential import SIGNER

REVIEWS = api_path("selfsubjectaccessreviews", group="authorization.k8s.io")
TOKEN_TRIAL_SECONDS = 5.0
"""The authenticator reads tokens through a cache that lags by milliseconds, rarely by a second."""

TOKENS_OFF = "the API server accepts no bootstrap tokens, which nodes join with"
TOKENS_HINT = "start kube-apiserver with --enable-bootstrap-token-auth=true; see docs/providers/existing.md"
_CERTIFICATES = "certificates.k8s.io"
_RBAC = "rbac.authorization.k8s.io"


@dataclass(frozen=True, kw_only=True)
class Right:
    """A verb on a resource."""

    verb: str
    resource: str
    group: str = ""
    namespace: str = ""
    name: str = ""
    subresource: str = ""

    def __str__(self) -> str:
        """As a person would say it."""
        resource = self.resource + (f"/{self.subresource}" if self.subresource else "")
        name = f" {self.name}" if self.name else ""
        return f"{self.verb} {resource}{name}" + (f" in {self.namespace}" if self.namespace else "")


_ALWAYS = (
    Right(verb="create", resource="secrets", namespace="kube-system"),
    Right(verb="get", resource="configmaps", namespace="kube-system", name="extension-apiserver-authentication"),
    Right(verb="create", resource="certificatesigningrequests", group=_CERTIFICATES),
    Right(verb="update", resource="certificatesigningrequests", group=_CERTIFICATES, subresource="approval"),
    Right(verb="approve", resource="signers", group=_CERTIFICATES, name=SIGNER),
    Right(verb="get", resource="nodes"),
    Right(verb="delete", resource="nodes"),
)
_FOR_MISSING_ROLES = (
    Right(verb="create", resource="clusterroles", group=_RBAC),
    Right(verb="create", resource="clusterrolebindings", group=_RBAC),
)


def wanted_objects() -> list[KubeObject]:
    """The roles and bindings that nodes and the approver need."""
    templates = ("bootstrap-rbac.yaml.j2", "approver-rbac.yaml.j2")
    return [obj for template in templates for obj in render_objects(template)]


def inspect(kube: Kube, *, what: str) -> list[str]:
    """Look at a cluster; what would be added to it, a line each. Changes nothing. Raises UsageError, in one line that
    names all that is missing, and ApiError."""
    if kube.find(f"/apis/{_CERTIFICATES}/v1") is None:
        raise UsageError(f"{what} has no API {_CERTIFICATES}/v1", hint="Kubernetes 1.19 or newer is needed")
    rights = list(_ALWAYS)
    try:
        missing = missing_objects(kube, wanted_objects())
    except ApiError as error:
        if error.code != 403:
            raise
        missing = wanted_objects()
        rights += [replace(right, verb="get") for right in _FOR_MISSING_ROLES]
    if missing:
        rights += _FOR_MISSING_ROLES
    if lacking := [str(right) for right in rights if not may(kube, right)]:
        raise UsageError(
            f"the user of {what} has no right to {'; '.join(lacking)}", hint="use an administrator's context"
        )
    if problem := told_by_pods(kube):
        raise UsageError(f"{what} cannot be joined: {problem[0]}", hint=problem[1])
    names = [f"{obj['kind']} {obj['metadata']['name']}" for obj in missing]
    return [*names, "a bootstrap token in kube-system", "a certificate for the approver"]


def check_node_names(kube: Kube, names: Sequence[str]) -> None:
    """See that no one else runs nodes of these names: two agents on one Node would fight, and `down` would delete what
    is another's. One that is not Ready is of an agent that is gone. Raises UsageError."""
    from wasilet.kube.resources import node_is_ready

    for name in names:
        node = kube.find(api_path("nodes", name))
        if node is not None and node_is_ready(node):
            raise UsageError(
                f"the cluster has a node {name} already, which another Wasilet runs",
                hint="another --name gives the nodes of this one other names",
            )


def may(kube: Kube, right: Right) -> bool:
    """Whether the user may, by SelfSubjectAccessReview."""
    attributes = {
        "verb": right.verb,
        "resource": right.resource,
        "group": right.group,
        "namespace": right.namespace,
        "name": right.name,
        "subresource": right.subresource,
    }
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
    }
    return bool((kube.create(REVIEWS, body).get("status") or {}).get("allowed"))


def told_by_pods(kube: Kube) -> tuple[str, str] | None:
    """What the command lines of a control plane of static pods say against joining; None: nothing, or there is none
    that could be read."""
    try:
        servers = _arguments(kube, "kube-apiserver")
        managers = _arguments(kube, "kube-controller-manager")
    except ApiError:
        return None
    for arguments in servers:
        if _flag(arguments, "enable-bootstrap-token-auth") not in {"true", ""}:
            return TOKENS_OFF, TOKENS_HINT
    for arguments in managers:
        controllers = (_flag(arguments, "controllers") or "*").split(",")
        named = [a for a in arguments if a.startswith("--cluster-signing-") and a.partition("=")[0].endswith("-file")]
        if "-csrsigning" in controllers or not named:
            return (
                "its controller-manager signs no certificates (csrsigning)",
                "start it with --cluster-signing-cert-file and --cluster-signing-key-file",
            )
    return None


def _arguments(kube: Kube, component: str) -> list[list[str]]:
    pods = kube.get(api_path("pods", namespace="kube-system"), labelSelector=f"component={component}")
    found = []
    for pod in pods.get("items") or []:
        for container in pod["spec"].get("containers") or []:
            words = [*(container.get("command") or []), *(container.get("args") or [])]
            if any(word.startswith("--") for word in words):
                found.append([str(word) for word in words])
    return found


def _flag(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name=value``; empty for a bare ``--name``; None when it is not there."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == f"--{name}":
            return value
    return None


def try_bootstrap_token(kube: Kube, credentials: Credentials) -> None:
    """Make a token, use it once, delete it. Raises HarnessError when the API server does not know it."""
    token = create_token(kube, ttl_seconds=120, description="wasilet looks whether tokens work")
    try:
        joining = Kube(replace(credentials, certificate=None, key=None, token=token.text))
        deadline = time.monotonic() + TOKEN_TRIAL_SECONDS
        try:
            while True:
                try:
                    joining.get("/api")
                    return
                except ApiError as error:
                    if error.code == 403:
                        return
                    if error.code != 401 or time.monotonic() >= deadline:
                        raise HarnessError(
                            TOKENS_OFF if error.code == 401 else error.message, hint=TOKENS_HINT
                        ) from error
                check_cancelled()
                time.sleep(0.05)
        finally:
            joining.close()
    finally:
        delete_token(kube, token.id)
