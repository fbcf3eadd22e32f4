"""The tasks for the person at this machine: what happens, what is missing, what the shell completes."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context
from invoke.tasks import task

from wasilet.settings import invocation_path
from wasilet.tasks.help_texts import NAME_HELP, OUTPUT_HELP
from wasilet.terminal.cli import (
    checked_output,
    command,
    emit,
    emit_json,
    finish,
    finish_with,
    reporter,
    settings_of,
)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "app": "run the demo of this app and report on it (a sample's name or a folder)",
        "namespace": "whose pods (default: default)",
        "file": "where the page goes (default: wasilet-report.html)",
        "name": NAME_HELP,
    },
)
@command
def report(
    c: Context, app: str = "", namespace: str = "default", file: str = "wasilet-report.html", name: str = ""
) -> None:
    """Write an HTML page of what pods did: timeline, events and logs.

    One file that needs nothing else. For a test run: pytest --wasilet-report FILE.

    Examples:
      invoke report                        of the pods in namespace default, as they are now
      invoke report --app hello-world      of a demo, which is run for it
    """
    from wasilet.terminal.report import write_report

    written = write_report(
        settings_of(c, name=name),
        app=app,
        namespace=namespace,
        file=Path(invocation_path(file)),
        reporter=reporter(),
    )
    emit(str(written.file))
    if written.recap is not None:
        finish(written.recap)


@task(help={"name": NAME_HELP, "namespace": "only pods of this namespace (default: all)"})
@command
def ui(c: Context, name: str = "", namespace: str = "") -> None:
    """Show nodes, pods, events and logs live, in this terminal.

    Keys: up and down (or k and j) choose a pod, g and G the first and last, q leaves.

    Examples:
      invoke ui
      invoke ui --namespace default
    """
    from wasilet.terminal.ui import show

    show(settings_of(c, name=name), namespace=namespace)


@task(
    auto_shortflags=False,
    help={"shell": "bash, zsh or fish", "program": "what is typed: invoke (default), inv or ./run"},
)
@command
def completion(c: Context, shell: str, program: str = "invoke") -> None:
    """Print what makes a shell complete tasks, options, samples and folders.

    Examples:
      source <(invoke completion bash)                     for this shell
      invoke completion bash >> ~/.bash_completion         for every new one
      source <(./run completion bash --program ./run)
    """
    from wasilet.terminal.completion import script

    emit(script(shell, program))


@task(help={"output": OUTPUT_HELP})
@command
def doctor(c: Context, output: str = "text") -> None:
    """Show what this machine has, and what brings the rest.

    Ends with exit code 2 when something that `up` or the demos need is missing.

    Examples:
      invoke doctor
      invoke doctor --output json | jq '.[] | select(.status == "missing")'
    """
    from wasilet.doctor import check_lines, is_fit
    from wasilet.doctor import doctor as examine

    checked_output(output)
    checks = examine(settings_of(c))
    if output == "json":
        emit_json([check.to_json() for check in checks])
    else:
        for line in check_lines(checks):
            emit(line)
    finish_with(0 if is_fit(checks) else 2)
