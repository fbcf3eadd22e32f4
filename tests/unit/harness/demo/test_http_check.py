"""What a demo promises of HTTP: asked here of a guest in the node's sandbox, and the end of a rolling update."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from wasilet.apps.samples import Exchange, Line, LocalSpec
from wasilet.demo import local_run
from wasilet.demo.http_check import not_updated
from wasilet.errors import HarnessError
from wasilet_node.runtime.component_host import locate
from wasilet_node.runtime.component_host.library import HostUnavailableError

pytestmark = pytest.mark.unit

GUEST = Path(__file__).resolve().parents[3] / "guests" / "http_p2.wasm"


def check(*exchanges: Exchange, environ: dict[str, str], **fields: Any) -> str:
    local = LocalSpec(http=exchanges, **fields)
    return local_run.check(GUEST, local, say=lambda _: None, environ=environ)


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    try:
        found = locate.find()
    except HostUnavailableError as error:
        pytest.skip(str(error))
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "WASILET_CACHE": cache, locate.VARIABLE: str(found)}


def test_a_server_is_asked_and_ended(environ: dict[str, str]) -> None:
    hello = Exchange(path="/hello", contains=("hello",))
    assert check(hello, Exchange(path="/status?404", status=404), environ=environ) == "GET /status?404: 404"


def test_its_environment_and_arguments_arrive(environ: dict[str, str]) -> None:
    named = Exchange(path="/env?NAME", contains=("Ada",), absent=("Grace",))
    assert check(named, environ=environ, env={"NAME": "Ada"}) == "GET /env?NAME: 200"


def test_an_answer_that_differs_is_shown(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_run, "LOCAL_ANSWER_SECONDS", 0.5)
    with pytest.raises(HarnessError, match=r"GET /hello: the body lacks 'Bye'") as error:
        check(Exchange(path="/hello", contains=("Bye",)), environ=environ)
    assert "| hello" in error.value.message
    assert "serving http://127.0.0.1:" in error.value.message


def test_a_log_is_waited_for_beside_the_answers(environ: dict[str, str]) -> None:
    panics = Exchange(path="/panic", status=500)
    assert check(panics, environ=environ, log=(Line(contains="GET /panic: 500"),)) == "GET /panic: 500"


def deployment(replicas: int = 2, **status: int) -> dict[str, Any]:
    return {"spec": {"replicas": replicas}, "status": {"observedGeneration": 7, **status}}


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        (deployment(observedGeneration=6), "not seen yet"),
        (deployment(replicas=3, updatedReplicas=1, availableReplicas=2), "1 of 3 pods are new, 2 available"),
        ({"spec": {"replicas": 2}, "status": {"observedGeneration": 7, "replicas": 3, "updatedReplicas": 2,
          "availableReplicas": 2}}, "1 old ones are left"),
        ({"spec": {"replicas": 2}, "status": {"observedGeneration": 7, "replicas": 2, "updatedReplicas": 2,
          "availableReplicas": 1}}, "1 available"),
        ({"spec": {"replicas": 2}, "status": {"observedGeneration": 7, "replicas": 2, "updatedReplicas": 2,
          "availableReplicas": 2}}, ""),
    ],
)  # fmt: skip
def test_an_update_is_over_when_all_pods_are_new_and_available(found: dict[str, Any], missing: str) -> None:
    said = not_updated(found, 7)
    assert missing in said
    assert bool(said) is bool(missing)
