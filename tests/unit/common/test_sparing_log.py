from __future__ import annotations

import logging

import pytest
from wasilet_common.sparing_log import SparingLog

pytestmark = pytest.mark.unit


def test_what_is_too_much_for_a_period_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    log = SparingLog(logging.getLogger("t"), lines=2, seconds=60.0, clock=lambda: now[0])
    for number in range(5):
        log.info("%d", number)
    assert caplog.messages == ["0", "1"]
    now[0] = 60.0
    log.info("next")
    assert caplog.messages == ["0", "1", "3 more messages were left out", "next"]
