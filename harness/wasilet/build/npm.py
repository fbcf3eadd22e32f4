"""Packages of npm that a build needs: those that a lock file names, by their digests, installed once into the cache.

npm writes ``node_modules`` beside the lock file, so the lock file is copied into the cache and installed there: the
folder it came from stays as it is, and one install serves every build until the lock file changes. Install scripts are
not run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from wasilet import process
from wasilet.errors import HarnessError
from wasilet.settings import cache_root

Say = Callable[[str], None]

NODE_MAJOR = 20
_FILES = ("package.json", "package-lock.json")
_INSTALL_TIMEOUT_SECONDS = 600.0


def find_node(what: str, environ: Mapping[str, str]) -> Path:
    """The ``node`` that runs ``what`` (for messages). Raises HarnessError where it, or npm, is missing or too old."""
    found = shutil.which("node", path=environ.get("PATH"))
    hint = f"install Node.js {NODE_MAJOR} or newer with npm, from https://nodejs.org or your distribution"
    if found is None or shutil.which("npm", path=environ.get("PATH")) is None:
        raise HarnessError(f"{what} needs Node.js and npm, which are not installed", hint=hint)
    version = process.run([found, "--version"], timeout_seconds=30, env=dict(environ), check=False).stdout.strip()
    match = re.match(r"v(\d+)", version)
    if match is None or int(match[1]) < NODE_MAJOR:
        raise HarnessError(f"{what} needs a newer Node.js than {version or found}", hint=hint)
    return Path(found)


def install(folder: Path, needed: Sequence[Path], what: str, say: Say, environ: Mapping[str, str]) -> Path:
    """What the lock file of ``folder`` names; returns the folder in the cache that holds ``node_modules``, named by the
    lock file and renamed into place when it is complete. ``needed`` are files in it without which it is of no use.

    Raises HarnessError with npm's last output.
    """
    files = [folder / name for name in _FILES]
    key = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:32]
    root = cache_root(environ) / "npm"
    installed = root / key
    if (installed / needed[0]).is_file():
        return installed
    root.mkdir(parents=True, exist_ok=True)
    say(f"fetching {what} that package-lock.json names (npm ci)")
    with tempfile.TemporaryDirectory(dir=root, prefix=".installing-") as temporary:
        work = Path(temporary) / "tools"
        work.mkdir()
        for file in files:
            shutil.copyfile(file, work / file.name)
        npm = shutil.which("npm", path=environ.get("PATH")) or "npm"
        done = process.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"],
            timeout_seconds=_INSTALL_TIMEOUT_SECONDS,
            cwd=work,
            env=dict(environ),
            check=False,
        )
        missing = [file for file in needed if not (work / file).is_file()]
        if done.returncode != 0 or missing:
            last = "\n".join(process.last_lines(done.stderr)) or f"it lacks {missing[0] if missing else 'something'}"
            raise HarnessError(f"npm could not install {what}: {last}", hint="is there a network?")
        try:
            os.rename(work, installed)  # noqa: PTH104  (rename, not replace: the first run has won)
        except OSError:
            if not (installed / needed[0]).is_file():
                raise
    return installed
