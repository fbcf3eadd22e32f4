"""Approves the serving certificates that nodes may rightly ask for, and no others.

The controller-manager approves a node's *client* certificate, never its serving one: it cannot know which addresses
are the node's. This process knows, for it asks the API server for the Node. It is long-lived, because nodes renew;
it has its own credential that can do nothing else (``manifests/approver-rbac.yaml.j2``).

A request is approved when all of this holds, and is otherwise left alone, with the reason in the log once:

- the signer is ``kubernetes.io/kubelet-serving``;
- the requester is a node (``system:node:<name>``, in ``system:nodes``), and the subject is exactly that node's;
- the usages are one of the two sets the signer allows;
- there is a name or address, each is one that this Node alone can have (``approver_rules``), and nothing but
  names and addresses is asked for;
- in a cluster that is not Wasilet's own, the node is one that the harness knows (``approver_facts``).

It denies nothing: a request that is premature (the Node does not know its new address yet) becomes right by waiting,
and is looked at again. ``python -P -m wasilet.cluster.approver --kubeconfig FILE --policy FILE [--status-file FILE]``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wasilet_common.backoff import RetryBackoff

from wasilet.cluster.approver_facts import gather_facts, read_policy
from wasilet.cluster.approver_rules import SIGNER, Verdict, is_open, judge, requesting_node
from wasilet.errors import ApiError, HarnessError, StateError
from wasilet.kube.client import CSRS, Hangup, Kube, KubeObject, api_path
from wasilet.kube.reflector import Reflector

logger = logging.getLogger("wasilet.approver")

RETRY_FIRST_SECONDS = 0.1
RETRY_LAST_SECONDS = 15.0


# --- the process -----------------------------------------------------------------------------------------------------


def approve(kube: Kube, csr: KubeObject, why: str) -> None:
    """Add the Approved condition. Raises ApiError (409 when the request changed meanwhile)."""
    condition = {
        "type": "Approved",
        "status": "True",
        "reason": "AddressesBelongToNode",
        "message": f"approved by wasilet: {why}"[:1000],
    }
    body = csr | {"status": {**(csr.get("status") or {}), "conditions": [condition]}}
    kube.replace(f"{CSRS}/{csr['metadata']['name']}/approval", body)


def consider(kube: Kube, csr: KubeObject, policy_file: Path | None) -> Verdict:
    """Judge one open request by the Node, the cluster and the policy as they are now. Raises ApiError, StateError."""
    policy, ranges = read_policy(policy_file)
    name = requesting_node(csr)
    node = kube.find(api_path("nodes", name)) if name else None
    return judge(csr, node, policy=policy, facts=lambda: gather_facts(kube, name, ranges=ranges))


def examine(kube: Kube, csr: KubeObject, policy_file: Path | None = None) -> Verdict:
    """Judge one open request, and approve it when it is right. Raises ApiError, StateError."""
    verdict = consider(kube, csr, policy_file)
    if verdict.approve:
        approve(kube, csr, verdict.why)
    return verdict


@dataclass
class _Waiting:
    csr: KubeObject
    due: float
    backoff: RetryBackoff = field(default_factory=lambda: RetryBackoff(RETRY_FIRST_SECONDS, RETRY_LAST_SECONDS))
    said: str = ""


_News = list[KubeObject] | tuple[str, KubeObject]
"""All open requests, or what happened to one."""


@dataclass
class Approver:
    """The loop: one thread watches and queues, the caller's thread judges."""

    kube: Kube
    status_file: Path | None = None
    policy_file: Path | None = None
    _news: queue.SimpleQueue[_News] = field(default_factory=queue.SimpleQueue, init=False)
    _waiting: dict[str, _Waiting] = field(default_factory=dict, init=False)
    _approved: int = field(default=0, init=False)
    _synced: bool = field(default=False, init=False)

    def run(self, stop: threading.Event) -> None:
        """Until ``stop`` is set (looked at once a second)."""
        self._report()
        hangup = Hangup()
        requests = Reflector(
            kube=self.kube,
            path=CSRS,
            hangup=hangup,
            listed=self._news.put,
            changed=lambda kind, csr: self._news.put((kind, csr)),
            failed=lambda error: logger.warning("%s; trying again", error),
            query={"fieldSelector": f"spec.signerName={SIGNER}"},
        )
        threading.Thread(target=requests.run, name="watch", daemon=True).start()
        try:
            while not stop.is_set():
                self._turn()
        finally:
            hangup.end()

    def _turn(self) -> None:
        """Wait for news, a second at most, and judge what is due."""
        pause = min([1.0, *(max(0.0, w.due - time.monotonic()) for w in self._waiting.values())])
        with contextlib.suppress(queue.Empty):
            news = self._news.get(timeout=pause) if pause > 0 else self._news.get_nowait()
            if isinstance(news, list):
                self._take_all(news)
            else:
                self._take(*news)
        for name in [n for n, w in self._waiting.items() if w.due <= time.monotonic()]:
            self._examine(name)

    def _take_all(self, csrs: list[KubeObject]) -> None:
        for gone in set(self._waiting) - {str(csr["metadata"]["name"]) for csr in csrs}:
            del self._waiting[gone]
        for csr in csrs:
            self._take("ADDED", csr)
        if not self._synced:
            self._synced = True
            logger.info("watching certificate signing requests at %s", self.kube.server)
        self._report()

    def _take(self, kind: str, csr: KubeObject) -> None:
        name = str(csr["metadata"]["name"])
        if kind == "DELETED" or not is_open(csr):
            if self._waiting.pop(name, None):
                self._report()
            return
        known = self._waiting.get(name)
        self._waiting[name] = _Waiting(csr, time.monotonic(), said=known.said if known else "")

    def _examine(self, name: str) -> None:
        waiting = self._waiting[name]
        try:
            verdict = examine(self.kube, waiting.csr, self.policy_file)
        except ApiError as error:
            if error.code in {404, 409}:
                # Someone else was faster, or it is gone; the watch delivers what it is now.
                self._waiting.pop(name, None)
                return
            verdict = Verdict(approve=False, why=error.message, pending=True)
        except StateError as error:
            verdict = Verdict(approve=False, why=str(error), pending=True)
        if verdict.approve:
            self._waiting.pop(name, None)
            self._approved += 1
            logger.info("approved %s for %s", name, verdict.why)
            self._report()
            return
        waiting.due = time.monotonic() + (waiting.backoff.next() if verdict.pending else float("inf"))
        if waiting.said != verdict.why:
            waiting.said = verdict.why
            logger.warning("left alone %s%s: %s", name, " for now" if verdict.pending else "", verdict.why)
            self._report()

    def _report(self) -> None:
        """The status file: for ``status``, and to know that the approver works."""
        if self.status_file is None:
            return
        left = [{"name": name, "why": w.said} for name, w in self._waiting.items() if w.said]
        data = {"pid": os.getpid(), "ready": self._synced, "approved": self._approved, "left_alone": left[:50]}
        temporary = self.status_file.with_name(f".{self.status_file.name}.{os.getpid()}")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump(data, file)
            temporary.replace(self.status_file)
        except OSError as error:
            logger.warning("cannot write %s: %s", self.status_file, error.strerror)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="wasilet.cluster.approver", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--status-file", type=Path)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        Approver(Kube.from_kubeconfig(options.kubeconfig), options.status_file, options.policy).run(threading.Event())
    except HarnessError as error:
        logger.error("%s", error)  # noqa: TRY400  (one clear line; the trace adds nothing)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
