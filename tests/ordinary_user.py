"""An ordinary user for tests that are run by root: one that no one else is, with a home and caches of its own.

What it needs of root's (interpreter, checkout, binaries) may lie beneath a folder closed to others, as /root is.
So its commands run in a mount namespace where in the place of such a folder is an empty one, with just those in it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasilet.settings import cache_root
from wasilet_node.runtime.component_host import locate
from wasilet_node.runtime.component_host.library import HostUnavailableError

FIRST_UID = 0x60000000
"""Of no account. This plus the pid of who runs the tests, so that tests beside these do not end their processes."""

_CHECKOUT = Path(__file__).resolve().parents[1]
_END_SECONDS = 20.0


@dataclass(frozen=True)
class OrdinaryUser:
    """Who runs commands."""

    uid: int
    home: Path
    environ: Mapping[str, str]
    prefix: tuple[str, ...]

    def run(self, *argv: str, timeout_seconds: float = 180.0) -> str:
        """Its output. The command has to succeed."""
        done = subprocess.run(
            [*self.prefix, *argv], env={**self.environ}, cwd="/", capture_output=True, text=True,
            timeout=timeout_seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wasilet(self, *argv: str) -> str:
        """One of the harness' commands."""
        return self.run(sys.executable, "-P", "-m", "wasilet", *argv)

    def processes(self) -> list[int]:
        """All that run as this user; not those that have ended and that the machine's init reaps in its own time."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if folder.stat().st_uid == self.uid and _state(folder) != "Z":
                    found.append(int(folder.name))
        return found

    def kill_all(self) -> None:
        """Every process of this user, until there is none."""
        deadline = time.monotonic() + _END_SECONDS
        while found := self.processes():
            assert time.monotonic() < deadline, f"processes {found} do not end"
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextlib.contextmanager
def ordinary_user() -> Iterator[OrdinaryUser]:
    """One for this block; whatever runs as it at the end is ended. Needs root."""
    uid = FIRST_UID + os.getpid()
    folder = Path(tempfile.mkdtemp(prefix="wasilet-u", dir="/tmp"))
    folder.chmod(0o755)
    home, cache = folder / "home", folder / "home" / "cache"
    (cache / "binaries").mkdir(parents=True)
    library = home / "component-host.so"
    with contextlib.suppress(HostUnavailableError):
        shutil.copyfile(locate.find(), library)
    for path in (home, *home.rglob("*")):
        os.chown(path, uid, uid, follow_symlinks=False)
    script = folder / "enter"
    script.write_text(_script(folder, cache, uid), encoding="utf-8")
    user = OrdinaryUser(
        uid=uid,
        home=home,
        environ={
            "HOME": str(home),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "WASILET_CACHE": str(cache),
            "WASILET_STATE_HOME": str(home / "state"),
            **({locate.VARIABLE: str(library)} if library.exists() else {}),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "LC_ALL": "C.UTF-8",
        },
        prefix=("unshare", "--mount", "--propagation", "private", "sh", str(script)),
    )
    try:
        yield user
    finally:
        user.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def _script(folder: Path, cache: Path, uid: int) -> str:
    places = {place: place for place in (Path(sys.base_prefix), Path(sys.prefix).resolve(), _CHECKOUT)}
    places[cache_root() / "binaries"] = cache / "binaries"
    stash = folder / "stash"
    lines, closed = ["set -e"], {_closed_ancestor(place) for place in places} - {None}
    wanted = {
        place: target
        for place, target in places.items()
        if place.is_dir() and (place != target or _closed_ancestor(place) is not None)
    }
    for number, place in enumerate(wanted):
        lines += [f"mkdir -p {stash}/{number}", f"mount --bind {_quoted(place)} {stash}/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 none {_quoted(ancestor)}" for ancestor in closed]
    for number, target in enumerate(wanted.values()):
        lines += [f"mkdir -p {_quoted(target)}", f"mount --bind {stash}/{number} {_quoted(target)}"]
        lines += [f"umount {stash}/{number}"]
    lines += [f'exec setpriv --reuid {uid} --regid {uid} --clear-groups "$@"']
    return "\n".join(lines) + "\n"


def _closed_ancestor(path: Path) -> Path | None:
    """The first folder on the way there that others may not pass."""
    return next((parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001), None)


def _quoted(path: object) -> str:
    return shlex.quote(str(path))


def _state(process: Path) -> str:
    """The third field of ``/proc/PID/stat`` (proc(5)); the second is in parentheses and may hold any character."""
    return (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
