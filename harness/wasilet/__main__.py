"""``python -P -m wasilet``, which ``run`` ends in: Invoke, with this project's tasks and its own manners."""

from __future__ import annotations

import sys

try:
    from wasilet.process_start import prepare_process

    prepare_process()

    from invoke import __version__

    from wasilet.terminal.program import TaskProgram
except KeyboardInterrupt:  # it takes a while to load
    sys.exit(130)


def main() -> None:
    """The command line."""
    names = ["invoke", "inv"]
    TaskProgram(name="Invoke", binary="inv[oke]", binary_names=names, version=__version__).run()


if __name__ == "__main__":
    main()
