"""What a pod's worker decides, case by case (``cases/pods/*.yaml``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from wasilet_common import pod_fields
from wasilet_node.pods.plan import make_plan
from wasilet_node.pods.results import ProbeKind, ProbeResults, Result
from wasilet_node.pods.status import get_phase
from wasilet_node.runtime.protocol import ContainerStatus

from tests.unit.node.pods.fakes import make_instance

pytestmark = pytest.mark.unit

FORMER, RESET = " former", " reset"
CASES = Path(__file__).parent / "cases"


def load(name: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in yaml.safe_load((CASES / name).read_text())]


def containers(listed: list[Any]) -> list[dict[str, Any]]:
    return [{"image": "i", **(each if isinstance(each, dict) else {"name": each})} for each in listed]


def pod_of(written: dict[str, Any]) -> dict[str, Any]:
    return {
        "metadata": {"name": "a", "namespace": "default", "uid": "uid-a"},
        "spec": {
            "restartPolicy": written.get("restartPolicy", "Always"),
            "containers": containers(written["containers"]),
            "initContainers": containers(written.get("init", [])),
            "ephemeralContainers": containers(written.get("ephemeral", [])),
        },
    }


def instance_of(name: str, text: str) -> ContainerStatus:
    words = text.removesuffix(FORMER).removesuffix(RESET).split()
    image = "i"
    if words[-1].startswith("image="):
        image = words.pop().removeprefix("image=")
    code = int(words[1]) if len(words) > 1 else None
    return make_instance(name, state=words[0], exit_code=code, image=image, id=name)


@pytest.mark.parametrize("case", load("plan.yaml"))
def test_plan(case: dict[str, Any]) -> None:
    results = ProbeResults()
    for name, kinds in case.get("probes", {}).items():
        for kind, result in kinds.items():
            results.by_instance[name, ProbeKind(kind)] = Result(result)
    plan = make_plan(
        pod_of(case["pod"]),
        {name: instance_of(name, text) for name, text in case.get("instances", {}).items()},
        results,
        lambda container, _instance: float(case.get("backoff", {}).get(container["name"], 0)),
        former={name for name, text in case.get("instances", {}).items() if text.endswith(FORMER)},
        reset={name for name, text in case.get("instances", {}).items() if text.endswith(RESET)},
    )
    assert plan.start == case.get("start", [])
    assert {kill.container: kill.message for kill in plan.kill} == case.get("kill", {})
    assert {wait.container: wait.seconds for wait in plan.waiting} == case.get("wait", {})
    assert plan.initialized == case.get("initialized", True)
    assert plan.finished == case.get("finished", False)


STATES: dict[str, dict[str, Any]] = {
    "waiting": {"state": {"waiting": {}}},
    "running": {"state": {"running": {}}, "started": True},
    "starting": {"state": {"running": {}}, "started": False},
    "done": {"state": {"terminated": {"exitCode": 0}}},
    "failed": {"state": {"terminated": {"exitCode": 1}}},
    "crashed": {"state": {"waiting": {}}, "lastState": {"terminated": {"exitCode": 1}}},
}


@pytest.mark.parametrize("case", load("phase.yaml"))
def test_phase(case: dict[str, Any]) -> None:
    init = [{"name": name} for name in case.get("init", {})]
    init += [{"name": name, "restartPolicy": "Always"} for name in case.get("sidecars", {})]
    pod = pod_of({"containers": list(case["containers"]), "init": init, "restartPolicy": case.get("policy", "Always")})
    states = {**case.get("init", {}), **case.get("sidecars", {}), **case["containers"]}
    statuses = {name: {"started": False, "lastState": {}, **STATES[state]} for name, state in states.items()}
    got = get_phase(pod, statuses, terminal=case.get("terminal", False), has_active_regular=case.get("active", False))
    assert got == case["phase"]


states = st.sampled_from(["", "running", "created", "exited 0", "exited 1"])


@given(
    init=st.lists(st.tuples(st.booleans(), states), max_size=3),
    regular=st.lists(states, min_size=1, max_size=3),
    policy=st.sampled_from(["Always", "OnFailure", "Never"]),
)
def test_no_plan_starts_what_runs_or_runs_init_containers_side_by_side(
    init: list[tuple[bool, str]], regular: list[str], policy: str
) -> None:
    pod = pod_of(
        {
            "restartPolicy": policy,
            "containers": [f"c{i}" for i in range(len(regular))],
            "init": [
                {"name": f"i{i}", **({"restartPolicy": "Always"} if sidecar else {})}
                for i, (sidecar, _) in enumerate(init)
            ],
        }
    )
    texts = {f"c{i}": state for i, state in enumerate(regular)} | {f"i{i}": s for i, (_, s) in enumerate(init)}
    latest = {name: instance_of(name, text) for name, text in texts.items() if text}
    plan = make_plan(pod, latest, ProbeResults(), lambda _c, _i: 0.0)
    for name in plan.start:
        assert name not in latest or latest[name].state.value == "exited"
    plain_init = {c["name"] for c in pod_fields.init_containers(pod) if not pod_fields.is_sidecar(c)}
    assert len(plain_init & set(plan.start)) <= 1
    if plain_init & set(plan.start):
        assert not any(name.startswith("c") for name in plan.start)
    if plan.finished:
        assert not plan.start
