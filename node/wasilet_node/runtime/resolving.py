"""The files that a sandbox with outbound HTTP must read besides its mounts: name resolution and certificates.

Landlock rules are about inodes. A ``resolv.conf`` that is replaced later by another file is therefore seen by
containers that start after that; where it is a link into a folder of a resolver service, as systemd-resolved has it,
that folder is allowed, and running containers follow.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

_RESOLVER = (
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/protocols",
)
_LIBRARIES = ("/etc/ld.so.cache", "/lib", "/lib64", "/usr/lib", "/usr/lib64")
"""glibc loads the modules that nsswitch.conf names, and Python what its TLS needs."""

_CERTIFICATES = (
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/ca-certificates",
    "/etc/pki/tls/certs",
    "/etc/pki/ca-trust",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/usr/share/pki",
    "/var/lib/ca-certificates",
)


def readable_paths() -> tuple[str, ...]:
    """Files, and folders in which files may be read; those that do not exist do no harm."""
    verify = ssl.get_default_verify_paths()
    chosen = (verify.cafile, verify.capath, verify.openssl_cafile, verify.openssl_capath)
    folders = [
        str(target.parent)
        for target in (Path(os.path.realpath(name)) for name in _RESOLVER)
        if target.is_relative_to("/run") and target.parent != Path("/run")
    ]
    return (*_RESOLVER, *_LIBRARIES, *_CERTIFICATES, *(path for path in chosen if path), *folders)
