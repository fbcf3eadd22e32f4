"""Answers to a registry's challenges: Basic, and Bearer by the Docker registry's token authentication.

https://distribution.github.io/distribution/spec/auth/token/ and /oauth/. A login goes to the registry that it names and
to that registry's token server. A registry says by itself where its token server is, so one of another site (neither
the same host, nor below a common domain, as ``registry-1.docker.io`` and ``auth.docker.io`` are) gets the login only if
a login names that server, too; else it is asked anonymously.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import aiohttp
from yarl import URL

from wasilet_common import addresses
from wasilet_common.oci.challenge import Challenge
from wasilet_common.oci.credentials import Credential
from wasilet_common.oci.reference import Reference
from wasilet_common.oci.registry import (
    USER_AGENT,
    RegistryAuthError,
    RegistryClient,
    RegistryProtocolError,
    RegistryUnreachableError,
    authority,
    read_bounded,
)

_MAX_TOKEN_ANSWER_BYTES: Final = 256 * 1024
_MAX_COUNTRY_CODE = 2
_MAX_SECOND_LEVEL = 3

Denial = Callable[[Credential | None, Reference, str], str]
"""The text of a refusal: which credential was used (None: none), for what, and what the registry answered."""


def pod_denial(credential: Credential | None, reference: Reference, why: str) -> str:
    """For a pod's events: the pull secret is what its author can change."""
    if credential is None:
        hint = f"name a pull secret for {reference.registry} in the pod's imagePullSecrets"
    else:
        hint = f"the pull secret for {credential.registry} is not accepted"
    return f"pull access denied, repository does not exist or may require authorization: {why}; {hint}"


class Authenticator:
    """Answers challenges of one registry for one repository, with one credential (None: anonymously)."""

    def __init__(
        self,
        *,
        client: RegistryClient,
        reference: Reference,
        credential: Credential | None,
        logins: Sequence[Credential] = (),
        actions: str = "pull",
        denial: Denial = pod_denial,
    ) -> None:
        """``logins``: all that is there, for token servers of another site. ``actions``: what a token is to allow where
        the registry's challenge does not say (``pull`` or ``pull,push``)."""
        self._client = client
        self._reference = reference
        self._credential = credential
        self._logins = logins
        self._actions = actions
        self._denial = denial

    async def answer(self, challenges: Sequence[Challenge]) -> str:
        """The Authorization header; empty: none of the challenges can be answered. Raises RegistryError."""
        for challenge in challenges:
            if challenge.scheme == "bearer":
                return f"Bearer {await self._token(challenge)}"
        if any(challenge.scheme == "basic" for challenge in challenges):
            if self._credential is None or not self._credential.username:
                self.deny("no basic auth credentials")
            return _basic(self._credential)
        return ""

    def deny(self, why: str) -> NoReturn:
        """Raises RegistryAuthError."""
        raise RegistryAuthError(self._denial(self._credential, self._reference, why), why=why)

    async def _token(self, challenge: Challenge) -> str:
        host = self._reference.host
        source = self._client.origin(host)
        try:
            realm = URL(challenge.parameters.get("realm", ""))
            allowed = self._client.may_go(realm, source=source)
        except (ValueError, IndexError):
            allowed = False
        if not allowed:
            raise RegistryProtocolError(
                f"the registry at {host} sends its clients to a token server that may not be used"
            )
        service = challenge.parameters.get("service", "")
        scope = challenge.parameters.get("scope", "") or f"repository:{self._reference.repository}:{self._actions}"
        credential = self._credential_for(realm)
        if credential is not None and credential.identity_token:
            form = {
                "grant_type": "refresh_token",
                "refresh_token": credential.identity_token,
                "service": service,
                "client_id": USER_AGENT,
                "scope": scope,
            }
            method, url = "POST", realm
            headers: dict[str, str] = {}
        else:
            form = None
            headers = {}
            query = [("service", service)] if service else []
            query += [("scope", part) for part in scope.split()]
            method, url = "GET", realm.extend_query(query)
            if credential is not None and credential.username:
                headers = {"Authorization": _basic(credential)}
        withheld = ""
        if credential is None and self._credential is not None:
            withheld = (
                f"; its token server {authority(realm)} is of another site than {host}, so the login for "
                f"{self._credential.registry} was not sent there: add one for {authority(realm)}"
            )
        # With its own limit: a token that expires is asked for while blobs come in, whose limits are longer.
        async with (
            self._client.bounded("a token", host),
            self._client.send(method, url, headers=headers, data=form, source=source) as response,
        ):
            if response.status in {400, 401, 403}:
                self.deny(f"failed to fetch a token: {response.status}{withheld}")
            if response.status != 200:
                raise RegistryUnreachableError(
                    f"unexpected status from {method} request to {realm.with_query(None)}: {response.status}"
                )
            body = await read_bounded(response, _MAX_TOKEN_ANSWER_BYTES, "the token")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        token = (answer.get("token") or answer.get("access_token")) if isinstance(answer, dict) else None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryProtocolError(f"the token server of {host} answered without a token")
        return token

    def _credential_for(self, realm: URL) -> Credential | None:
        if self._credential is None or same_site(realm.host or "", URL(f"//{self._reference.host}").host or ""):
            return self._credential
        for login in self._logins:
            named = login.registry.removeprefix("https://").removeprefix("http://").partition("/")[0].lower()
            if named in {authority(realm), realm.host}:
                return login
        return None


def same_site(one: str, other: str) -> bool:
    """Whether two hosts are one, or names below a common domain that someone can have registered.

    Without the list of public suffixes: a domain of two labels, or of three where the last two look like a country's
    registry (``co.uk``, ``com.au``).
    """
    one, other = one.lower().rstrip("."), other.lower().rstrip(".")
    if one == other or (addresses.names_this_machine(one) and addresses.names_this_machine(other)):
        return True
    if addresses.literal(one) is not None or addresses.literal(other) is not None:
        return False
    return bool(_domain(one)) and _domain(one) == _domain(other)


def _domain(name: str) -> str:
    labels = name.split(".")
    country = len(labels) > 2 and len(labels[-1]) <= _MAX_COUNTRY_CODE and len(labels[-2]) <= _MAX_SECOND_LEVEL
    count = 3 if country else 2
    return ".".join(labels[-count:]) if len(labels) >= count else ""


def _basic(credential: Credential) -> str:
    return aiohttp.encode_basic_auth(credential.username, credential.password)
