"""Password files for a registry with a login: user names with bcrypt hashes, the only kind that distribution reads.

Python has no bcrypt of its own (``crypt`` left in 3.13); the C library's ``crypt`` does, in libxcrypt (Debian, Ubuntu,
Fedora, Arch) and in musl (Alpine). One call of it does not merit a dependency.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import secrets

from wasilet.errors import HarnessError

_ALPHABET = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_SALT_CHARACTERS = 21
_COST = 8
"""2^8 rounds, 20 ms: the registry checks the password again at each request, and it guards a machine's own loopback."""

RANDOM_COST = 4
"""2^4 rounds, 1.3 ms, bcrypt's least: no number of rounds matters to a password of 192 random bits."""


def entry(user: str, password: str, *, cost: int = _COST) -> str:
    """A line of a password file. Raises HarnessError when this machine's C library knows no bcrypt."""
    if ":" in user or "\n" in user + password:
        raise HarnessError("a user name holds no colon, and neither name nor password a line break")
    # The 22nd character of a salt carries four bits only; "." is right for any.
    salt = "".join(secrets.choice(_ALPHABET) for _ in range(_SALT_CHARACTERS)) + "."
    for library in ("libcrypt.so.1", "libcrypt.so.2", ctypes.util.find_library("crypt"), None):
        try:
            crypt = ctypes.CDLL(library).crypt
        except (OSError, AttributeError):
            continue
        crypt.restype = ctypes.c_char_p
        crypt.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
        hashed = crypt(password.encode(), f"$2b${cost:02}${salt}".encode())
        if hashed and hashed.startswith(b"$2b$"):
            # Go's bcrypt reads every minor version; "2y" is what Apache's own tool writes.
            return f"{user}:$2y${hashed[4:].decode()}"
    raise HarnessError("the C library of this machine makes no bcrypt hashes", hint="install libcrypt (libxcrypt)")
