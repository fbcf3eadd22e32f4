"""``invoke new NAME``: a user's own app from a template, with its manifest, demo and test.

The template is package data beside this module; ``__NAME__`` in it becomes the app's name. The folder appears by a
rename once it is complete, and one that exists is never touched.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from wasilet.errors import UsageError
from wasilet.storage import storage_errors

_PLACEHOLDER = "__NAME__"
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


def new_app(name: str, folder: str) -> list[str]:
    """Make ``folder/name``; lines that say what to type next.

    Raises UsageError when ``name`` can name neither a pod nor a crate, ``folder`` is not there, or the new one is."""
    if not _NAME.fullmatch(name) or "--" in name:
        raise UsageError(
            f"{name!r} is no name for an app",
            hint="up to 63 of a-z, 0-9 and '-', beginning with a letter: it names a pod, an image and a crate",
        )
    if name in _RESERVED:
        raise UsageError(f"{name!r} is a word that Rust keeps for itself", hint="choose another name")
    parent = Path(folder)
    target = parent / name
    if not parent.is_dir():
        raise UsageError(f"there is no folder {parent}")
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists already", hint="choose another name, or remove it")
    template = Path(__file__).resolve().parent / "template"
    with storage_errors(target), tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}.") as temporary:
        made = Path(temporary) / name
        for source in sorted(template.rglob("*")):
            if source.is_dir() or "__pycache__" in source.parts:
                continue
            relative = source.relative_to(template)
            file = made / relative.parent / _RENAMED.get(relative.name, relative.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source.read_text().replace(_PLACEHOLDER, name))
        shutil.copymode(parent, made)
        made.rename(target)
    return [f"made {target}", f"  invoke demo {target}", f"  pytest {target}"]
