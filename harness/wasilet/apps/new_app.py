"""``invoke new NAME``: a user's own app from a template, with its manifest, demo and test.

The template ``command`` is package data beside this module; ``__NAME__`` in it becomes the app's name. The templates of
HTTP services are the samples of their names, so that there is one program of each kind: the sample's name becomes the
app's, and what only a user's own app has (a page, a test) is added. The folder appears by a rename once it is complete,
and one that exists is never touched.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from wasilet.apps.samples import sample_names, samples_root
from wasilet.errors import UsageError
from wasilet.storage import storage_errors

COMMAND = "command"
"""The template of a program that runs, prints and ends."""

_HTTP_PREFIX = "http-"
_HERE = Path(__file__).resolve().parent
_PLACEHOLDER = "__NAME__"
_BUILT = frozenset({"__pycache__", "target", "node_modules"})
_RENAMED = {"gitignore": ".gitignore", "test_app.py.in": "test_app.py", "cargo-config.toml": ".cargo/config.toml"}
"""What would mean something to this project's own tools under its real name."""

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_RESERVED = frozenset(
    [
        "abstract",
        "as",
        "async",
        "await",
        "box",
        "break",
        "const",
        "continue",
        "core",
        "crate",
        "do",
        "dyn",
        "else",
        "enum",
        "extern",
        "false",
        "final",
        "fn",
        "for",
        "if",
        "impl",
        "in",
        "let",
        "loop",
        "macro",
        "match",
        "mod",
        "move",
        "mut",
        "override",
        "priv",
        "proc-macro",
        "pub",
        "ref",
        "return",
        "self",
        "static",
        "std",
        "struct",
        "super",
        "test",
        "trait",
        "true",
        "try",
        "type",
        "typeof",
        "unsafe",
        "unsized",
        "use",
        "virtual",
        "where",
        "while",
        "yield",
        "alloc",
        "build",
        "deps",
        "examples",
        "incremental",
    ]
)
"""Rust's keywords, its own crates, and cargo's folders: no crate may be called so."""


def new_app(name: str, folder: str, *, template: str = COMMAND) -> list[str]:
    """Make ``folder/name``; lines that say what to type next.

    Raises UsageError when ``name`` can name neither a pod nor a crate, there is no such template or ``folder``, or the
    new one is there."""
    if not _NAME.fullmatch(name) or "--" in name:
        raise UsageError(
            f"{name!r} is no name for an app",
            hint="up to 63 of a-z, 0-9 and '-', beginning with a letter: it names a pod, an image and a crate",
        )
    if name in _RESERVED:
        raise UsageError(f"{name!r} is a word that Rust keeps for itself", hint="choose another name")
    if template not in template_names():
        raise UsageError(f"there is no template {template!r}", hint=f"there are {', '.join(template_names())}")
    parent = Path(folder)
    target = parent / name
    if not parent.is_dir():
        raise UsageError(f"there is no folder {parent}")
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists already", hint="choose another name, or remove it")
    with storage_errors(target), tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}.") as temporary:
        made = Path(temporary) / name
        if template == COMMAND:
            _copy(_HERE / "template", made, _PLACEHOLDER, name)
        else:
            _copy(samples_root() / template, made, template, name)
            _copy(_HERE / "template_http", made, _PLACEHOLDER, name)
        shutil.copymode(parent, made)
        made.rename(target)
    return [f"made {target}", f"  invoke demo {target}", f"  pytest {target}"]


def template_names() -> list[str]:
    """What an app may be made from."""
    return [COMMAND, *(name for name in sample_names() if name.startswith(_HTTP_PREFIX))]


def _copy(source: Path, target: Path, word: str, name: str) -> None:
    for found in sorted(source.rglob("*")):
        relative = found.relative_to(source)
        if found.is_dir() or _BUILT.intersection(relative.parts):
            continue
        file = target / relative.parent / _RENAMED.get(relative.name, relative.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found.read_text().replace(word, name))
