"""Apps become images in the cluster's registry: built and pushed once, however many tests and workers ask."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from wasilet.errors import UsageError
from wasilet.settings import cache_root
from wasilet.storage import locked_state, storage_errors
from wasilet.testing.cluster import WasmCluster

TAG = "latest"
LOCK_TIMEOUT_SECONDS = 1800.0


class Images:
    """What the fixture ``wasm_app`` calls."""

    def __init__(self, cluster: WasmCluster, folders: Sequence[Path]) -> None:
        self._cluster = cluster
        self._folders = folders
        self._pushed: dict[str, str] = {}

    def __call__(self, app: str | os.PathLike[str]) -> str:
        """The image of ``app``: a sample's name, the path of a folder, or a ``.wasm`` file. The answer names the
        digest: ``host:port/name:latest@sha256:...``.

        Raises UsageError when there is no such app or no registry, HarnessError with the compiler's own message when it
        does not compile, RegistryError when the registry does not answer.
        """
        given = os.fspath(app)
        if given not in self._pushed:
            place = self._place(given)
            with self._one_worker_at_a_time(place or given):
                self._pushed[given] = self._push(given, place)
        return self._pushed[given]

    def _place(self, given: str) -> Path | None:
        """The file or folder; None for a sample's name."""
        from wasilet.apps.samples import samples_root

        if "/" not in given and given not in {".", ".."} and (samples_root() / given).is_dir():
            return None
        for folder in self._folders:
            path = (folder / Path(given).expanduser()).resolve()
            if path.exists():
                return path
        # Neither: what a bare word names that is nowhere was meant as a sample's name, and is refused as one.
        return (self._folders[0] / given).resolve() if "/" in given or given.endswith(".wasm") else None

    def _push(self, given: str, place: Path | None) -> str:
        from wasilet.oci.artifact import layout_named, make_artifact
        from wasilet.oci.push import holds, push, reference_named

        environ = self._cluster.settings.environ
        registry = self._cluster.registry
        if not registry:
            raise UsageError(
                f"no registry is known for cluster {self._cluster.name!r}",
                hint="name one with --wasilet-registry HOST:PORT; `invoke up` brings a cluster that has one",
            )
        if place is not None and place.suffix == ".wasm":
            if not place.is_file():
                raise UsageError(f"there is no file {place}")
            name, module = place.stem.lower(), place
        else:
            from wasilet.apps.samples import find_app
            from wasilet.build.application import build

            found = find_app(given if place is None else str(place), environ=environ)
            name, module = found.name, build(found, say=lambda _: None, environ=environ).module
        artifact = make_artifact(module, layout=layout_named("cncf"), environ=environ)
        reference = reference_named(f"{registry}/{name}:{TAG}")
        if not holds(artifact, reference, environ=environ):
            push(artifact, reference, environ=environ)
        return f"{reference.name}:{TAG}@{artifact.digest}"

    @contextlib.contextmanager
    def _one_worker_at_a_time(self, what: Path | str) -> Iterator[None]:
        key = hashlib.sha256(os.fsencode(what)).hexdigest()[:16]
        path = cache_root(self._cluster.settings.environ) / "apps" / f".{key}.lock"
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        late = f"another test worker has been building {what} for {LOCK_TIMEOUT_SECONDS:g} s"
        with locked_state(path, timeout_seconds=LOCK_TIMEOUT_SECONDS, late=late):
            yield
