"""The tasks for apps: made, built, pushed, run, and taken to a log line in a cluster."""

from __future__ import annotations

import sys

from invoke.context import Context
from invoke.tasks import task

from wasilet.settings import invocation_path
from wasilet.tasks.help_texts import APP_HELP, NAME_HELP, OUTPUT_HELP
from wasilet.terminal.cli import (
    checked_output,
    command,
    emit,
    finish,
    finish_with,
    remainder,
    reporter,
    settings_of,
)


@task(
    positional=["app"],
    auto_shortflags=False,
    help={"app": APP_HELP, "force": "even if nothing changed", "output": OUTPUT_HELP},
)
@command
def build(c: Context, app: str, force: bool = False, output: str = "text") -> None:
    """Compile an app to a wasm module, in release.

    Prints the module's path. Rust, C, AssemblyScript or Python: what the folder holds decides.

    Examples:
      invoke build hello-world        a sample of this project
      invoke build ./my-app           a folder of yours
    """
    from wasilet.oci.publish import build_app

    checked_output(output)
    recap, built = build_app(app, settings_of(c), reporter=reporter(), force=force)
    finish(recap, output=output)
    if built is not None and output == "text":
        emit(str(built.module))


@task(
    positional=["app"],
    auto_shortflags=False,
    iterable=["insecure"],
    help={
        "app": APP_HELP + "; or a .wasm file",
        "to": "registry/repository:tag (default: the cluster's registry, the app's name, latest)",
        "layout": "cncf (default), krustlet, runwasi or image",
        "insecure": "host:port of a registry that speaks plain HTTP; loopback always may; repeatable",
        "name": NAME_HELP,
        "output": OUTPUT_HELP,
    },
)
@command
def push(
    c: Context,
    app: str,
    to: str = "",
    layout: str = "cncf",
    insecure: list[str] | None = None,
    name: str = "",
    output: str = "text",
) -> None:
    """Build an app and push it to a registry as an OCI artifact.

    The last line on stdout is reference@digest, ready for a manifest's image. Logins are docker's.

    Examples:
      invoke push hello-world
      invoke push ./my-app --to registry.example/cats/my-app:v1
      invoke push hello-world --layout krustlet
    """
    from wasilet.oci.publish import push_app

    checked_output(output)
    settings = settings_of(c, name=name)
    recap, pushed = push_app(app, settings, reporter=reporter(), to=to, layout=layout, insecure=insecure or ())
    finish(recap, output=output)
    if pushed is not None and output == "text":
        emit(pushed.pinned)


@task(
    positional=["reference"],
    auto_shortflags=False,
    iterable=["insecure"],
    help={
        "reference": "registry/repository:tag, or @sha256:...",
        "file": "write the wasm module there",
        "insecure": "host:port of a registry that speaks plain HTTP; loopback always may; repeatable",
    },
)
@command
def pull(c: Context, reference: str, file: str = "", insecure: list[str] | None = None) -> None:
    """Fetch an artifact, verify every digest and size, and print what it is.

    Examples:
      invoke pull localhost:5000/hello-world:latest
      invoke pull localhost:5000/hello-world:latest --file hello.wasm
    """
    from wasilet.oci.publish import pull_artifact

    output = invocation_path(file) if file else ""
    for line in pull_artifact(reference, settings_of(c), output=output, insecure=insecure or ()).lines():
        emit(line)


@task(
    positional=["app"],
    auto_shortflags=False,
    iterable=["e", "dir", "allow"],
    help={
        "app": APP_HELP + "; or a .wasm file",
        "e": "NAME=VALUE for the module's environment, or NAME to pass on yours; repeatable",
        "dir": "HOST::GUEST, a folder that the module gets (HOST::GUEST::ro: only to read); repeatable",
        "allow": "an origin that it may ask over HTTP, as https://api.example; repeatable",
        "port": "where a component that answers HTTP listens, on loopback (default: 8080; 0: any that is free)",
    },
)
@command
def run(
    c: Context,
    app: str,
    e: list[str] | None = None,
    dir: list[str] | None = None,  # noqa: A002
    allow: list[str] | None = None,
    port: int = 8080,
) -> None:
    """Run a module here, in the node's own sandbox, without a cluster.

    What follows -- are the module's arguments; its exit code is the task's (134 for a trap). A component that answers
    HTTP requests is served until Ctrl-C; its URL is printed.

    Examples:
      invoke run hello-world -e INTERVAL_SECONDS=1
      invoke run cat-facts -e RUST_LOG=info --allow https://catfact.ninja
      invoke run ./tool.wasm --dir .::/work -- --help
      invoke run http-rust --dir /tmp::/data
    """
    from wasilet.build.component_host import bring_component_host
    from wasilet.demo.local_run import make_spec
    from wasilet.demo.local_run import run as run_module
    from wasilet.oci.publish import runnable

    settings = settings_of(c)
    module = runnable(app, settings, reporter=reporter())
    spec = make_spec(
        module,
        args=remainder(),
        env=e or (),
        dirs=dir or (),
        allow=allow or (),
        port=port,
        environ=settings.environ,
    )
    bring_component_host(module, settings.environ, say=reporter().notice)
    finish_with(run_module(spec, environ=settings.environ))


@task(
    positional=["app"],
    auto_shortflags=False,
    help={
        "app": APP_HELP + "; see `invoke samples`",
        "name": NAME_HELP,
        "namespace": "where it is applied (default: default)",
        "layout": "how the artifact is laid out; see `invoke push --help`",
        "private": "push to a registry with a login, and pull with a pull secret",
        "remove": "delete what the demo applied",
        "output": OUTPUT_HELP,
    },
)
@command
def demo(
    c: Context,
    app: str,
    name: str = "",
    namespace: str = "default",
    layout: str = "cncf",
    private: bool = False,
    remove: bool = False,
    output: str = "text",
) -> None:
    """Take an app from its source to an asserted log line in a cluster.

    Builds it, runs it here, pushes it, applies its manifests, waits for what its demo.yaml promises, and prints what
    to type next. Creates a cluster when none runs. What it applied stays until --remove.

    Examples:
      invoke demo hello-world
      invoke demo cat-facts --private     by a registry with a login
      invoke demo hello-world --remove
    """
    from wasilet.demo import demo as apps

    checked_output(output)
    settings = settings_of(c, name=name)
    options = apps.DemoOptions(namespace=namespace, layout=layout, private=private)
    if remove:
        for gone in apps.remove(app, settings, options=options):
            emit(f"{gone} removed")
        return
    result = apps.demo(app, settings, options=options, reporter=reporter())
    for line in [apps.result_json(result)] if output == "json" else apps.log_lines(result):
        emit(line)
    sys.stderr.write(apps.next_text(result) if output == "text" else "")
    finish(result.recap)


@task
@command
def samples(c: Context) -> None:
    """List the samples, each of which has a demo.

    Example:
      invoke samples                  then: invoke demo hello-world
    """
    from wasilet.demo.demo import demo_lines

    for line in demo_lines():
        emit(line)


@task(
    positional=["app"],
    auto_shortflags=False,
    help={
        "app": "the app's name: a folder of that name is made here",
        "folder": "where to make it (default: here)",
        "template": "command (default), or a service that answers HTTP: http-rust, http-python or http-js",
    },
)
@command
def new(c: Context, app: str, folder: str = "", template: str = "command") -> None:
    """Start an app of your own from a template, with its test.

    Examples:
      invoke new my-app                 then: invoke demo ./my-app, and: pytest ./my-app
      invoke new my-web --template http-rust
    """
    from wasilet.apps.new_app import new_app

    for line in new_app(app, invocation_path(folder or "."), template=template):
        emit(line)
