"""The book: a file with a line per entry."""

import os
from pathlib import Path

MAX_ENTRY_BYTES = 1000


def _path() -> Path:
    return Path(os.environ.get("BOOK", "/data/book.txt"))


def entries() -> list[str]:
    """All entries, the oldest first; none while there is no file yet."""
    try:
        with _path().open(encoding="utf-8") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def add(entry: str) -> None:
    """Append an entry, by one write: instances that append at the same time do not mix their lines."""
    with _path().open("ab", buffering=0) as file:
        file.write(f"{entry}\n".encode())
