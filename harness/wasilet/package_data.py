"""Files that belong to Wasilet and are no code: package data in a wheel, the checkout's own folders in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def checkout_root() -> Path | None:
    """The folder of the sources; None in an installed package."""
    root = PACKAGE.parents[1]
    return root if (root / "tasks.py").is_file() and (root / "harness" / "wasilet" == PACKAGE) else None


def data_path(name: str) -> Path:
    """``manifests``, ``samples`` or ``invoke.yaml``, wherever this Wasilet has it. Raises FileNotFoundError when the
    installation lost it."""
    root = checkout_root()
    place = root / name if root else PACKAGE / "data" / name
    if not place.exists():
        raise FileNotFoundError(f"{place} is missing: install Wasilet again")
    return place
