"""Tools that come as Python wheels: those that a lock file names, by their digests, in a directory of the cache.

Each lock file has its own directory, so that what builds an app can disagree with what runs Wasilet. ``--target``
and no virtual environment: the tools are executables and extension modules without dependencies, and a directory can be
renamed into place once it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from wasilet import process
from wasilet.errors import HarnessError
from wasilet.settings import cache_root

Say = Callable[[str], None]

LOCKS = Path(__file__).resolve().parent / "locks"
_INSTALL_TIMEOUT_SECONDS = 600.0


def install(name: str, needed: Path, what: str, say: Say, environ: Mapping[str, str], *, locks: Path = LOCKS) -> Path:
    """The directory with what ``NAME.lock`` in ``locks`` names; ``needed`` is a file in it without which it is of no
    use.

    Raises HarnessError with pip's last output.
    """
    lock = locks / f"{name}.lock"
    interpreter = f"{sys.implementation.cache_tag}"
    key = hashlib.sha256(lock.read_bytes() + interpreter.encode()).hexdigest()[:32]
    root = cache_root(environ) / "python-tools"
    installed = root / f"{name}-{key}"
    if (installed / needed).is_file():
        return installed
    if importlib.util.find_spec("pip") is None:
        hint = f"type: {sys.executable} -m ensurepip"
        raise HarnessError(f"{what} is fetched by pip, which {sys.executable} does not have", hint=hint)
    root.mkdir(parents=True, exist_ok=True)
    say(f"fetching {what} (pip install, by {lock.name})")
    with tempfile.TemporaryDirectory(dir=root, prefix=".installing-") as temporary:
        work = Path(temporary) / "tools"
        done = process.run(
            [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps",
             "--require-hashes", "--only-binary", ":all:", "--no-compile", "--target", work, "--requirement", lock],
            timeout_seconds=_INSTALL_TIMEOUT_SECONDS,
            env={name: value for name, value in environ.items() if name not in {"PIP_TARGET", "PIP_USER"}},
            check=False,
        )  # fmt: skip
        if done.returncode != 0 or not (work / needed).is_file():
            last = "\n".join(process.last_lines(done.stderr)) or f"it lacks {needed}"
            raise HarnessError(f"pip could not install {what}: {last}", hint="is there a network?")
        try:
            os.rename(work, installed)  # noqa: PTH104  (rename, not replace: the first run has won)
        except OSError:
            if not (installed / needed).is_file():
                raise
    return installed


def version(name: str, *, locks: Path = LOCKS) -> str:
    """What ``NAME.lock`` in ``locks`` pins."""
    pins = (line.partition("==")[2] for line in (locks / f"{name}.lock").read_text().splitlines())
    return next(pin.split()[0] for pin in pins if pin)
