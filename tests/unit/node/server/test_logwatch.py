"""Waking those who follow logs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from wasilet_node.server.logwatch import Inotify, LogWatcher

pytestmark = pytest.mark.unit


async def seconds_until_woken(watcher: LogWatcher, folder: Path, *, change: Path) -> float:
    async with watcher.follow(folder, ended=lambda: False) as waiter:
        await asyncio.sleep(0.02)
        started = time.monotonic()
        change.parent.mkdir(exist_ok=True)
        change.write_bytes(b"x")
        await waiter.wait()
        return time.monotonic() - started


async def test_new_text_wakes_at_once(tmp_path: Path) -> None:
    watcher = LogWatcher()
    try:
        assert await seconds_until_woken(watcher, tmp_path, change=tmp_path / "0.log") < 0.05
    finally:
        watcher.close()


async def test_without_inotify_waking_takes_a_tick(tmp_path: Path) -> None:
    def refuse() -> Inotify:
        raise OSError(24, "Too many open files")

    watcher = LogWatcher(inotify=refuse)
    try:
        assert await seconds_until_woken(watcher, tmp_path, change=tmp_path / "0.log") < 0.3
    finally:
        watcher.close()


async def test_a_folder_that_comes_later_is_watched_then(tmp_path: Path) -> None:
    watcher = LogWatcher()
    folder = tmp_path / "later"
    try:
        async with watcher.follow(folder, ended=lambda: False):
            folder.mkdir()
            await asyncio.sleep(0.25)
            assert folder in watcher._watches
        assert not watcher._watches
    finally:
        watcher.close()


async def test_the_end_of_a_container_wakes_its_follower(tmp_path: Path) -> None:
    watcher, ended = LogWatcher(), False
    try:
        async with watcher.follow(tmp_path, ended=lambda: ended) as waiter:
            ended = True
            await asyncio.wait_for(waiter.wait(), 10)
            assert waiter.ended
    finally:
        watcher.close()


async def test_a_lost_event_costs_a_second_at_most(tmp_path: Path) -> None:
    watcher = LogWatcher(forced_check_seconds=0.1)
    try:
        async with watcher.follow(tmp_path, ended=lambda: False) as waiter:
            async with asyncio.timeout(1):
                await waiter.wait()
    finally:
        watcher.close()
