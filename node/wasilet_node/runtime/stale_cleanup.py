"""What supervisors leave behind when they are killed, and how it is told apart from what is still in use.

A pointer names its process by pid and start time, so a dead one is known for sure; its control groups are emptied and
removed. A socket without a pointer is of a supervisor that was killed before it had announced itself.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from wasilet_node.runtime import linux, supervisor_registry
from wasilet_node.runtime.cgroups import remove_tree


def remove_traces_of_the_dead(data: Path) -> None:
    """Pointers, sockets and control groups of supervisors that ended without putting them away. Never raises OSError.

    Not while another supervisor of this folder is being started (``supervisor.lock``).
    """
    announced = set()
    for _, pointer in list(supervisor_registry.pointers(data)):
        if pointer.alive():
            announced.add(pointer.pid)
            continue
        for group in pointer.cgroups:
            remove_tree(Path(group))
        supervisor_registry.withdraw(data, pointer)
    for path in (data / supervisor_registry.FOLDER_NAME).glob("*.sock"):
        if path.stem.isdecimal() and int(path.stem) not in announced and linux.start_time(int(path.stem)) is None:
            with contextlib.suppress(OSError):
                path.unlink()
