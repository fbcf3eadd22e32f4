"""References are read rarely, never stale for a pod that starts, and forgotten with the last pod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from wasilet_node.kube.base import ApiUnavailableError, ForbiddenError, NotFoundError
from wasilet_node.kube.references import References, ReferenceSettings

from tests.unit.node.volumes.rig import ReferenceKube

pytestmark = pytest.mark.unit

PATH = "/api/v1/namespaces/default/configmaps/cm"
WATCH = "watch /api/v1/namespaces/default/configmaps metadata.name=cm"
SETTINGS = ReferenceSettings(lag_seconds=0.15, ttl_seconds=30, max_watches=2)


@pytest.fixture
def kube() -> ReferenceKube:
    return ReferenceKube()


@pytest.fixture
async def references(kube: ReferenceKube) -> AsyncIterator[References]:
    references = References(kube, settings=SETTINGS)
    yield references
    await references.close()


async def data(references: References, uid: str = "a", max_age_seconds: float = 0.0) -> object:
    return (await references.config_map("default", "cm", pod_uid=uid, max_age_seconds=max_age_seconds))["data"]


async def test_right_after_a_binding_a_403_is_retried(kube: ReferenceKube, references: References) -> None:
    kube.config_map("cm", {"k": "v"})
    kube.forbidden[PATH] = 3
    assert await data(references) == {"k": "v"}
    assert kube.calls[PATH] == 4


async def test_a_403_that_stays_is_reported_after_the_lag(kube: ReferenceKube, references: References) -> None:
    kube.forbidden[PATH] = 1000
    with pytest.raises(ForbiddenError, match="no relationship found"):
        await data(references)
    assert 4 <= kube.calls[PATH] <= 10
    calls = kube.calls[PATH]
    with pytest.raises(ForbiddenError):
        await data(references)
    assert kube.calls[PATH] == calls + 1, "a pod that is known for longer is not lagging"


async def test_a_missing_object_is_reported_at_once_in_kubelets_words(
    kube: ReferenceKube, references: References
) -> None:
    with pytest.raises(NotFoundError) as caught:
        await references.secret("default", "s", pod_uid="a")
    assert str(caught.value) == 'secret "s" not found'
    assert kube.calls["/api/v1/namespaces/default/secrets/s"] == 1


async def test_a_start_reads_again_and_a_refresh_does_not(kube: ReferenceKube, references: References) -> None:
    kube.config_map("cm", {"k": "1"})
    assert await data(references) == {"k": "1"}
    kube.config_map("cm", {"k": "2"})
    assert await data(references, max_age_seconds=30) == {"k": "1"}
    assert await data(references) == {"k": "2"}


async def test_many_that_ask_at_once_share_two_reads(kube: ReferenceKube) -> None:
    references = References(kube, settings=ReferenceSettings(watch_from_users=10_000))
    kube.config_map("cm", {"k": "v"})
    kube.delay_seconds = 0.01
    found = await asyncio.gather(*(data(references, f"pod-{number}") for number in range(500)))
    assert all(one == {"k": "v"} for one in found)
    assert kube.calls[PATH] == 2, "the one that had begun serves the first only, the next one all others"
    await references.close()


async def test_a_read_that_began_before_is_not_shared(kube: ReferenceKube) -> None:
    references = References(kube, settings=ReferenceSettings(watch_from_users=10_000))
    kube.config_map("cm", {"k": "old"})
    kube.delay_seconds = 0.02
    first = asyncio.create_task(data(references, "a"))
    await asyncio.sleep(0.005)
    second = asyncio.create_task(data(references, "b"))
    await first
    kube.config_map("cm", {"k": "new"})
    assert await second == {"k": "new"}
    await references.close()


async def test_one_that_gives_up_does_not_spoil_the_read_of_the_others(
    kube: ReferenceKube, references: References
) -> None:
    kube.config_map("cm", {"k": "v"})
    kube.delay_seconds = 0.02
    impatient = asyncio.create_task(data(references, "a"))
    await asyncio.sleep(0.005)
    patient = asyncio.create_task(data(references, "a"))
    await asyncio.sleep(0.005)
    impatient.cancel()
    assert await patient == {"k": "v"}


async def test_an_immutable_object_is_read_once(kube: ReferenceKube, references: References) -> None:
    kube.config_map("cm", {"k": "v"}, immutable=True)
    for uid in ("a", "b", "c"):
        await data(references, uid)
    assert kube.calls[PATH] == 1
    assert kube.watching == 0


async def test_an_object_that_pods_share_is_watched_and_read_no_more(
    kube: ReferenceKube, references: References
) -> None:
    kube.config_map("cm", {"k": "1"})
    for uid in ("a", "b"):
        await data(references, uid)
    await asyncio.sleep(0.01)
    reads = kube.calls[PATH]
    kube.config_map("cm", {"k": "2"})
    await asyncio.sleep(0.01)
    assert await data(references, "c") == {"k": "2"}
    kube.remove(PATH)
    await asyncio.sleep(0.01)
    with pytest.raises(NotFoundError, match='configmap "cm" not found'):
        await data(references, "a")
    assert kube.calls[PATH] == reads
    assert kube.calls[WATCH] == 1


async def test_a_slow_read_does_not_overwrite_what_the_watch_brought(
    kube: ReferenceKube, references: References
) -> None:
    kube.config_map("cm", {"k": "old"})
    await data(references, "a")
    answer = kube.objects[PATH]

    async def slow_get(path: str, *, timeout_seconds: float = 10.0) -> dict[str, object]:
        await asyncio.sleep(0.03)
        return answer

    kube.get = slow_get  # type: ignore[method-assign]
    reading = asyncio.create_task(data(references, "b"))
    await asyncio.sleep(0.01)
    kube.config_map("cm", {"k": "new"})
    await reading
    assert await data(references, "a") == {"k": "new"}


async def test_a_watch_that_breaks_gives_way_to_reads(kube: ReferenceKube, references: References) -> None:
    kube.config_map("cm", {"k": "1"})
    for uid in ("a", "b"):
        await data(references, uid)
    await asyncio.sleep(0.01)
    kube.break_watches(ApiUnavailableError("gone"))
    await asyncio.sleep(0.01)
    kube.config_map("cm", {"k": "2"})
    assert await data(references, "a") == {"k": "2"}
    assert kube.watching == 0


async def test_no_more_is_watched_than_the_limit(kube: ReferenceKube, references: References) -> None:
    for name in ("one", "two", "three"):
        kube.config_map(name, {})
        for uid in ("a", "b"):
            await references.config_map("default", name, pod_uid=uid)
    await asyncio.sleep(0.01)
    assert kube.watching == 2


async def test_the_last_pod_takes_the_object_and_its_watch_along(kube: ReferenceKube, references: References) -> None:
    kube.config_map("cm", {"k": "v"})
    for uid in ("a", "b"):
        await data(references, uid)
    await asyncio.sleep(0.01)
    references.release("a")
    await asyncio.sleep(0.01)
    assert kube.watching == 1
    references.release("b")
    references.release("b")
    await asyncio.sleep(0.01)
    assert kube.watching == 0
    assert references._entries == {}
    assert references._pods == {}


async def test_a_token_is_bound_to_the_pod_and_a_404_is_retried_as_lag(
    kube: ReferenceKube, references: References
) -> None:
    path = "/api/v1/namespaces/default/serviceaccounts/robot/token"
    kube.forbidden[path] = 2
    status = await references.service_account_token(
        "default", "robot", pod_name="web", pod_uid="u", expiration_seconds=3607
    )
    assert status["token"]
    assert kube.bodies[-1]["spec"] == {
        "audiences": [],
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "u"},
        "expirationSeconds": 3607,
    }
    assert kube.calls[path] == 3


async def test_names_cannot_lead_to_other_paths(kube: ReferenceKube, references: References) -> None:
    with pytest.raises(NotFoundError):
        await references.secret("default", "../../kube-system/secrets/x", pod_uid="a")
    assert all("kube-system/" not in path for path in kube.calls)


async def test_closing_leaves_no_task(kube: ReferenceKube) -> None:
    references = References(kube, settings=SETTINGS)
    references.start()
    kube.config_map("cm", {})
    for uid in ("a", "b"):
        await data(references, uid)
    await references.close()
    await asyncio.sleep(0)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
