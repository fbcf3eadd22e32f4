"""Child processes that do not outlive the process that started them, however that ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_END_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)
"""``PR_SET_PDEATHSIG`` holds for the process that sets it; Python offers no safe place between fork and exec."""


def ending_with_parent(argv: Sequence[str]) -> list[str]:
    """The command line that becomes ``argv``, whose first word is a path, and is killed when the *thread* that starts
    it ends. Of the calling process alone."""
    return [*(sys.executable, "-I", "-S", "-c", _END_WITH_PARENT, str(os.getpid())), *argv]
