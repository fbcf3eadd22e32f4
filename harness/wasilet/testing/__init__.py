"""What happens in a cluster, watched and judged: behind the pytest plugin and ``demo``.

The names below are for tests that say what their fixtures are: ``from wasilet.testing import AssertLogs, RunPod``. They
are imported when they are first asked for, since every pytest run imports this package, for the plugin.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wasilet.testing.cluster import WasmCluster
    from wasilet.testing.fixtures import (
        Apply,
        AssertHttp,
        AssertLogs,
        GetPod,
        HttpLoad,
        Kubectl,
        MakeService,
        RunPod,
        WasmApp,
    )
    from wasilet.testing.http import Answer
    from wasilet.testing.load import Load, LoadResult
    from wasilet.testing.log_match import Text
    from wasilet.testing.merged_log import LogLines
    from wasilet.testing.service import Service
    from wasilet.testing.test_namespace import Pod

__all__ = [
    "Answer",
    "Apply",
    "AssertHttp",
    "AssertLogs",
    "GetPod",
    "HttpLoad",
    "Kubectl",
    "Load",
    "LoadResult",
    "LogLines",
    "MakeService",
    "Pod",
    "RunPod",
    "Service",
    "Text",
    "WasmApp",
    "WasmCluster",
]

_PLACES = {
    "Answer": "http",
    "Apply": "fixtures",
    "AssertHttp": "fixtures",
    "AssertLogs": "fixtures",
    "GetPod": "fixtures",
    "HttpLoad": "fixtures",
    "Kubectl": "fixtures",
    "Load": "load",
    "LoadResult": "load",
    "LogLines": "merged_log",
    "MakeService": "fixtures",
    "Pod": "test_namespace",
    "RunPod": "fixtures",
    "Service": "service",
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
