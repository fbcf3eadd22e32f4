"""The user that a process becomes which handles what a stranger made: a sandbox, or a compiler.

As root each becomes one that no other process of the machine is, so that nothing which goes by uid leads from one to
another, and a limit of processes and threads counts its own alone.
"""

FIRST_UID = 0x70000000
"""A process's own user is this plus its pid, as the supervisor and the agent know it, which no other process has
meanwhile: nothing to allocate, to remember or to give back. systemd's list of uids has the 268 million from here for
nobody, and pids end at 4 million."""

MAX_THREADS = 1024
"""Of one process that is a user of its own. The component host's own pool has 512 at most."""

MAX_USER_PROCESSES = 16384
"""Threads, of all processes of the user, elsewhere: the filter lets these start no process. The kernel does not hold
uid 0 to it."""
