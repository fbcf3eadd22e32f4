"""A file system that hangs costs a thread, not the agent."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator

import pytest
from wasilet_node.volumes.base import VolumeError
from wasilet_node.volumes.host_threads import HostThreads

pytestmark = pytest.mark.unit


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


async def test_results_and_errors_come_back() -> None:
    threads = HostThreads(limit=1)
    for number in range(5):
        assert await threads.run("x", lambda number=number: number) == number  # type: ignore[misc]

    def fail() -> None:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        await threads.run("x", fail)


async def test_a_timeout_of_the_file_system_is_not_taken_for_ours() -> None:
    def fail() -> None:
        raise TimeoutError("NFS")

    with pytest.raises(TimeoutError, match="NFS"):
        await HostThreads().run("x", fail)


async def test_a_hanging_path_is_named_and_given_up_on(hang: threading.Event) -> None:
    with pytest.raises(VolumeError, match=r"^/mnt/dead did not answer within 0.05 s$"):
        await HostThreads(timeout_seconds=0.05).run("/mnt/dead", hang.wait)


async def test_hanging_paths_are_limited_and_free_again_when_they_answer(hang: threading.Event) -> None:
    threads = HostThreads(limit=2, timeout_seconds=0.05)
    for _ in range(2):
        with pytest.raises(VolumeError, match="did not answer"):
            await threads.run("/mnt/dead", hang.wait)
    with pytest.raises(VolumeError, match="too many other paths"):
        await threads.run("/fine", lambda: 1)
    hang.set()
    for _ in range(200):
        await asyncio.sleep(0.01)
        try:
            assert await threads.run("/fine", lambda: 1) == 1
            break
        except VolumeError:
            continue
    else:
        pytest.fail("the threads did not come back")


async def test_a_burst_waits_for_a_free_thread() -> None:
    threads = HostThreads(limit=2)
    begin = threading.Event()
    calls = [asyncio.create_task(threads.run("x", begin.wait)) for _ in range(20)]
    await asyncio.sleep(0.02)
    begin.set()
    assert await asyncio.gather(*calls) == [True] * 20


async def test_one_that_is_cancelled_is_cancelled(hang: threading.Event) -> None:
    task = asyncio.create_task(HostThreads().run("/mnt/dead", hang.wait))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_thread_that_answered_takes_the_next_call_and_ends_with_its_owner() -> None:
    threads = HostThreads()
    names = {await threads.run("x", threading.get_ident) for _ in range(5)}
    assert len(names) == 1
    thread = next(each for each in threading.enumerate() if each.ident in names)
    del threads
    gc.collect()
    await asyncio.to_thread(thread.join, 10.0)
    assert not thread.is_alive()
