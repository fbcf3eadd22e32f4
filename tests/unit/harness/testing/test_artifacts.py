"""What the plugin keeps of a test that failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from wasilet.testing.artifacts import gather

pytestmark = pytest.mark.unit

POD: Any = {
    "metadata": {"name": "n" * 253, "namespace": "default"},
    "status": {
        "containerStatuses": [
            {"name": "c" * 63, "state": {"running": {}}, "lastState": {"terminated": {"exitCode": 1}}}
        ]
    },
}


class FakeKube:
    """One pod of the longest name, which ran twice."""

    def get(self, path: str, **_query: Any) -> Any:
        return {"items": [POD] if path.endswith("/pods") else [], "gitVersion": "v1"}

    def stream(self, path: str, **_query: Any) -> Any:
        return self

    def __enter__(self) -> list[str]:
        return ["a line"]

    def __exit__(self, *_: object) -> None:
        pass


def test_what_the_plugin_keeps_of_a_pod_with_the_longest_name_is_all_there(tmp_path: Path) -> None:
    cluster = SimpleNamespace(
        kube=FakeKube(), node_logs={}, name="c", provider="host", server="https://s", registry=None
    )
    folder = gather(cast("Any", SimpleNamespace(cluster=cluster, namespace="default")), tmp_path, "t", "report")
    assert not (folder / "problems.txt").exists()
    assert len(list((folder / "pods").iterdir())) == 1
    assert sorted(file.read_text() for file in (folder / "logs").iterdir()) == ["a line\n", "a line\n"]
