"""Failures as GitHub Actions shows them beside the code: workflow commands on stdout, escaped as the runner asks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_MESSAGE_CHARACTERS = 4000


def annotation(report: Any, *, root: Path, environ: Mapping[str, str] = os.environ) -> str:
    """``::error file=...,line=...,title=...::message`` of a failed report."""
    path, line, _ = report.location
    line = (line or 0) + 1
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(getattr(crash, "message", "") or report.longrepr or "failed")[:MAX_MESSAGE_CHARACTERS]
    file = root / path
    if crash is not None and Path(crash.path).name == file.name:
        line = crash.lineno
    workspace = environ.get("GITHUB_WORKSPACE")
    if workspace and file.is_relative_to(workspace):
        file = file.relative_to(workspace)
    fields = {"file": str(file), "line": str(line), "title": report.nodeid}
    for name, value in report.user_properties:
        if name == "wasilet.artifacts":
            message += f"\n\nartifacts: {value}"
    words = ",".join(f"{key}={_property(value)}" for key, value in fields.items())
    return f"::error {words}::{_message(message)}"


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")
