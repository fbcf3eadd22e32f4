"""A report of a real demo, looked at in a real browser."""

from __future__ import annotations

import io
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from wasilet.build import apt
from wasilet.console import PlainReporter
from wasilet.errors import HarnessError
from wasilet.terminal.report import write_report

from tests.clusters import TestCluster

pytestmark = pytest.mark.e2e

BROWSER_LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def chromium() -> str:
    """Debian's, which is brought where that may be."""
    found = shutil.which("chromium")
    if found is None and apt.may_install():
        try:
            apt.install(["chromium"], why="the look at a report in a browser", say=lambda _: None)
        except HarnessError as error:
            pytest.skip(f"no chromium: {error}")
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium, and not root on a machine with apt")
    return found


def browse(chromium: str, folder: Path, *words: str) -> str:
    argv = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1180,900",
        f"--user-data-dir={folder / 'profile'}", *words,
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=BROWSER_LIMIT_SECONDS, check=True)
    return done.stdout


def colours(png: bytes) -> set[tuple[int, int, int]]:
    """Every colour that a PNG without interlacing holds, 8 bits a channel."""
    width, height, _, kind = struct.unpack(">IIBB", png[16:26])
    channels = {2: 3, 6: 4}[kind]
    data, place = b"", 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + size]
        place += size + 12
    raw, stride = zlib.decompress(data), width * channels
    seen: set[tuple[int, int, int]] = set()
    above = bytearray(stride)
    for row in range(height):
        start = row * (stride + 1)
        how, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for i in range(stride):
            left = line[i - channels] if i >= channels else 0
            up, corner = above[i], above[i - channels] if i >= channels else 0
            if how == 1:
                line[i] = (line[i] + left) & 255
            elif how == 2:
                line[i] = (line[i] + up) & 255
            elif how == 3:
                line[i] = (line[i] + (left + up) // 2) & 255
            elif how == 4:
                guess = left + up - corner
                nearest = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))
                line[i] = (line[i] + nearest[2]) & 255
        seen |= {(line[i], line[i + 1], line[i + 2]) for i in range(0, stride, channels)}
        above = line
    return seen


def test_a_browser_shows_the_demo(cluster: TestCluster, chromium: str, tmp_path: Path) -> None:
    log = io.StringIO()
    file = tmp_path / "report.html"
    written = write_report(
        cluster.settings, app="hello-wasm", namespace="default", file=file, reporter=PlainReporter(log)
    )
    assert written.recap is not None
    assert written.recap.succeeded, log.getvalue()
    dom = browse(chromium, tmp_path, "--dump-dom", file.as_uri())
    assert "demo hello-wasm" in dom
    assert re.search(r"</time>Hello, World!", dom)
    assert "Pulled" in dom
    assert re.search(r'class="to"[^>]*>\d', dom), "no time to the first line"
    browse(chromium, tmp_path, f"--screenshot={tmp_path / 'shot.png'}", file.as_uri())
    shown = colours((tmp_path / "shot.png").read_bytes())
    assert {(0xF0, 0xB4, 0x29), (0x34, 0xA8, 0x71)} <= shown, "the timeline's bars are not on the screen"


def test_a_hostile_page_runs_nothing(chromium: str, tmp_path: Path) -> None:
    """The page's own policy, apart from the escaping: a script that got in would not run."""
    from wasilet.testing.report_page import page

    file = tmp_path / "report.html"
    evil = "<script>document.title = 'taken over'</script>"
    file.write_text(page("quiet", []).replace("</main>", f"{evil}</main>"))
    assert "<title>Wasilet: quiet</title>" in browse(chromium, tmp_path, "--dump-dom", file.as_uri())
