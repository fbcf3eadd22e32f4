"""``invoke demo``: an app from its source to an asserted log line in a cluster, as an ordered list of steps.

Read :func:`steps`. Each looks first and says ok when nothing had to be done, so a demo on a running cluster, built
already, is little more than the wait for the log. Jinja2, oras and wasmtime are imported by the step that needs them.

What a demo applied stays, so that its log can be read with kubectl; ``--remove`` takes it away again, and running it
again replaces it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wasilet.apps.samples import App, Expectation, find_app, sample_names
from wasilet.errors import ApiError, HarnessError, UsageError
from wasilet.providers.base import Cluster
from wasilet.settings import Settings, checked_name
from wasilet.steps import Finding, Play, Progress, Recap, Step

if TYPE_CHECKING:
    from wasilet.build.application import Built
    from wasilet.demo.expect import Seen
    from wasilet.kube.client import KubeObject
    from wasilet.oci.artifact import Artifact
    from wasilet.steps import Reporter

DEFAULT_NAMESPACE = "default"
TAG = "latest"
SHOWN_LOG_LINES = 20


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What a person may choose."""

    namespace: str = DEFAULT_NAMESPACE
    layout: str = "cncf"
    private: bool = False
    """Push to a registry with a login, and pull with a pull secret."""


@dataclass(kw_only=True)
class Run:
    """One demo's way from source to log: what its steps hand on."""

    app: App
    cluster: Cluster
    options: DemoOptions
    variables: dict[str, Any] = field(default_factory=dict)
    built: Built | None = None
    artifact: Artifact | None = None
    registry: str = ""
    push_environ: Mapping[str, str] = field(default_factory=dict)
    objects: list[KubeObject] = field(default_factory=list)
    """What is applied besides the app's own: the pull secret."""

    seen: dict[str, Seen] = field(default_factory=dict)
    """By ``pod/x``."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """How a demo went."""

    recap: Recap
    image: str
    logs: dict[str, Sequence[str]]
    """By ``pod/x``; of a Service the answers."""

    next: tuple[str, ...]
    """Commands to type now."""

    def to_json(self) -> dict[str, Any]:
        """What ``--output json`` prints."""
        return {
            **self.recap.to_json(),
            "image": self.image,
            "logs": {name: list(lines) for name, lines in self.logs.items()},
            "next": list(self.next),
        }


def demo(name: str, settings: Settings, *, options: DemoOptions, reporter: Reporter) -> DemoResult:
    """Run the demo of an app, standing the cluster up first when it is not running.

    Raises UsageError before anything is changed when the app or its ``demo.yaml`` makes no sense; HarnessError when
    the cluster cannot be had. A failed step is in the recap.
    """
    from wasilet.apps.render import render
    from wasilet.cluster.up import bring_services

    app = find_app(name, environ=settings.environ)
    checked_name(options.namespace, what="namespace")
    if not app.demo.expect:
        raise UsageError(
            f"{app.name} has no demo", hint=f"{app.folder / 'demo.yaml'} would say what is applied and asserted"
        )
    render(app, {}, lenient=True)
    if not is_running(settings):
        from wasilet.oci.publish import build_app

        # What does not compile, or has no compiler, needs no cluster to report it.
        built, _ = build_app(name, settings, reporter=reporter)
        if not built.succeeded:
            return DemoResult(recap=built, image="", logs={}, next=())
    with running_cluster(settings, reporter=reporter) as cluster:
        run = Run(app=app, cluster=cluster, options=options, push_environ=settings.environ)
        recap = Play(f"demo {app.name}", steps(run)).run(reporter=reporter)
        bring_services(cluster, reporter=reporter)
    return DemoResult(
        recap=recap,
        image=str(run.variables.get("image", "")),
        logs={name: seen.lines for name, seen in run.seen.items()},
        next=_next(run) if recap.succeeded else (),
    )


def remove(name: str, settings: Settings, *, options: DemoOptions) -> list[str]:
    """Delete what the demo of an app applied; the names of what is gone. Raises UsageError when no cluster runs."""
    from wasilet.apps.render import render
    from wasilet.cluster.opening import open_cluster
    from wasilet.kube.resources import Resources

    app = find_app(name, environ=settings.environ)
    objects = [_named_secret(app), *render(app, {}, lenient=True)]
    with open_cluster(settings) as cluster:
        return Resources(cluster.admin(), options.namespace).remove(objects)


def _named_secret(app: App) -> KubeObject:
    """The pull secret of a ``--private`` run; it is removed only if such a run made it."""
    from wasilet.demo.demo_services import pull_secret_name

    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": pull_secret_name(app.name)}}


def is_running(settings: Settings) -> bool:
    """Whether the cluster is there and pods can start in it."""
    from wasilet.cluster.opening import open_cluster
    from wasilet.cluster.readiness import missing_for_pods

    with open_cluster(settings) as cluster:
        try:
            return cluster.state.exists() and not missing_for_pods(cluster.admin(), cluster.node_names())
        except (ApiError, UsageError):
            return False


def running_cluster(settings: Settings, *, reporter: Reporter) -> Cluster:
    """The cluster, started when it is not there or not ready. Raises HarnessError when that fails."""
    from wasilet.cluster.opening import open_cluster
    from wasilet.cluster.up import up

    if not is_running(settings):
        up(settings, reporter=reporter, services=False).raise_for_failure()
    return open_cluster(settings)


def steps(run: Run) -> list[Step]:
    """The table of contents."""
    return [
        *(_service_step(run, name) for name in run.app.demo.services),
        _build_step(run),
        *([_component_host_step(run)] if _asks_http(run.app) else []),
        *([_local_step(run)] if run.app.demo.local is not None else []),
        _registry_step(run),
        _push_step(run),
        _apply_step(run),
        *(_expect_step(run, expectation) for expectation in run.app.demo.expect),
    ]


def _service_step(run: Run, name: str) -> Step:
    from wasilet.demo.demo_services import start

    def change(progress: Progress) -> str:
        brought = start(name, run.cluster, say=progress, environ=run.cluster.settings.environ)
        run.variables |= brought
        return ", ".join(f"{value}" for key, value in brought.items() if key.endswith("_url"))

    return Step(name=name, look=lambda: Finding.differs("have it running"), change=change)


def _build_step(run: Run) -> Step:
    from wasilet.build.application import build, built_already

    environ = run.cluster.settings.environ

    def look() -> Finding:
        run.built = built_already(run.app, environ)
        return Finding.ok(str(run.built)) if run.built else Finding.differs("compile")

    def change(progress: Progress) -> str:
        run.built = build(run.app, say=progress, environ=environ)
        return str(run.built)

    return Step(name="build", look=look, change=change)


def _asks_http(app: App) -> bool:
    return bool(app.demo.local and app.demo.local.http) or any(expected.http for expected in app.demo.expect)


def _component_host_step(run: Run) -> Step:
    """What answers HTTP is run by the component host, which a node finds but never builds."""
    from wasilet.build.component_host import ensure_component_host, found_component_host

    environ = run.cluster.settings.environ

    def look() -> Finding:
        found = found_component_host(environ)
        return Finding.ok(str(found)) if found else Finding.differs("build it, once")

    return Step(name="component host", look=look, change=lambda progress: str(ensure_component_host(progress, environ)))


def _local_step(run: Run) -> Step:
    """Skipped when this very module has passed this very check before."""
    from wasilet.apps.render import render_text
    from wasilet.apps.samples import LocalSpec
    from wasilet.build.application import workspace
    from wasilet.storage import read_json, write_json

    environ = run.cluster.settings.environ
    record = workspace(run.app, environ) / "checked.json"

    def spec() -> LocalSpec:
        from dataclasses import replace

        local = run.app.demo.local
        if local is None:
            raise HarnessError("no local check is described")
        return replace(
            local,
            env={name: render_text(value, run.variables) for name, value in local.env.items()},
            allow=tuple(render_text(origin, run.variables) for origin in local.allow),
        )

    def key() -> str:
        return hashlib.sha256(f"{_built(run).digest} {run.app.demo.local!r}".encode()).hexdigest()

    def look() -> Finding:
        if read_json(record).get("key") == key():
            return Finding.ok("this module has passed before")
        return Finding.differs("run the module in the node's sandbox, here")

    def change(progress: Progress) -> str:
        from wasilet.demo.local_run import check

        seen = check(_built(run).module, spec(), say=progress, environ=environ)
        write_json(record, {"key": key()})
        return seen

    return Step(name="local run", look=look, change=change)


def _registry_step(run: Run) -> Step:
    from wasilet.oci.publish import cluster_registry

    def look() -> Finding:
        if run.options.private:
            return Finding.differs("have a registry with a login running")
        run.registry = cluster_registry(run.cluster.settings)
        return Finding.ok(run.registry)

    def change(progress: Progress) -> str:
        from wasilet.demo.demo_services import private_registry

        run.registry, run.push_environ, secret = private_registry(run.cluster, run.app.name, say=progress)
        run.objects.append(secret)
        return f"{run.registry}, with a login"

    return Step(name="registry", look=look, change=change)


def _push_step(run: Run) -> Step:
    def look() -> Finding:
        from wasilet.oci.artifact import layout_named, make_artifact
        from wasilet.oci.push import holds, reference_named

        run.artifact = make_artifact(_built(run).module, layout=layout_named(run.options.layout))
        reference = reference_named(f"{run.registry}/{run.app.name}:{TAG}")
        run.variables["image"] = f"{reference.name}:{TAG}@{run.artifact.digest}"
        if not run.options.private and holds(run.artifact, reference, environ=run.push_environ):
            return Finding.ok(f"{reference.name}:{TAG} is there")
        return Finding.differs(f"push to {reference.name}:{TAG}")

    def change(_: Progress) -> str:
        from wasilet.oci.push import push, reference_named

        if run.artifact is None:
            raise HarnessError("there is no artifact to push")
        pushed = push(run.artifact, reference_named(f"{run.registry}/{run.app.name}:{TAG}"), environ=run.push_environ)
        return f"{pushed.reference.name}:{TAG}, {pushed.size_bytes / 1024:.0f} KiB"

    return Step(name="push", look=look, change=change)


def _apply_step(run: Run) -> Step:
    from wasilet.apps.render import add_pull_secret, place, render
    from wasilet.kube.resources import Resources

    def change(_: Progress) -> str:
        objects = [*run.objects, *render(run.app, {"namespace": run.options.namespace, **run.variables})]
        for secret in run.objects:
            add_pull_secret(objects, secret["metadata"]["name"])
        if run.cluster.provider.name != "host" or run.cluster.taints():
            place(objects)
        return ", ".join(Resources(run.cluster.admin(), run.options.namespace).apply(objects))

    return Step(name="apply", look=lambda: Finding.differs("apply the manifests"), change=change)


def _expect_step(run: Run, expectation: Expectation) -> Step:
    def change(progress: Progress) -> str:
        from wasilet.controlplane import pod_network
        from wasilet.demo.expect import wait_for
        from wasilet.demo.http_check import wait_for_answers

        kube, namespace = run.cluster.admin(), run.options.namespace
        if expectation.service:
            keeper = pod_network.keeper_of(run.cluster.state)
            seen = wait_for_answers(kube, expectation, namespace=namespace, say=progress, keeper=keeper)
        else:
            seen = wait_for(kube, expectation, namespace=namespace, say=progress)
        run.seen[expectation.title] = seen
        return f"as expected after {seen.seconds:.2f} s"

    return Step(
        name=f"expect {expectation.title}",
        look=lambda: Finding.differs("wait for what it promises"),
        change=change,
    )


def _built(run: Run) -> Built:
    if run.built is None:
        raise HarnessError("there is no module yet")
    return run.built


def _next(run: Run) -> tuple[str, ...]:
    """The app's own commands, made to work as they are: with the namespace, and with a kubectl that is there."""
    from wasilet.apps.render import render_text

    environ = run.cluster.settings.environ
    namespace = "" if run.options.namespace == DEFAULT_NAMESPACE else f" -n {run.options.namespace}"
    name = "" if run.cluster.settings.name == "wasilet" else f" --name {run.cluster.settings.name}"
    own = "kubectl" if shutil.which("kubectl", path=environ.get("PATH")) else f"invoke kubectl{name} --"
    commands = [render_text(command, run.variables) for command in run.app.demo.next]
    commands.append("kubectl get pods")
    typed = [
        own + command.removeprefix("kubectl") + namespace for command in commands if command.startswith("kubectl ")
    ]
    given = run.app.name if run.app.is_sample else str(run.app.folder)
    where = f" --namespace {run.options.namespace}" if namespace else ""
    return (*typed, f"invoke demo {given}{name}{where} --remove")


def demo_lines() -> list[str]:
    """The samples that have a demo, each with its description."""
    names = sample_names()
    width = max((len(name) for name in names), default=0)
    return [f"{name:<{width}}  {find_app(name).demo.description}" for name in names]


def log_lines(result: DemoResult) -> list[str]:
    """The end of each log, under its object's name when there are several."""
    lines: list[str] = []
    for name, log in result.logs.items():
        if len(result.logs) > 1 and log:
            lines.append(f"{name}:")
        lines += log[-SHOWN_LOG_LINES:]
    return lines


def next_text(result: DemoResult) -> str:
    """What to type now, for people; empty after a failure."""
    if not result.next:
        return ""
    return "now type:\n" + "".join(f"  {command}\n" for command in result.next)


def result_json(result: DemoResult) -> str:
    """One line for ``--output json``."""
    return json.dumps(result.to_json())
