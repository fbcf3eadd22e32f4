"""The tasks of ``invoke`` in this checkout: Wasilet's own (``harness/wasilet/tasks``), which an installed Wasilet
has as the command ``wasilet``, and those of its developers (``dev/wasilet_dev/tasks.py``)."""

from wasilet.tasks import *
from wasilet_dev.tasks import *
