"""What a command does to its own process before anything else: once, at its entry point, never in a library.

The user's environment must not reach into the program: a ``yaml.py`` in ``PYTHONPATH`` is not the library, a umask of
000 is no wish that everyone may write Wasilet's files, and a full disk behind stderr is no reason for a traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO

OTHERS_MAY_WRITE = 0o002
_PACKAGES = ("wasilet", "wasilet_common", "wasilet_node")


def prepare_process() -> None:
    """All of it."""
    ignore_python_path()
    tighten_umask()
    sys.stderr = UnfailingStream(sys.stderr)


def ignore_python_path() -> None:
    """Take what ``PYTHONPATH`` names out of the places that modules come from, here and in the programs started. What
    this program itself consists of may be named there, and stays."""
    given = [entry for entry in os.environ.pop("PYTHONPATH", "").split(os.pathsep) if entry]
    if not given:
        return
    own = _own_places()
    kept = [entry for entry in given if os.path.abspath(entry) in own]  # noqa: PTH100  (the form of sys.path)
    foreign = {os.path.abspath(entry) for entry in given} - own  # noqa: PTH100
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) not in foreign]  # noqa: PTH100
    for name, module in list(sys.modules.items()):
        # Invoke's copy of PyYAML looks for the real one's accelerator, and so may have loaded a foreign yaml.py.
        if name != "__main__" and os.path.dirname(getattr(module, "__file__", None) or "") in foreign:  # noqa: PTH120
            del sys.modules[name]
    if kept:
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)


def _own_places() -> set[str]:
    import site
    import sysconfig

    files = [getattr(sys.modules.get(name), "__file__", None) for name in _PACKAGES]
    packages = {os.path.dirname(os.path.dirname(os.path.abspath(file))) for file in files if file}  # noqa: PTH100, PTH120
    paths = sysconfig.get_paths()
    return packages | {*site.getsitepackages(), paths["stdlib"], paths["platstdlib"], paths["purelib"]}


def tighten_umask() -> None:
    """No one else may write what is made here, whatever the shell's umask is. A umask that lets the group write and
    no others (002) is a choice, and stays."""
    mask = os.umask(0o022)
    if mask & OTHERS_MAY_WRITE:
        os.umask(mask)
    else:
        os.umask(mask | 0o022)


def silence_stdout() -> None:
    """Let what is still written to stdout, by Python at its end as well, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class UnfailingStream:
    """stderr that cannot fail: when its reader has gone or its device is full, what was begun is finished anyway."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Like the stream's own."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Like the stream's own."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()
