"""``invoke build``, ``push`` and ``pull`` as plays: the same wording, progress and exit codes as everything else."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from wasilet.apps.samples import find_app
from wasilet.errors import HarnessError, UsageError
from wasilet.settings import Settings
from wasilet.steps import Finding, Play, Progress, Recap, Step

if TYPE_CHECKING:
    from wasilet.build.application import Built
    from wasilet.oci.push import Pulled, Pushed
    from wasilet.steps import Reporter


def build_app(name: str, settings: Settings, *, reporter: Reporter, force: bool = False) -> tuple[Recap, Built | None]:
    """Build an app by name or path. Raises UsageError for what is no app; a compiler's refusal is in the recap."""
    made: list[Built] = []
    step = _build_step(name, settings, made, force=force)
    recap = Play(f"build {name}", [step]).run(reporter=reporter)
    return recap, made[0] if made else None


def push_app(
    name: str,
    settings: Settings,
    *,
    reporter: Reporter,
    to: str = "",
    layout: str = "cncf",
    insecure: Collection[str] = (),
) -> tuple[Recap, Pushed | None]:
    """Build an app, or take a ``.wasm`` file as it is, and push it: to ``to``, or else to the cluster's registry under
    the app's name. Raises UsageError for what is no app, reference or layout."""
    from wasilet.oci.artifact import layout_named
    from wasilet.oci.push import push, reference_named

    chosen = layout_named(layout)
    file = module_file(name, settings)
    target = (
        to or f"{cluster_registry(settings)}/{file.stem if file else find_app(name, environ=settings.environ).name}"
    )
    reference = reference_named(target)
    made: list[Built] = []
    pushed: list[Pushed] = []

    def change(progress: Progress) -> str:
        from wasilet.oci.artifact import make_artifact

        progress(f"pushing to {reference}")
        module = file or made[0].module
        artifact = make_artifact(module, layout=chosen, environ=settings.environ)
        pushed.append(push(artifact, reference, insecure=insecure, environ=settings.environ))
        done = pushed[0]
        sent = f"{done.uploaded_bytes / 1024:.0f} KiB sent" if done.uploaded_bytes else "the registry had it"
        return f"{done.size_bytes / 1024:.0f} KiB as {chosen} artifact, {sent}"

    steps = [Step(name="push", look=lambda: Finding.differs(f"push to {reference}"), change=change)]
    if file is None:
        steps.insert(0, _build_step(name, settings, made))
    recap = Play(f"push {reference}", steps).run(reporter=reporter)
    return recap, pushed[0] if pushed else None


def pull_artifact(reference: str, settings: Settings, *, output: str = "", insecure: Collection[str] = ()) -> Pulled:
    """Fetch and verify what a registry holds. Raises RegistryError and UsageError."""
    from wasilet.oci.push import pull, reference_named

    return pull(
        reference_named(reference),
        output=Path(output) if output else None,
        insecure=insecure,
        environ=settings.environ,
    )


def runnable(name: str, settings: Settings, *, reporter: Reporter) -> Path:
    """The module to run: a ``.wasm`` file as it is, or an app that is built first. Raises HarnessError."""
    file = module_file(name, settings)
    if file is not None:
        return file
    from wasilet.build.application import built_already

    built = built_already(find_app(name, environ=settings.environ), settings.environ)
    if built is None:
        recap, built = build_app(name, settings, reporter=reporter)
        recap.raise_for_failure()
    if built is None:
        raise HarnessError(f"{name} was not built")
    return built.module


def module_file(name: str, settings: Settings) -> Path | None:
    """The file, when a ``.wasm`` file was named; None when it was an app. Raises UsageError when it is not there."""
    if not name.endswith(".wasm"):
        return None
    file = Path(settings.environ.get("WASILET_INVOCATION_DIR") or Path.cwd()) / Path(name).expanduser()
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    return file


def cluster_registry(settings: Settings) -> str:
    """``host:port`` of the cluster's registry. Raises UsageError when the cluster was never up."""
    from wasilet.controlplane.local_registry import registry_address
    from wasilet.state import State

    port = State.of(settings).cluster.ports.get("registry")
    if not port:
        raise UsageError(
            f"cluster {settings.name!r} is not up, so there is no registry to push to",
            hint="`invoke up` brings it up; or name another registry with --to HOST/REPOSITORY:TAG",
        )
    return registry_address(int(port))


def _build_step(name: str, settings: Settings, made: list[Built], *, force: bool = False) -> Step:
    from wasilet.build.application import build, built_already

    app = find_app(name, environ=settings.environ)

    def look() -> Finding:
        found = None if force else built_already(app, settings.environ)
        if found is None:
            return Finding.differs("compile")
        made.append(found)
        return Finding.ok(str(found))

    def change(progress: Progress) -> str:
        made.append(build(app, say=progress, environ=settings.environ, force=force))
        return str(made[0])

    return Step(name="build", look=look, change=change)
