"""What the builders of all languages hand to ``wasilet.build.application``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a builder hands back."""

    module: Path
    toolchain: str
    inputs: tuple[Path, ...]
    """Files outside the folder that decided the result: the compiler, path dependencies."""
