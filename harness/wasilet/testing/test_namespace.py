"""One test's namespace on the cluster, and the pods in it, as a test speaks of them."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from wasilet.demo.expect import describe
from wasilet.errors import ApiError, UsageError, WaitTimeoutError
from wasilet.kube.client import KubeObject, api_path
from wasilet.testing.cluster import RUN_LABEL, WasmCluster
from wasilet.testing.log_match import Judge, Text, explain, numbered, printable, texts
from wasilet.testing.objects import pod_object
from wasilet.testing.observe import LogLine, Observer, PodView

SERVICE_ACCOUNT_SECONDS = 30.0
DEFAULT_WITHIN_SECONDS = 30.0
SHOWN_LOG_LINES = 40
SHOWN_EVENTS = 15
_FINAL_WAITING = frozenset({"InvalidImageName", "ErrImageNeverPull", "ImagePullBackOff"})
"""Waiting reasons that nothing but a change of the manifest, or of the registry, will end."""

_TERMINAL = frozenset({"Succeeded", "Failed"})


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


class Scene:
    """What a test has done in a namespace, and what is seen there."""

    def __init__(self, cluster: WasmCluster, namespace: str, *, version: str = "", within_seconds: float) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.within_seconds = within_seconds
        self._version = version
        self._observer: Observer | None = None
        self._names: set[str] = set()
        self.created: list[KubeObject] = []
        """Objects that the test made, in their order, as the API server answered."""

    @property
    def observer(self) -> Observer:
        """Begun by the first who asks."""
        if self._observer is None:
            self._observer = Observer(self.cluster.kube, self.namespace, version=self._version)
        return self._observer

    def close(self) -> None:
        """End the watches."""
        if self._observer is not None:
            self._observer.close()

    # --- making ----------------------------------------------------------------------------------------------------

    def run_pod(self, image: str, *, name: str = "", **fields: Any) -> Pod:
        """See the fixture ``run_pod``."""
        from wasilet.demo.render import place

        body = pod_object(image, name=name or self._free_name(image), **fields)
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
        from wasilet.demo.render import place
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

    def _free_name(self, image: str) -> str:
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
    ) -> list[str]:
        """See the fixture ``assert_logs``."""
        __tracebackhide__ = True
        limit = self.within_seconds if within_seconds is None else within_seconds
        judge = Judge(
            contains=(*texts(contains), *texts(matches, pattern=True)),
            in_order=texts(in_order),
            absent=texts(absent),
        )
        name, belongs = _selection(self.namespace, pod)
        waiting = _LogWait(self.observer, belongs, judge, container)
        began = time.monotonic()
        verdict = self.observer.wait(waiting.look, within_seconds=limit)
        waited = time.monotonic() - began
        if verdict is None and not (judge.only_absent and waiting.views()):
            missing = ", ".join(map(str, judge.missing)) or "a pod"
            verdict = f"{missing} did not come within {limit:g} s"
        if verdict:
            raise AssertionError(self._failure(name, verdict, waited, judge, waiting))
        return waiting.lines

    def _failure(self, name: str, verdict: str, waited: float, judge: Judge, waiting: _LogWait) -> str:
        said = [f"the log of {name} in namespace {self.namespace}: {verdict}", "", "asserted:"]
        said += explain(judge, waiting.lines)
        count = len(waiting.lines)
        said += ["", f"log ({count} {'line' if count == 1 else 'lines'} in {waited:.1f} s):"]
        said += numbered(waiting.lines, judge, shown=SHOWN_LOG_LINES) or ["  (empty)"]
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

    def events_of(self, view: PodView) -> list[str]:
        """``Type Reason: message``, oldest first; never raises."""
        try:
            answer = self.cluster.kube.get(
                api_path("events", namespace=self.namespace),
                timeout_seconds=5.0,
                fieldSelector=f"involvedObject.uid={view.uid}",
            )
        except ApiError as error:
            return [f"cannot be read: {error}"]
        from wasilet.testing.observe import event_order

        events = sorted(answer.get("items") or [], key=event_order)
        return [
            f"{event.get('type')} {event.get('reason')}: {event.get('message')}"
            + (f" (x{event['count']})" if (event.get("count") or 1) > 1 else "")
            for event in events[-SHOWN_EVENTS:]
        ]


class Pod:
    """A pod of the test's namespace."""

    def __init__(self, scene: Scene, view: PodView) -> None:
        self._scene = scene
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
    def exit_code(self) -> int | None:
        """Of the container's last end (the first container's); None while it has not ended."""
        for entry in self._view.containers()[-1:]:
            for key in ("state", "lastState"):
                end = (entry.get(key) or {}).get("terminated")
                if end:
                    return int(end["exitCode"])
        return None

    def wait_for(
        self, what: Callable[[KubeObject], object], *, words: str = "it", within_seconds: float | None = None
    ) -> KubeObject:
        """Wait until ``what`` says yes to the object, and return that. Raises AssertionError with the pod's status."""
        __tracebackhide__ = True
        limit = self._scene.within_seconds if within_seconds is None else within_seconds
        observer = self._scene.observer
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
            lambda _: self.phase == phase or self.phase in _TERMINAL,
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
        self.wait_for(lambda _: self.phase in _TERMINAL, words="its end", within_seconds=within_seconds)
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
        limit = self._scene.within_seconds if within_seconds is None else within_seconds
        lines: list[str] = []
        with self._scene.cluster.kube.stream(path, idle_seconds=limit, **query) as stream:
            lines += stream
        return "".join(f"{line}\n" for line in lines)

    def events(self) -> list[str]:
        """``Type Reason: message``, oldest first."""
        return self._scene.events_of(self._view)

    def delete(self, *, grace_seconds: int = 1, within_seconds: float | None = None) -> None:
        """Delete it, and wait until it is gone. Raises AssertionError and ApiError."""
        __tracebackhide__ = True
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": grace_seconds,
            "preconditions": {"uid": self.uid},
        }
        path = api_path("pods", self.name, namespace=self.namespace)
        try:
            self._scene.cluster.kube.request("DELETE", path, body=body)
        except ApiError as error:
            if error.code != 404:
                raise
        self.wait_for(lambda _: self._view.deleted, words="its deletion", within_seconds=within_seconds)


class _LogWait:
    """Feeds a judge with the lines of the chosen pods' containers, each once, as they come."""

    def __init__(self, observer: Observer, belongs: Callable[[PodView], bool], judge: Judge, container: str) -> None:
        self._observer = observer
        self._belongs = belongs
        self._judge = judge
        self._container = container
        self._positions: dict[str, int] = {}
        self.lines: list[str] = []

    def views(self) -> list[PodView]:
        """The pods that it is about."""
        return [view for view in self._observer.pods.values() if self._belongs(view)]

    def errors(self) -> list[str]:
        """Why a log could not be read."""
        return [log.error for view in self.views() for log in view.logs.values() if log.error]

    def look(self) -> str | None:
        """None: wait on; empty: all is as asserted; else why waiting longer is of no use. Called under the lock."""
        views = self.views()
        for view in views:
            self._observer.follow(view)
        for view in views:
            for log in view.logs.values():
                if not self._container or log.container == self._container:
                    position = self._positions.get(log.instance, 0)
                    self._feed(log.lines[max(0, position - log.first) :])
                    self._positions[log.instance] = log.first + len(log.lines)
        if self._judge.forbidden:
            return "it holds what must be absent"
        if not self._judge.missing and not self._judge.only_absent:
            return ""
        return self._hopeless(views)

    def _feed(self, lines: Sequence[LogLine]) -> None:
        new = [line.text for line in lines]
        self._judge.feed(new)
        self.lines += new

    def _hopeless(self, views: Sequence[PodView]) -> str | None:
        for view in views:
            for entry in view.containers():
                waiting = (entry.get("state") or {}).get("waiting") or {}
                if waiting.get("reason") in _FINAL_WAITING:
                    return f"{entry.get('name')} waits: {waiting['reason']}: {waiting.get('message') or 'no message'}"
        missing = ", ".join(map(str, self._judge.missing))
        if views and all(_over(view) for view in views):
            if self._judge.only_absent:
                return ""
            return f"the pod is over ({', '.join(sorted({view.phase or 'gone' for view in views}))}) without {missing}"
        return None


def _over(view: PodView) -> bool:
    """Whether no further line can come."""
    return (view.deleted or view.phase in _TERMINAL) and all(log.ended for log in view.logs.values())


def _selection(namespace: str, given: Pod | str) -> tuple[str, Callable[[PodView], bool]]:
    """A name for messages, and which pods are meant: a pod, its name, or ``job/x`` and ``deployment/x``."""
    if isinstance(given, Pod):
        return f"pod/{given.name}", lambda view: view.uid == given.uid
    kind, _, name = given.rpartition("/")
    if kind in {"", "pod"}:
        return f"pod/{name}", lambda view: view.name == name and view.namespace == namespace
    owners = {"job": "Job", "deployment": "ReplicaSet", "replicaset": "ReplicaSet", "daemonset": "DaemonSet",
              "statefulset": "StatefulSet"}  # fmt: skip
    if kind not in owners:
        raise UsageError(
            f"{given!r} names no pod", hint=f"pod/NAME, or one of {', '.join(f'{k}/NAME' for k in owners)}"
        )

    def belongs(view: PodView) -> bool:
        for owner in view.object["metadata"].get("ownerReferences") or []:
            fits = owner.get("name") == name
            if kind == "deployment":
                fits = str(owner.get("name")).rpartition("-")[0] == name
            if owner.get("kind") == owners[kind] and fits:
                return True
        return False

    return given, belongs
