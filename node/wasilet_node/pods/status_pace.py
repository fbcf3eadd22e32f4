"""When a status that may wait is sent: pods of one node share a pace for what is about to be out of date.

"Being created", and the generation that was seen of a pod that is being deleted, are followed within milliseconds by a
status that says more. Each patch costs the API server as much as the pod's creation did, so in a burst of pods these
were half of all its work. They are held back: a moment when the node has little to do, longer the more of them there
are, as kubelet's single status writer holds them back. What a container did is never held back.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_SECONDS = 0.25
"""Most wasm containers run before this; a person does not see that it was left out."""

SPACING_SECONDS = 0.1
LONGEST_SECONDS = 5.0


class StatusPace:
    """Hands out moments, one after another."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock``: monotonic seconds."""
        self._clock = clock
        self._next = clock()

    def delay_seconds(self) -> float:
        """How long one more status is to wait. Those that will not have to are not known, so no moment is given
        back: the longest wait is what bounds it."""
        now = self._clock()
        at = min(max(self._next, now + FIRST_SECONDS), now + LONGEST_SECONDS)
        self._next = at + SPACING_SECONDS
        return at - now
