"""``wasilet-node``: the agent, and ``wasilet-node shutdown``.

Nothing heavy is imported before the command line is known to be right, so ``--help`` and a mistake answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence

from wasilet_common.process_start import prepare_process, silence_stdout

from wasilet_node import __version__
from wasilet_node.command_parser import UsageError
from wasilet_node.commandline import ComponentHostCommand, RunCommand, parse, terminal_error

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """The exit code: 0 ended by a signal, 1 failed, 2 wrong usage."""
    try:
        command = parse(arguments, environ, version=f"wasilet {__version__}")
    except UsageError as error:
        terminal_error(f"{error}; see --help")
        return EXIT_USAGE
    configure_logging(command.log_level)
    if isinstance(command, RunCommand):
        from wasilet_node.agent_process import run_agent
        from wasilet_node.instance import InstanceError

        try:
            return run_agent(command.settings, kubeconfig_copy=command.kubeconfig, version=__version__)
        except InstanceError as error:
            terminal_error(str(error))
            return EXIT_USAGE
        except OSError as error:
            terminal_error(f"{command.settings.paths.data}: {error.strerror or error}")
            return EXIT_FAILED
    if isinstance(command, ComponentHostCommand):
        return component_host(check=command.check)
    from wasilet_node.shutdown import shutdown

    return shutdown(command.data, timeout_seconds=command.timeout_seconds)


def component_host(*, check: bool) -> int:
    """Its path on stdout, progress on stderr."""
    from wasilet_node.runtime.component_host import build, locate
    from wasilet_node.runtime.component_host.library import HostUnavailableError

    try:
        path = locate.load().path if check else build.ensure(say=lambda text: print(text, file=sys.stderr))  # noqa: T201
    except HostUnavailableError as error:
        terminal_error(str(error))
        return EXIT_FAILED
    print(path)  # noqa: T201
    return 0


def configure_logging(level: str) -> None:
    """One line per message on stderr, UTC time stamps with milliseconds."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Chatty below warnings, and what they log is logged better by their callers.
    for name in ("asyncio", "aiohttp", "urllib3", "kubernetes"):
        logging.getLogger(name).setLevel(logging.WARNING)


def command() -> None:
    """The command ``wasilet-node``."""
    prepare_process()
    try:
        try:
            code = main(sys.argv[1:], os.environ)
        finally:
            # What a full device does not take of --help is known now, not when Python ends.
            sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        code = 0
    except OSError as error:
        silence_stdout()
        terminal_error(f"cannot write to stdout: {error.strerror or error}")
        code = EXIT_USAGE
    sys.exit(code)


if __name__ == "__main__":
    command()
