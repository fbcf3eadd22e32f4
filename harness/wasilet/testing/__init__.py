"""What happens in a cluster, watched and judged: behind the pytest plugin and ``demo``.

The names below are for tests that say what their fixtures are: ``from wasilet.testing import AssertLogs, RunPod``. They
are imported when they are first asked for, since every pytest run imports this package, for the plugin.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wasilet.testing.cluster import WasmCluster
    from wasilet.testing.fixtures import Apply, AssertLogs, GetPod, Kubectl, RunPod, WasmApp
    from wasilet.testing.log_match import Text
    from wasilet.testing.merged_log import LogLines
    from wasilet.testing.test_namespace import Pod

__all__ = [
    "Apply",
    "AssertLogs",
    "GetPod",
    "Kubectl",
    "LogLines",
    "Pod",
    "RunPod",
    "Text",
    "WasmApp",
    "WasmCluster",
]

_PLACES = {
    "Apply": "fixtures",
    "AssertLogs": "fixtures",
    "GetPod": "fixtures",
    "Kubectl": "fixtures",
    "LogLines": "merged_log",
    "Pod": "test_namespace",
    "RunPod": "fixtures",
    "Text": "log_match",
    "WasmApp": "fixtures",
    "WasmCluster": "cluster",
}


def __getattr__(name: str) -> object:
    """Raises AttributeError for what is not exported."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
