"""The command ``wasilet``, and what ``run`` ends in (``python -P -m wasilet``): Invoke with Wasilet's tasks.

In the folder of the sources Invoke loads their ``tasks.py`` and ``invoke.yaml``, as plain ``invoke`` does; anywhere
else the tasks are the package's, whatever ``tasks.py`` lies about there.
"""

from __future__ import annotations

import sys

try:
    from wasilet_common.process_start import prepare_process

    prepare_process()

    from invoke import __version__ as invoke_version
    from invoke.collection import Collection

    from wasilet import __version__
    from wasilet.terminal.program import TaskProgram, in_checkout
except KeyboardInterrupt:  # it takes a while to load
    sys.exit(130)


def main() -> None:
    """The command line."""
    if in_checkout():
        names = ["invoke", "inv"]
        TaskProgram(name="Invoke", binary="inv[oke]", binary_names=names, version=invoke_version).run()
    else:
        from wasilet import tasks

        wasilet = Collection.from_module(tasks)
        TaskProgram(name="Wasilet", binary="wasilet", version=__version__, namespace=wasilet).run()


if __name__ == "__main__":
    main()
