"""Tokens are asked for once, renewed in time, kept over failures and restarts, and forgotten with the pod."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from wasilet_node.kube.base import ApiUnavailableError
from wasilet_node.kube.references import References, ReferenceSettings
from wasilet_node.volumes.base import VolumeError
from wasilet_node.volumes.tokens import Tokens

from tests.unit.node.volumes.rig import ReferenceKube, make_pod

pytestmark = pytest.mark.unit

PATH = "/api/v1/namespaces/default/serviceaccounts/default/token"


@pytest.fixture
def kube() -> ReferenceKube:
    return ReferenceKube()


@pytest.fixture
async def references(kube: ReferenceKube) -> AsyncIterator[References]:
    references = References(kube, settings=ReferenceSettings(lag_seconds=0.05))
    yield references
    await references.close()


@pytest.fixture
def tokens(kube: ReferenceKube, references: References) -> Tokens:
    return Tokens(references, clock=lambda: kube.now, jitter=lambda: 0.0)


async def ask(tokens: Tokens, *, uid: str = "u", audience: str = "", published: bytes | None = None) -> bytes:
    return await tokens.token(make_pod(uid=uid), audience=audience, expiration_seconds=3607, published=published)


async def test_a_token_is_kept_until_four_fifths_of_its_life(kube: ReferenceKube, tokens: Tokens) -> None:
    first = await ask(tokens)
    kube.now += 0.79 * 3600
    assert await ask(tokens) == first
    kube.now += 0.02 * 3600
    assert await ask(tokens) != first
    assert kube.calls[PATH] == 2


async def test_a_long_token_is_renewed_after_a_day(kube: ReferenceKube, tokens: Tokens) -> None:
    kube.token_seconds = 365 * 86400
    first = await ask(tokens)
    kube.now += 86400 - 60
    assert await ask(tokens) == first
    kube.now += 120
    assert await ask(tokens) != first


async def test_a_failed_renewal_keeps_the_old_token_while_it_is_valid(kube: ReferenceKube, tokens: Tokens) -> None:
    first = await ask(tokens)
    kube.unavailable = ApiUnavailableError("away")
    kube.now += 3500
    assert await ask(tokens) == first
    kube.now += 200
    with pytest.raises(VolumeError, match="expired and refresh failed: away"):
        await ask(tokens)


async def test_a_first_token_that_cannot_be_had_is_an_error(kube: ReferenceKube, tokens: Tokens) -> None:
    kube.unavailable = ApiUnavailableError("away")
    with pytest.raises(VolumeError, match="failed to fetch token: away"):
        await ask(tokens)


async def test_audiences_and_pods_have_tokens_of_their_own(kube: ReferenceKube, tokens: Tokens) -> None:
    await ask(tokens)
    await ask(tokens, audience="vault")
    await ask(tokens, uid="other")
    assert [body["spec"]["audiences"] for body in kube.bodies] == [[], ["vault"], []]


async def test_after_a_restart_a_published_token_of_this_pod_is_taken_over(
    kube: ReferenceKube, tokens: Tokens, references: References
) -> None:
    first = await ask(tokens)
    again = Tokens(references, clock=lambda: kube.now, jitter=lambda: 0.0)
    assert await ask(again, published=first) == first
    assert kube.calls[PATH] == 1
    assert await ask(again, uid="other", published=first) != first
    kube.now += 3599
    assert await ask(again, published=first) != first


@pytest.mark.parametrize("junk", [b"", b"x", b"a.b.c", b"a.e30.c", b"a.W10.c", b"\xff.\xff.\xff"])
async def test_what_is_no_token_of_ours_is_not_taken_over(kube: ReferenceKube, tokens: Tokens, junk: bytes) -> None:
    assert await ask(tokens, published=junk) != junk


async def test_a_pod_that_is_gone_leaves_nothing(tokens: Tokens) -> None:
    await ask(tokens)
    tokens.release("u")
    assert tokens._tokens == {}
