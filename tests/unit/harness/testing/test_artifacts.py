"""What the plugin keeps of a test that failed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from wasilet.testing.artifacts import gather

from tests.unit.harness.fake_kube import FakeKube, pods_of

pytestmark = pytest.mark.unit

NAME = "n" * 253
POD: Any = {
    "metadata": {"name": NAME, "namespace": "default"},
    "status": {
        "containerStatuses": [
            {"name": "c" * 63, "state": {"running": {}}, "lastState": {"terminated": {"exitCode": 1}}}
        ]
    },
}


def test_what_the_plugin_keeps_of_a_pod_with_the_longest_name_is_all_there(tmp_path: Path) -> None:
    kube = FakeKube()
    kube.show(pods_of("default"), POD)
    kube.objects["/version"] = {"gitVersion": "v1"}
    kube.logs = {NAME: ["a line"], f"{NAME} previous": ["a line"]}
    cluster = SimpleNamespace(kube=kube, node_logs={}, name="c", provider="host", server="https://s", registry=None)
    folder = gather(cast("Any", SimpleNamespace(cluster=cluster, namespace="default")), tmp_path, "t", "report")
    assert not (folder / "problems.txt").exists()
    assert len(list((folder / "pods").iterdir())) == 1
    assert sorted(file.read_text() for file in (folder / "logs").iterdir()) == ["a line\n", "a line\n"]
