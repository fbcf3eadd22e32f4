"""What the plugin's fixtures give a test: callables whose parameters editors complete and type checkers check.

A test may name them: ``def test_it(run_pod: RunPod, assert_logs: AssertLogs) -> None``. They are exported by
:mod:`wasilet.testing`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from wasilet.errors import CommandError, HarnessError
from wasilet.kube.client import KubeObject
from wasilet.testing.cluster import WasmCluster
from wasilet.testing.http import Answer, WantedAnswer
from wasilet.testing.http_assertion import assert_answer, sender
from wasilet.testing.images import Images
from wasilet.testing.load import Load
from wasilet.testing.log_match import Text, texts
from wasilet.testing.merged_log import LogLines
from wasilet.testing.objects import pod_object, read_objects
from wasilet.testing.service import Service, service_objects
from wasilet.testing.test_namespace import Pod, TestNamespace


@contextlib.contextmanager
def clear_failures() -> Iterator[None]:
    """Let the harness' own message be the whole failure: its stack means nothing to a person who tests an app."""
    __tracebackhide__ = True
    try:
        yield
    except HarnessError as error:
        tail = error.tail if isinstance(error, CommandError) else ()
        words = "\n".join([str(error), *(f"  | {line}" for line in tail)])
    else:
        return
    pytest.fail(words, pytrace=False)


class WasmApp:
    """The fixture ``wasm_app``."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __call__(self, app: str | os.PathLike[str]) -> str:
        """The image of an app, built and pushed once: a sample's name, the path of a folder, or a ``.wasm`` file."""
        __tracebackhide__ = True
        with clear_failures():
            return self._images(app)


class RunPod:
    """The fixture ``run_pod``."""

    def __init__(self, test_namespace: TestNamespace) -> None:
        self._test_namespace = test_namespace

    def __call__(
        self,
        image: str,
        *,
        name: str = "",
        command: Sequence[str] | None = None,
        args: Sequence[str] | None = None,
        env: Mapping[str, object] | None = None,
        restart_policy: str = "Never",
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        container: Mapping[str, Any] | None = None,
        spec: Mapping[str, Any] | None = None,
    ) -> Pod:
        """Create a pod with one container in the test's namespace. ``container`` and ``spec`` hold any further field of
        these two."""
        __tracebackhide__ = True
        body = pod_object(
            image,
            name=name or self._test_namespace.free_name(image),
            command=command,
            args=args,
            env=env,
            restart_policy=restart_policy,
            labels=labels,
            annotations=annotations,
            container=container,
            spec=spec,
        )
        with clear_failures():
            return self._test_namespace.run_pod(body)


class Apply:
    """The fixture ``apply``."""

    def __init__(self, test_namespace: TestNamespace, folders: Sequence[Path]) -> None:
        self._test_namespace = test_namespace
        self._folders = folders

    def __call__(
        self, source: str | os.PathLike[str] | KubeObject | Sequence[Any], /, **variables: object
    ) -> list[Any]:
        """Create objects in the test's namespace: of a file, YAML text, a dictionary or a list of them. A file whose
        name ends in ``.j2`` is a Jinja2 template that gets ``variables``.

        One entry per object: for a Pod what ``run_pod`` gives, else the object as the API server answered."""
        __tracebackhide__ = True
        with clear_failures():
            return self._test_namespace.apply(read_objects(source, variables, self._folders))


class GetPod:
    """The fixture ``get_pod``."""

    def __init__(self, test_namespace: TestNamespace) -> None:
        self._test_namespace = test_namespace

    def __call__(self, name: str, *, within_seconds: float | None = None) -> Pod:
        """A pod of the test's namespace that something else made, waited for when it is not there yet."""
        __tracebackhide__ = True
        with clear_failures():
            return self._test_namespace.pod(name, within_seconds=within_seconds)


class AssertLogs:
    """The fixture ``assert_logs``."""

    def __init__(self, test_namespace: TestNamespace) -> None:
        self._test_namespace = test_namespace

    def __call__(
        self,
        pod: Pod | str,
        *,
        contains: Text | Iterable[Text] | None = None,
        matches: Text | Iterable[Text] | None = None,
        in_order: Iterable[Text] | None = None,
        absent: Text | Iterable[Text] | None = None,
        container: str = "",
        within_seconds: float | None = None,
    ) -> LogLines:
        """Wait until the whole log holds what it must, and return its lines. Raises AssertionError.

        ``contains``: a text or several, in any order; ``matches``: regular expressions; ``in_order``: each in a later
        line than the one before; ``absent``: in no line until then (alone: until the pod is over, or the limit).
        ``pod``: what ``run_pod`` returned, a pod's name, ``job/x`` or ``deployment/x``. ``container``: only this one's
        log."""
        __tracebackhide__ = True
        with clear_failures():
            return self._test_namespace.assert_logs(
                pod,
                contains=contains,
                matches=matches,
                in_order=in_order,
                absent=absent,
                container=container,
                within_seconds=within_seconds,
            )


class MakeService:
    """The fixture ``service``."""

    def __init__(self, test_namespace: TestNamespace) -> None:
        self._test_namespace = test_namespace

    def __call__(
        self,
        name: str,
        *,
        port: int = 80,
        target_port: int | str | None = None,
        selector: Mapping[str, str] | None = None,
        endpoints: Sequence[str] = (),
        spec: Mapping[str, Any] | None = None,
    ) -> Service:
        """A Service of the test's namespace: created when it has a ``selector`` of pods' labels, or the addresses of
        its ``endpoints``; else found. ``spec`` holds any further field of it."""
        __tracebackhide__ = True
        with clear_failures():
            objects = service_objects(
                name, port=port, target_port=target_port, selector=selector, endpoints=endpoints, spec=spec
            )
            return self._test_namespace.service(name, objects if selector or endpoints else [])


class AssertHttp:
    """The fixture ``assert_http``."""

    def __init__(self, test_namespace: TestNamespace) -> None:
        self._test_namespace = test_namespace

    def __call__(
        self,
        target: str | Pod | Service,
        path: str = "/",
        *,
        port: int = 0,
        method: str = "GET",
        status: int | Collection[int] | None = 200,
        headers: Mapping[str, Text | None] | None = None,
        contains: Text | Iterable[Text] | None = None,
        matches: Text | Iterable[Text] | None = None,
        absent: Text | Iterable[Text] | None = None,
        send_headers: Mapping[str, str] | None = None,
        body: bytes | str | None = None,
        within_seconds: float | None = None,
    ) -> Answer:
        """Ask until the answer is as it must be, and return it. Raises AssertionError with the last answer, the pods'
        status, events and logs.

        ``target``: a URL, a pod (with ``port``) or a Service. ``status``: one, several, or None for any. ``headers``:
        the value, a regular expression, or None for one that must not be there. ``contains``, ``matches`` and
        ``absent``: of the body."""
        __tracebackhide__ = True
        wanted = WantedAnswer(
            status=status,
            headers=dict(headers or {}),
            contains=(*texts(contains), *texts(matches, pattern=True)),
            absent=texts(absent),
        )
        with clear_failures():
            send = sender(target, path, port=port, method=method, headers=send_headers, body=body)
            return assert_answer(self._test_namespace, target, send, wanted, within_seconds=within_seconds)


class HttpLoad:
    """The fixture ``http_load``."""

    def __init__(self, test_namespace: TestNamespace) -> None:
        self._test_namespace = test_namespace

    def __call__(
        self,
        target: str | Pod | Service,
        path: str = "/",
        *,
        port: int = 0,
        status: int | Collection[int] | None = 200,
        per_second: float = 50.0,
        workers: int = 8,
        max_seconds: float = 60.0,
    ) -> Load:
        """A context in which requests are sent at that rate, for ``max_seconds`` at most; ``load.result`` counts those
        that failed."""
        with clear_failures():
            return Load(
                sender(target, path, port=port),
                per_second=per_second,
                workers=workers,
                max_seconds=max_seconds,
                wanted=WantedAnswer(status=status),
            )


class Kubectl:
    """The fixture ``kubectl``."""

    def __init__(self, cluster: WasmCluster, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace

    def __call__(
        self,
        *words: str,
        input: str | None = None,  # noqa: A002  (subprocess's own name for it)
        timeout_seconds: float = 60.0,
        check: bool = True,
    ) -> str:
        """What kubectl prints; in the test's namespace unless the words name another.

        A failure is the test's, with kubectl's message; ``check=False`` leaves that to the test, and gives stderr
        too."""
        __tracebackhide__ = True
        from wasilet.testing.kubectl import run_kubectl

        with clear_failures():
            return run_kubectl(
                self._cluster, self._namespace, words, input=input, timeout_seconds=timeout_seconds, check=check
            )
