"""Numbers that a server counts in a page of memory, read by the supervisor.

The layout is that of the crate's ``counters.rs``. The page belongs to a file without a name, so it ends with the two
processes that map it. What is in it comes from a sandbox: numbers, whatever their values.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any

_LENGTH = 532
_BYTES = _LENGTH * 8
_IN_FLIGHT, _CONNECTIONS, _INSTANCES, _MICROSECONDS = 1, 2, 3, 4
_BUCKETS_AT, _STATUS_AT, _FIRST_STATUS = 16, 32, 100
BUCKET_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
"""Upper ends of the histogram's buckets; one more has none."""

_NUMBERS = struct.Struct(f"={_LENGTH}Q")
_MOST = 2**63


class CountersPage:
    """One server's numbers. ``descriptor`` is for the sandbox; ``close`` it after the fork."""

    def __init__(self) -> None:
        """Raises OSError."""
        self.descriptor = os.memfd_create("counters", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, _BYTES)
            self._map = mmap.mmap(self.descriptor, _BYTES, prot=mmap.PROT_READ)
        except BaseException:
            os.close(self.descriptor)
            raise

    def close_descriptor(self) -> None:
        """The numbers can still be read."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def close(self) -> None:
        """Give all back; idempotent."""
        self.close_descriptor()
        self._map.close()

    def read(self) -> dict[str, Any]:
        """``HttpCounters`` as JSON."""
        numbers = [min(number, _MOST) for number in _NUMBERS.unpack(self._map[:_BYTES])]
        statuses = enumerate(numbers[_STATUS_AT:], _FIRST_STATUS)
        return {
            "in_flight": numbers[_IN_FLIGHT],
            "connections": numbers[_CONNECTIONS],
            "instances": numbers[_INSTANCES],
            "seconds": numbers[_MICROSECONDS] / 1e6,
            "buckets": numbers[_BUCKETS_AT : _BUCKETS_AT + len(BUCKET_SECONDS) + 1],
            "statuses": {str(status): count for status, count in statuses if count},
        }
