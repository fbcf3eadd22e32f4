"""One test's namespace on the cluster, and the pods in it, as a test refers to them."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from wasilet_common.pod_fields import TERMINAL_PHASES

from wasilet.errors import ApiError, UsageError, WaitTimeoutError
from wasilet.kube.client import KubeObject, api_path
from wasilet.testing.cluster import RUN_LABEL, WasmCluster
from wasilet.testing.expectation import Expectation, Subject, Wait
from wasilet.testing.http import REQUEST_SECONDS, Answer, ask
from wasilet.testing.log_match import Judge, Text, explain, numbered, printable, texts
from wasilet.testing.merged_log import LogLines
from wasilet.testing.observe import Observer, PodView
from wasilet.testing.pod_status import describe, ends_of, events_of
from wasilet.testing.reach import PodId, Reach
from wasilet.testing.service import Service

SERVICE_ACCOUNT_SECONDS = 30.0
DEFAULT_WITHIN_SECONDS = 30.0
SHOWN_LOG_LINES = 40
DELETE_READ_SECONDS = 2.0
"""So long a deletion waits until the logs that are being read have begun to come."""

_OWNERS = {
    "job": ("Job", "jobs", "batch"),
    "deployment": ("ReplicaSet", "deployments", "apps"),
    "replicaset": ("ReplicaSet", "replicasets", "apps"),
    "daemonset": ("DaemonSet", "daemonsets", "apps"),
    "statefulset": ("StatefulSet", "statefulsets", "apps"),
}
"""As a test names them: the kind in their pods' ownerReferences, and where they are themselves."""


def create_namespace(cluster: WasmCluster, test: str, run: str) -> KubeObject:
    """A namespace that no other test has, ready for pods; the object. Raises ApiError and WaitTimeoutError."""
    slug = re.sub(r"[^a-z0-9]+", "-", test.lower()).strip("-")[:40].strip("-") or "test"
    name = f"{slug}-{secrets.token_hex(3)}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {RUN_LABEL: run}}}
    made = cluster.kube.create(api_path("namespaces"), body)
    _wait_service_account(cluster, name)
    return made


def _wait_service_account(cluster: WasmCluster, namespace: str) -> None:
    """Pods are refused before the controller-manager has made it; it comes some milliseconds after the namespace."""
    accounts = api_path("serviceaccounts", namespace=namespace)
    deadline = time.monotonic() + SERVICE_ACCOUNT_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        seconds = max(1, int(left))
        # Without a resource version a watch begins with what there is.
        with cluster.kube.watch(
            accounts, timeout_seconds=seconds, idle_seconds=seconds + 5.0, fieldSelector="metadata.name=default"
        ) as events:
            if any(event.get("type") in {"ADDED", "MODIFIED"} for event in events):
                return
    raise WaitTimeoutError(
        f"namespace {namespace} got no ServiceAccount within {SERVICE_ACCOUNT_SECONDS:g} s",
        hint="the kube-controller-manager makes it: see `invoke logs kube-controller-manager`",
    )


def remove_namespace(cluster: WasmCluster, name: str) -> None:
    """Delete a namespace, its pods first: the namespace controller looks again only after the longest grace period of
    pods that it finds. Does not wait. Raises ApiError."""
    cluster.kube.request(
        "DELETE",
        api_path("pods", namespace=name),
        body={"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 1},
    )
    cluster.kube.delete(api_path("namespaces", name))


class TestNamespace:
    """What a test has done in a namespace, and what is seen there."""

    __test__ = False
    """For pytest: no class of tests."""

    def __init__(self, cluster: WasmCluster, namespace: str, *, version: str = "", within_seconds: float) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.within_seconds = within_seconds
        self._version = version
        self._observer: Observer | None = None
        self._names: set[str] = set()
        self.reach = Reach(cluster, namespace)
        self.created: list[KubeObject] = []
        """Objects that the test made, in their order, as the API server answered."""

    @property
    def observer(self) -> Observer:
        """Begun by the first who asks."""
        if self._observer is None:
            self._observer = Observer(self.cluster.kube, self.namespace, whole_logs=True, version=self._version)
        return self._observer

    def close(self) -> None:
        """End the watches, and the forwards to pods."""
        self.reach.close()
        if self._observer is not None:
            self._observer.close()

    # --- making ----------------------------------------------------------------------------------------------------

    def run_pod(self, body: KubeObject) -> Pod:
        """Create a pod where wasm runs. Raises ApiError."""
        from wasilet.apps.render import place

        if self.cluster.has_other_nodes:
            place([body])
        return self.create_pod(body)

    def create_pod(self, body: KubeObject) -> Pod:
        """Create a pod and keep an eye on it. Raises ApiError."""
        observer = self.observer
        began = time.time()
        made = self.cluster.kube.create(api_path("pods", namespace=self.namespace), body)
        self.created.append(made)
        self._names.add(str(made["metadata"]["name"]))
        return Pod(self, observer.add(made, created_at=began))

    def apply(self, objects: Sequence[KubeObject]) -> list[Any]:
        """See the fixture ``apply``. Raises UsageError and ApiError; what exists already is an error too."""
        from wasilet.apps.render import place
        from wasilet.kube.manifest_file import manifest_errors
        from wasilet.kube.resources import Resources

        resources = Resources(self.cluster.kube, self.namespace)
        made: list[Any] = []
        for obj in objects:
            if self.cluster.has_other_nodes:
                place([obj])
            if obj["kind"] == "Pod" and obj["metadata"].get("namespace") in {None, self.namespace}:
                with manifest_errors(obj):
                    made.append(self.create_pod(obj))
                continue
            with manifest_errors(obj):
                answer = self.cluster.kube.create(resources.collection(obj), obj)
            # Answers of built-in kinds carry both; those of lists would not.
            answer = {"apiVersion": obj["apiVersion"], "kind": obj["kind"], **answer}
            self.created.append(answer)
            made.append(answer)
        return made

    def remove_strays(self, *, everything: bool) -> None:
        """Delete what the test made outside of its namespace, or (``everything``) all that it made, when the namespace
        is not its own. Raises ApiError."""
        from wasilet.kube.resources import Resources

        for obj in reversed(self.created):
            if everything or obj["metadata"].get("namespace") != self.namespace:
                resources = Resources(self.cluster.kube, self.namespace)
                body = {"preconditions": {"uid": obj["metadata"]["uid"]}, "propagationPolicy": "Background"}
                try:
                    self.cluster.kube.request(
                        "DELETE", resources.path(obj), body={"apiVersion": "v1", "kind": "DeleteOptions", **body}
                    )
                except ApiError as error:
                    if error.code not in {404, 409}:
                        raise

    def free_name(self, image: str) -> str:
        """For a pod of that image: the image's own name, with a number where it is taken."""
        base = re.split(r"[:@]", image.rsplit("/", 1)[-1])[0]
        base = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-")[:50] or "pod"
        name, number = base, 1
        while name in self._names:
            number += 1
            name = f"{base}-{number}"
        return name

    def pod(self, name: str, *, within_seconds: float | None = None) -> Pod:
        """A pod by name, waited for when it is not there yet. Raises WaitTimeoutError."""
        limit = self.within_seconds if within_seconds is None else within_seconds
        view = self.observer.wait(lambda: self.observer.find(name), within_seconds=limit)
        if view is None:
            raise WaitTimeoutError(
                f"there is no pod {name!r} in namespace {self.namespace} after {limit:g} s",
                hint=f"there are: {', '.join(sorted(p.name for p in self.observer.pods.values())) or 'none'}",
            )
        return Pod(self, view)

    # --- asserting -------------------------------------------------------------------------------------------------

    def assert_logs(
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
        """See the fixture ``assert_logs``."""
        __tracebackhide__ = True
        judge = Judge(
            contains=(*texts(contains), *texts(matches, pattern=True)),
            in_order=texts(in_order),
            absent=texts(absent),
        )
        subject = _subject(self.namespace, pod)
        waiting = Wait(self.observer, subject, Expectation(judge=judge, container=container))
        verdict = waiting.run(within_seconds=self.within_seconds if within_seconds is None else within_seconds)
        if verdict:
            raise AssertionError(self._failure(verdict, judge, waiting))
        return waiting.lines

    def _failure(self, verdict: str, judge: Judge, waiting: Wait) -> str:
        lines = waiting.lines
        said = [f"the log of {waiting.subject.name} in namespace {self.namespace}: {verdict}", "", "asserted:"]
        said += explain(judge, lines)
        count = len(lines)
        said += ["", f"log ({count} {'line' if count == 1 else 'lines'} in {waiting.seconds:.1f} s):"]
        said += numbered(lines, judge, shown=SHOWN_LOG_LINES) or ["  (empty)"]
        said += [f"  cannot be read: {error}" for error in waiting.errors()]
        if self.observer.error:
            said.append(f"  {self.observer.error}")
        said += ["", "status:"]
        views = waiting.views()
        if not views:
            said.append(f"  there is no such pod; there are: {', '.join(self._pod_names()) or 'none'}")
        for view in views:
            said += [printable(line) for line in describe(view.name, view.object)]
        said += ["", "events:"]
        said += [f"  {printable(line)}" for view in views for line in self.events_of(view)] or ["  (none)"]
        return "\n".join(said)

    def _pod_names(self) -> list[str]:
        with self.observer.changed:
            return sorted(f"pod/{view.name}" for view in self.observer.pods.values() if not view.deleted)

    # --- HTTP ------------------------------------------------------------------------------------------------------

    def service(self, name: str, objects: Sequence[KubeObject]) -> Service:
        """Create a Service of such objects, or find the one that is there. Raises ApiError."""
        for obj in objects:
            self.apply([obj])
        body = self.cluster.kube.get(api_path("services", name, namespace=self.namespace))
        return Service(self.cluster.kube, body, within_seconds=self.within_seconds, reach=self.reach)

    def events_of(self, view: PodView) -> list[str]:
        """``Type Reason: message``, oldest first; never raises."""
        return events_of(self.cluster.kube, self.namespace, view.uid)


class Pod:
    """A pod of the test's namespace."""

    def __init__(self, test_namespace: TestNamespace, view: PodView) -> None:
        self._test_namespace = test_namespace
        self._view = view

    def __repr__(self) -> str:
        """For pytest's assertion messages."""
        return f"<pod/{self.name} {self.phase or 'unknown'}>"

    @property
    def name(self) -> str:
        """``metadata.name``."""
        return self._view.name

    @property
    def namespace(self) -> str:
        """``metadata.namespace``."""
        return self._view.namespace

    @property
    def uid(self) -> str:
        """``metadata.uid``."""
        return self._view.uid

    @property
    def raw(self) -> KubeObject:
        """The whole object as last seen."""
        return self._view.object

    @property
    def phase(self) -> str:
        """``status.phase`` as last seen."""
        return self._view.phase

    @property
    def ip(self) -> str:
        """``status.podIP`` as last seen; empty while it has none."""
        return str((self._view.object.get("status") or {}).get("podIP") or "")

    def url(self, port: int, path: str = "/") -> str:
        """The URL of a port of it: at its address, or of a forward where this machine has no way to that (rootless,
        kind, minikube). Waits for its address, and for a forward until it runs. Raises AssertionError, NoAnswerError,
        and UsageError where pods have no network of their own: its address is the node's then, and another process may
        listen there."""
        __tracebackhide__ = True
        self.wait_for(lambda _: self.ip, words="its address")
        status, spec = self._view.object["status"], self._view.object["spec"]
        if self.ip == status.get("hostIP") and not spec.get("hostNetwork"):
            raise UsageError(
                f"pod/{self.name} has no address of its own: {self.ip} is its node's",
                hint="its node gives pods no network; `invoke status` says why",
            )
        reach, host, to = self._test_namespace.reach, self.ip, port
        if not spec.get("hostNetwork") and not reach.is_direct(self.ip, port):
            self.wait_phase("Running")
            host, to = reach.way(PodId(self.name, self.uid), self.ip, port)
        return f"http://{f'[{host}]' if ':' in host else host}:{to}{path}"

    def get(self, path: str = "/", *, port: int, timeout_seconds: float = REQUEST_SECONDS) -> Answer:
        """One GET at its address, whatever its answer. Raises NoAnswerError, and as :meth:`url` does."""
        __tracebackhide__ = True
        return ask(self.url(port, path), timeout_seconds=timeout_seconds)

    @property
    def exit_code(self) -> int | None:
        """Of the container's last end (the first container's); None while it has not ended."""
        ends = [end for entry in self._view.containers()[-1:] for end in ends_of(entry)]
        return int(ends[0]["exitCode"]) if ends else None

    def wait_for(
        self, what: Callable[[KubeObject], object], *, words: str = "it", within_seconds: float | None = None
    ) -> KubeObject:
        """Wait until ``what`` says yes to the object, and return that. Raises AssertionError with the pod's status."""
        __tracebackhide__ = True
        limit = self._test_namespace.within_seconds if within_seconds is None else within_seconds
        observer = self._test_namespace.observer
        found = observer.wait(lambda: self._view.object if what(self._view.object) else None, within_seconds=limit)
        if found is None:
            said = [f"pod/{self.name}: {words} did not come within {limit:g} s", "", "status:"]
            said += [printable(line) for line in describe(self.name, self._view.object)]
            said += ["", "events:", *(f"  {printable(line)}" for line in self.events())]
            raise AssertionError("\n".join(said))
        return found

    def wait_phase(self, phase: str, *, within_seconds: float | None = None) -> KubeObject:
        """Wait for ``Running``, ``Succeeded`` or ``Failed``. Raises AssertionError, at once when it ended otherwise."""
        __tracebackhide__ = True
        found = self.wait_for(
            lambda _: self.phase == phase or self.phase in TERMINAL_PHASES,
            words=f"phase {phase}",
            within_seconds=within_seconds,
        )
        if self.phase != phase:
            said = [f"pod/{self.name} is {self.phase}, not {phase}", "", "status:"]
            raise AssertionError("\n".join([*said, *map(printable, describe(self.name, self._view.object))]))
        return found

    def wait_finished(self, *, within_seconds: float | None = None) -> int:
        """Wait until the pod is over; the exit code. Raises AssertionError."""
        __tracebackhide__ = True
        self.wait_for(lambda _: self.phase in TERMINAL_PHASES, words="its end", within_seconds=within_seconds)
        code = self.exit_code
        if code is None:
            raise AssertionError(f"pod/{self.name} is {self.phase}, and no container of it ever ran")
        return code

    def logs(self, *, container: str = "", previous: bool = False, within_seconds: float | None = None) -> str:
        """The log as it is now, as ``kubectl logs`` prints it; waits until the container has run. Raises ApiError."""
        __tracebackhide__ = True

        def ran(_: KubeObject) -> bool:
            entries = self._view.containers()
            chosen = [e for e in entries if e.get("name") == container] if container else entries[-1:]
            return any(
                (entry.get(key) or {}).get(kind) is not None
                for entry in chosen
                for key in ("state", "lastState")
                for kind in ("running", "terminated")
            )

        self.wait_for(ran, words="the start of its container", within_seconds=within_seconds)
        query = {"container": container or str(self._view.containers()[-1]["name"])}
        if previous:
            query["previous"] = "true"
        path = api_path("pods", self.name, namespace=self.namespace, sub="log")
        limit = self._test_namespace.within_seconds if within_seconds is None else within_seconds
        lines: list[str] = []
        with self._test_namespace.cluster.kube.stream(path, idle_seconds=limit, **query) as stream:
            lines += stream
        return "".join(f"{line}\n" for line in lines)

    def events(self) -> list[str]:
        """``Type Reason: message``, oldest first."""
        return self._test_namespace.events_of(self._view)

    def delete(self, *, grace_seconds: int = 1, within_seconds: float | None = None) -> None:
        """Delete it, and wait until it is gone. Raises AssertionError and ApiError.

        Its log can be asserted afterwards: it is being read when the pod goes."""
        __tracebackhide__ = True
        observer, logs = self._test_namespace.observer, self._view.logs
        observer.follow(self._view)
        observer.wait(
            lambda: all(log.opened or log.ended for log in logs.values()) or None, within_seconds=DELETE_READ_SECONDS
        )
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": grace_seconds,
            "preconditions": {"uid": self.uid},
        }
        path = api_path("pods", self.name, namespace=self.namespace)
        try:
            self._test_namespace.cluster.kube.request("DELETE", path, body=body)
        except ApiError as error:
            if error.code != 404:
                raise
        self.wait_for(lambda _: self._view.deleted, words="its deletion", within_seconds=within_seconds)


def _subject(namespace: str, given: Pod | str) -> Subject:
    """Which pods are meant: a pod, its name, or ``job/x`` and ``deployment/x``. Raises UsageError."""
    if isinstance(given, Pod):
        return Subject(name=f"pod/{given.name}", belongs=lambda view: view.uid == given.uid)
    kind, _, name = given.rpartition("/")
    if kind in {"", "pod"}:
        return Subject(name=f"pod/{name}", belongs=lambda view: view.name == name and view.namespace == namespace)
    if kind not in _OWNERS:
        raise UsageError(
            f"{given!r} names no pod", hint=f"pod/NAME, or one of {', '.join(f'{k}/NAME' for k in _OWNERS)}"
        )
    owner_kind, plural, group = _OWNERS[kind]

    def belongs(view: PodView) -> bool:
        for owner in view.object["metadata"].get("ownerReferences") or []:
            owner_name = str(owner.get("name"))
            # A Deployment's pods belong to its ReplicaSets, whose names have a hash after its own.
            fits = (owner_name.rpartition("-")[0] if kind == "deployment" else owner_name) == name
            if owner.get("kind") == owner_kind and fits:
                return True
        return False

    return Subject(name=given, belongs=belongs, owner=(plural, group, name))
