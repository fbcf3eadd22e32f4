"""Who may use an image that is on the node already (KEP-2535, on by default in kubelets from 1.35 on).

An image that was pulled with a pull secret is not for every pod of the node: a pod may use it as it is when it brings
the same login or the same Secret; otherwise the registry is asked with what the pod brings, which moves no byte twice.
An image that was pulled without a login, or with the node's own, is for all. The rules are those of kubelet's
``MustAttemptImagePull`` under its default policy, NeverVerifyPreloadedImages; preloaded are the images that an agent
pulled which kept no such records.

What is kept of a login is a keyed hash, beside the Secret's coordinates. The key is in the same private file, so
any reader of that could try guesses at a password, as with kubelet's own records.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wasilet_common.oci.credentials import Credential, SecretSource
from wasilet_common.oci.reference import Reference

_ANY_REPOSITORY = "*"
_KEPT_SECRETS = 100
"""Of one image in one repository; kubelet stops to add to its records there, too."""


@dataclass(kw_only=True)
class _Grant:
    everyone: bool = False
    hashes: dict[SecretSource, str] = field(default_factory=dict)


class AccessRecords:
    """Belongs to a store, in whose index it is written."""

    def __init__(self) -> None:
        self._key = secrets.token_hex(32)
        self._grants: dict[str, dict[str, _Grant]] = {}
        """By digest, then by repository: a login for one repository says nothing about another."""

    def may_use(self, digest: str, reference: Reference, credentials: Iterable[Credential]) -> bool:
        """Whether a pod with these credentials may use the image without asking the registry. What matches in part (a
        Secret that was changed, another one with the same login) is noted in full."""
        grants = self._grants.get(digest, {})
        if _ANY_REPOSITORY in grants:
            return True
        grant = grants.get(_repository(reference))
        if grant is None:
            return False
        if grant.everyone:
            return True
        for credential in credentials:
            if credential.source is None:
                continue
            hashed = self._hash(credential)
            if credential.source in grant.hashes or hashed in grant.hashes.values():
                self._add(grant, credential.source, hashed)
                return True
        return False

    def granted(self, digest: str, reference: Reference, credential: Credential | None) -> bool:
        """The registry has given the image for this login; None or one of the node's: for everyone. Returns whether
        that is news."""
        grant = self._grants.setdefault(digest, {}).setdefault(_repository(reference), _Grant())
        if grant.everyone:
            return False
        if credential is None or credential.source is None:
            grant.everyone = True
            grant.hashes.clear()
            return True
        return self._add(grant, credential.source, self._hash(credential))

    def forget(self, digest: str) -> None:
        """The image is gone."""
        self._grants.pop(digest, None)

    @staticmethod
    def _add(grant: _Grant, source: SecretSource, hashed: str) -> bool:
        if grant.hashes.get(source) == hashed or (len(grant.hashes) >= _KEPT_SECRETS and source not in grant.hashes):
            return False
        grant.hashes[source] = hashed
        return True

    def _hash(self, credential: Credential) -> str:
        parts = (credential.username, credential.password, credential.identity_token)
        return hmac.digest(bytes.fromhex(self._key), json.dumps(parts).encode(), "sha256").hex()

    # ---- in the index

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "key": self._key,
            "images": {
                digest: {repository: _dump(grant) for repository, grant in grants.items()}
                for digest, grants in self._grants.items()
            },
        }

    def load(self, document: Mapping[str, Any] | None, digests: Iterable[str]) -> None:
        """What ``dump`` made; None: the index is of an agent that kept no records, and its images are preloaded. Raises
        KeyError, TypeError, ValueError, AttributeError when it is damaged: then every image is asked for again."""
        self._grants = {}
        if document is None:
            self._grants = {digest: {_ANY_REPOSITORY: _Grant(everyone=True)} for digest in digests}
            return
        bytes.fromhex(document["key"])
        known = frozenset(digests)
        grants = {
            str(digest): {str(repository): _load(grant) for repository, grant in found.items()}
            for digest, found in document["images"].items()
            if digest in known
        }
        self._key, self._grants = str(document["key"]), grants


def _repository(reference: Reference) -> str:
    return f"{reference.registry}/{reference.repository}"


def _dump(grant: _Grant) -> dict[str, Any]:
    listed = [[source.namespace, source.name, source.uid, hashed] for source, hashed in grant.hashes.items()]
    return {"everyone": grant.everyone, "secrets": listed}


def _load(document: Mapping[str, Any]) -> _Grant:
    hashes = {}
    for namespace, name, uid, hashed in document["secrets"]:
        hashes[SecretSource(namespace=str(namespace), name=str(name), uid=str(uid))] = str(hashed)
    return _Grant(everyone=document["everyone"] is True, hashes=hashes)
