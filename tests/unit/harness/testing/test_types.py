"""What a user's type checker sees of the plugin, and what the package exports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import wasilet.testing

pytestmark = pytest.mark.unit

MYPY_LIMIT_SECONDS = 400
RIGHT = """
import re

from wasilet.testing import Apply, AssertLogs, GetPod, Kubectl, LogLines, Pod, RunPod, Text, WasmApp, WasmCluster


def test_it(
    cluster: WasmCluster,
    wasm_app: WasmApp,
    run_pod: RunPod,
    apply: Apply,
    get_pod: GetPod,
    assert_logs: AssertLogs,
    kubectl: Kubectl,
    namespace: str,
) -> None:
    pod: Pod = run_pod(wasm_app("hello-world"), env={"NAME": 1}, args=("a",), spec={"hostname": "x"})
    lines: LogLines = assert_logs(pod, contains="ready", in_order=["a", re.compile("b")], within_seconds=3)
    wanted: Text = "x"
    assert lines[-1].startswith("x") and wanted in lines and list(lines[:2]) == ["x", "y"]
    code: int = pod.wait_finished()
    assert code == 0 and get_pod("other").phase == "Running" and cluster.server
    apply("pod.yaml.j2", text=namespace)
    assert "pod" in kubectl("get", "pods", check=False)
"""
WRONG = {
    'run_pod("image", enviroment={})': "call-arg",
    'run_pod("image", env=["A=1"])': "arg-type",
    "run_pod()": "call-arg",
    'assert_logs("pod", contain="x")': "call-arg",
    'assert_logs("pod", within_seconds="3")': "arg-type",
    'assert_logs(1, contains="x")': "arg-type",
    'get_pod("x").wait_finished().upper()': "attr-defined",
    'get_pod("x", within=3)': "call-arg",
    "wasm_app(3)": "arg-type",
    'kubectl("get", check="no")': "arg-type",
}


def test_every_exported_name_is_there_and_no_other() -> None:
    for name in wasilet.testing.__all__:
        assert getattr(wasilet.testing, name) is not None
    assert sorted(wasilet.testing.__all__) == sorted(wasilet.testing._PLACES)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = wasilet.testing.Nonsense


def test_a_users_tests_are_checked_by_mypy_strict(tmp_path: Path) -> None:
    """From a folder of the user's own: the package must be found, and known to be typed."""
    calls = "\n".join(f"    {call}" for call in WRONG)
    (tmp_path / "test_wrong.py").write_text(
        "from wasilet.testing import AssertLogs, GetPod, Kubectl, RunPod, WasmApp\n\n\n"
        "def test_it(run_pod: RunPod, assert_logs: AssertLogs, get_pod: GetPod, wasm_app: WasmApp, kubectl: Kubectl) "
        f"-> None:\n{calls}\n"
    )
    (tmp_path / "test_right.py").write_text(RIGHT)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mypy", "--strict", "test_right.py", "test_wrong.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=MYPY_LIMIT_SECONDS, check=False,
    )  # fmt: skip
    found = dict(re.findall(r"(?m)^test_wrong\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout))
    assert found == {str(number): code for number, code in enumerate(WRONG.values(), 5)}, done.stdout + done.stderr
    assert "test_right.py" not in done.stdout
