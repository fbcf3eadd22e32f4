"""The long-lived processes of a cluster: what they are started with, when they are ready, how they are repaired.

A :class:`Component` is started when its process is gone, and started again when its command line or the files it
reads have changed since. Readiness is asked of the process itself (its health endpoint), and a process that dies while
it is waited for fails the wait at once, with the end of its log.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wasilet.controlplane.pki import CLUSTER_CA, ETCD_CA, FRONT_PROXY_CA, Pki
from wasilet.errors import ComponentError, WaitTimeoutError
from wasilet.kube.manifests import manifests_folder
from wasilet.ports import port_is_free, port_taken
from wasilet.process import check_cancelled, is_alive, spawn, stop, tail_of
from wasilet.settings import Settings
from wasilet.state import RUN_ID_VARIABLE, ComponentRecord, State
from wasilet.steps import Finding, Progress, Step

SERVICE_CIDR = "10.96.0.0/16"
SERVICE_IP = "10.96.0.1"
LOOPBACK = "127.0.0.1"
PROBE_TIMEOUT_SECONDS = 2.0
AUDIT_POLICY = "audit-policy.yaml"
AUDIT_FILE_MEGABYTES = 20
AUDIT_FILES = 4
PORT_RELEASE_SECONDS = 3.0

_PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "XDG_RUNTIME_DIR", "USER", "LOGNAME"),
    # Where a node finds the component host that the harness built.
    *("WASILET_CACHE", "XDG_CACHE_HOME", "WASILET_COMPONENT_HOST"),
)
_PASSED_ON_TO_CLIENTS = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One long-lived process."""

    name: str
    """As in ``status`` and ``logs``: ``kube-apiserver``."""

    argv: tuple[str, ...]
    ready: Callable[[], bool]
    """Whether all is well with it. Must answer within a second or two and never raise."""

    serving: Callable[[], bool] | None = None
    """What those that build on it wait for, asked every 50 ms; None: ``ready``."""

    gate: Callable[[], bool] | None = None
    """What must be true before it is started; None: it copes with whatever is not there yet."""

    ports: Mapping[str, int] = field(default_factory=dict)
    """TCP ports it will listen on, by what they are for."""

    inputs: tuple[Path, ...] = ()
    """Files whose content it reads at its start only."""

    clients: bool = False
    """Whether it connects to other hosts, hence gets the proxy and trust variables."""

    addresses: tuple[str, ...] = (LOOPBACK,)
    """What it listens on."""

    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables of its own."""


def component_step(
    component: Callable[[], Component],
    name: str,
    *,
    title: str,
    state: State,
    settings: Settings,
    after: tuple[str, ...] | None = None,
    wait: bool = True,
    key: str = "",
) -> Step:
    """The step that has a component running (and, with ``wait``, ready); its key is the component's name, unless
    another is given. ``component`` is called when it is its turn,
    because ports and paths are known only then."""

    def look() -> Finding:
        record = state.alive(name)
        if record is None:
            dead = state.record(name) is not None
            return Finding.differs("start it again: its process is gone" if dead else "start", ["+ " + name])
        made = component()
        if record.argv_digest != digest(made):
            return Finding.differs("restart: its configuration changed", [f"- pid {record.process.pid}", f"+ {name}"])
        # What `change` waits for counts here, too: else a second `up` right after the first one changes something.
        if wait and not (made.serving or made.ready)():
            return Finding.differs(f"pid {record.process.pid} runs, but is not ready")
        return Finding.ok(f"pid {record.process.pid}")

    def change(progress: Progress) -> str:
        made = component()
        if made.gate is not None:
            _wait_gate(made, made.gate, settings=settings)
        before = state.alive(name)
        record = ensure_running(made, state=state, settings=settings)
        if not wait:
            return f"pid {record.process.pid}"
        limit = settings.timeouts.ready_seconds
        try:
            wait_ready(made, record, timeout_seconds=limit, settings=settings, say=progress)
        except ComponentError:
            # One that ran before may have been on its way out: then it has not failed to start, it has to be started.
            if before is None or before.process != record.process or is_alive(record.process):
                raise
            record = ensure_running(made, state=state, settings=settings)
            wait_ready(made, record, timeout_seconds=limit, settings=settings, say=progress)
        return f"pid {record.process.pid}"

    return Step(name=title, key=key or name, look=look, change=change, after=after, log=state.log(name))


def ensure_running(component: Component, *, state: State, settings: Settings) -> ComponentRecord:
    """The running process of a component, started (again) where that is needed. Raises PortTakenError, CommandError."""
    wanted = digest(component)
    record = state.alive(component.name)
    if record is not None and record.argv_digest == wanted:
        return record
    if record is not None:
        stop(record.process, grace_seconds=settings.timeouts.stop_grace_seconds)
    _end_unrecorded(component, state=state, settings=settings)
    _wait_for_ports(component, state=state, settings=settings)
    log = state.log(component.name)
    rotate(log)
    before_bytes = log.stat().st_size if log.exists() else 0
    process = spawn(component.argv, log=log, env=environment(component, state=state, settings=settings))
    started = ComponentRecord(
        name=component.name, process=process, log=log, argv_digest=wanted, log_start_bytes=before_bytes
    )
    state.remember(started)
    return started


def _wait_for_ports(component: Component, *, state: State, settings: Settings) -> None:
    """See that its ports are free. Raises PortTakenError."""
    # One that was killed a moment ago gives its ports back only when the kernel has ended its last thread.
    patience = time.monotonic() + (PORT_RELEASE_SECONDS if state.record(component.name) else 0.0)
    for what, port in component.ports.items():
        for address in component.addresses:
            while not port_is_free(port, address):
                if time.monotonic() >= patience:
                    raise port_taken(port, f"{component.name} ({what})")
                time.sleep(settings.timeouts.poll_seconds)


def _end_unrecorded(component: Component, *, state: State, settings: Settings) -> None:
    """End what a run that was killed between starting a process and writing that down has left.

    Only the very same command line is meant: the steps run beside each other, and what another one has started this
    moment is not written down yet either. A node's supervisor, which no record names, is not touched."""
    known = {record.process.pid for record in state.records()}
    wanted = [word.encode() for word in component.argv]
    strays = []
    for process in state.stray_processes():
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[:-1]
            if process.pid not in known and argv == wanted:
                strays.append(process)
    stop(strays, grace_seconds=settings.timeouts.stop_grace_seconds)


def _wait_gate(component: Component, gate: Callable[[], bool], *, settings: Settings) -> None:
    deadline = time.monotonic() + settings.timeouts.ready_seconds
    while not gate():
        if time.monotonic() >= deadline:
            raise WaitTimeoutError(f"{component.name} was not started: what it needs was not ready in time")
        check_cancelled()
        time.sleep(settings.timeouts.poll_seconds)


def wait_ready(
    component: Component,
    record: ComponentRecord,
    *,
    timeout_seconds: float,
    settings: Settings,
    say: Progress = lambda _: None,
) -> None:
    """Wait until a component serves. Raises ComponentError when it dies or the time is over."""
    deadline = time.monotonic() + timeout_seconds
    say("waiting until it is ready")
    answers = component.serving or component.ready
    while not answers():
        if not is_alive(record.process):
            tail = tail_of(record.log, start_bytes=record.log_start_bytes)
            why = reason_line(tail)
            raise ComponentError(
                f"{component.name} ended while it was starting" + (f": {why[:300]}" if why else ""),
                log=record.log,
                tail=tail,
            )
        if time.monotonic() >= deadline:
            raise ComponentError(
                f"{component.name} was not ready within {timeout_seconds:g} s",
                log=record.log,
                tail=tail_of(record.log, start_bytes=record.log_start_bytes),
            )
        check_cancelled()
        time.sleep(settings.timeouts.poll_seconds)


def reason_line(tail: tuple[str, ...]) -> str:
    """The line of a log's end that says why a program ended; empty when there is none. A Go program that panics ends
    with its stack, the reason stands above it."""
    for sign in ("no space left on device", "panic: ", "fatal", "rror: "):
        for line in tail:
            if sign in line:
                return line.strip() if sign != "no space left on device" else sign
    return tail[-1].strip() if tail else ""


def digest(component: Component) -> str:
    """Changes when the command line or a file that is read at start does."""
    hasher = hashlib.sha256("\0".join(component.argv).encode())
    for path in component.inputs:
        with contextlib.suppress(OSError):
            hasher.update(b"\0" + path.read_bytes())
    return hasher.hexdigest()


def environment(component: Component, *, state: State, settings: Settings) -> dict[str, str]:
    """A chosen part of the user's environment, and the cluster's run id."""
    chosen = environment_for_tools(settings, clients=component.clients)
    return {**chosen, **component.environ, RUN_ID_VARIABLE: state.run_id()}


def environment_for_tools(settings: Settings, *, clients: bool = False) -> dict[str, str]:
    """The part of the user's environment that Wasilet's programs need; nothing that could change what it does."""
    names = list(_PASSED_ON)
    if clients:
        names += [variant for name in _PASSED_ON_TO_CLIENTS for variant in (name, name.lower())]
    return {name: settings.environ[name] for name in names if name in settings.environ}


def rotate(log: Path, *, keep_bytes: int = 20_000_000) -> None:
    """Start a new log when the old one has grown large; one old one is kept."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > keep_bytes:
            log.replace(log.with_suffix(".log.1"))


# --- health ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Asks ``https://127.0.0.1:<port><path>`` (or http, without ``ca``) and is content with 200."""

    port: int
    path: str
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    host: str = LOOPBACK

    def __call__(self) -> bool:
        """Whether it answered 200."""
        try:
            if self.ca is None:
                connection = http.client.HTTPConnection(self.host, self.port, timeout=PROBE_TIMEOUT_SECONDS)
            else:
                context = ssl.create_default_context(cafile=str(self.ca))
                if self.certificate is not None:
                    context.load_cert_chain(self.certificate, self.key)
                connection = http.client.HTTPSConnection(
                    self.host, self.port, timeout=PROBE_TIMEOUT_SECONDS, context=context
                )
            try:
                connection.request("GET", self.path)
                return connection.getresponse().status == http.HTTPStatus.OK
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError):
            return False


def accepts(address: str, port: int) -> bool:
    """Whether someone listens there: all that can be asked of what answers no one without a credential."""
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True


# --- the control plane of the host provider --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ControlPlane:
    """Makes the components of the host provider from paths and ports."""

    binaries: Mapping[str, str]
    ports: Mapping[str, int]
    state: State
    advertise_address: str
    service_cidr: str = SERVICE_CIDR
    pod_cidr: str = ""
    """Of all pods, from which each node gets a share; empty: pods have no addresses of their own."""

    node_prefix: int = 24
    admission_config: Path | None = None
    """For the API server; None: its admission as it comes."""

    @property
    def pki(self) -> Pki:
        """Its keys and certificates."""
        return Pki(self.state.pki)

    def _crt(self, name: str) -> str:
        return str(self.pki.certificate(name))

    def _key(self, name: str) -> str:
        return str(self.pki.key(name))

    def _pairs(self, *names: str) -> tuple[Path, ...]:
        return tuple(path for name in names for path in (self.pki.certificate(name), self.pki.key(name)))

    def etcd(self) -> Component:
        """One member, reachable with its own client certificate authority only."""
        client, peer = (f"https://{LOOPBACK}:{self.ports[name]}" for name in ("etcd", "etcd_peer"))
        argv = (
            self.binaries["etcd"],
            "--name=wasilet",
            f"--data-dir={self.state.path / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=wasilet={peer}",
            f"--cert-file={self._crt('etcd')}",
            f"--key-file={self._key('etcd')}",
            f"--trusted-ca-file={self._crt(ETCD_CA)}",
            "--client-cert-auth=true",
            f"--peer-cert-file={self._crt('etcd')}",
            f"--peer-key-file={self._key('etcd')}",
            f"--peer-trusted-ca-file={self._crt(ETCD_CA)}",
            "--peer-client-cert-auth=true",
            # A throw-away cluster: losing the last writes at a power cut is a fair price for not waiting for the disk.
            "--unsafe-no-fsync=true",
            # A single member has no one to lose an election to: no reason to wait a second for one.
            "--heartbeat-interval=50",
            "--election-timeout=500",
            "--auto-compaction-retention=1h",
            "--log-level=warn",
        )
        return Component(
            name="etcd",
            argv=argv,
            ports={"clients": self.ports["etcd"], "peers": self.ports["etcd_peer"]},
            inputs=self._pairs("etcd", ETCD_CA),
            ready=Probe(
                port=self.ports["etcd"],
                path="/health",
                ca=self.pki.certificate(ETCD_CA),
                certificate=self.pki.certificate("etcd-health"),
                key=self.pki.key("etcd-health"),
            ),
        )

    def apiserver(self) -> Component:
        """Ready when ``/readyz`` reports ready to the administrator (no one is anonymous here)."""
        argv = (
            self.binaries["kube-apiserver"],
            f"--etcd-servers=https://{LOOPBACK}:{self.ports['etcd']}",
            f"--etcd-cafile={self._crt(ETCD_CA)}",
            f"--etcd-certfile={self._crt('apiserver-etcd-client')}",
            f"--etcd-keyfile={self._key('apiserver-etcd-client')}",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={self.ports['apiserver']}",
            # Given explicitly: without a default route the server finds no address by itself, and exits.
            f"--advertise-address={self.advertise_address}",
            "--endpoint-reconciler-type=none",
            f"--service-cluster-ip-range={self.service_cidr}",
            f"--tls-cert-file={self._crt('apiserver')}",
            f"--tls-private-key-file={self._key('apiserver')}",
            f"--client-ca-file={self._crt(CLUSTER_CA)}",
            "--anonymous-auth=false",
            "--enable-bootstrap-token-auth=true",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            *self._admission_flags(),
            f"--audit-policy-file={manifests_folder() / AUDIT_POLICY}",
            f"--audit-log-path={self.state.logs / 'audit.log'}",
            "--audit-log-mode=batch",
            f"--audit-log-maxsize={AUDIT_FILE_MEGABYTES}",
            f"--audit-log-maxbackup={AUDIT_FILES - 1}",
            "--allow-privileged=true",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={self.state.pki / 'sa.pub'}",
            f"--service-account-signing-key-file={self._key('sa')}",
            f"--kubelet-client-certificate={self._crt('apiserver-kubelet-client')}",
            f"--kubelet-client-key={self._key('apiserver-kubelet-client')}",
            f"--kubelet-certificate-authority={self._crt(CLUSTER_CA)}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--proxy-client-cert-file={self._crt('front-proxy-client')}",
            f"--proxy-client-key-file={self._key('front-proxy-client')}",
            f"--requestheader-client-ca-file={self._crt(FRONT_PROXY_CA)}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            # A metrics-server that runs as a process of the host stands behind a Service without a selector.
            "--enable-aggregator-routing=true",
            "--profiling=false",
        )
        return Component(
            name="kube-apiserver",
            argv=argv,
            ports={"HTTPS": self.ports["apiserver"]},
            inputs=(
                *self._pairs("apiserver", "apiserver-etcd-client", "apiserver-kubelet-client", "front-proxy-client"),
                *(self.pki.certificate(name) for name in (CLUSTER_CA, ETCD_CA, FRONT_PROXY_CA)),
                self.pki.key("sa"),
                manifests_folder() / AUDIT_POLICY,
                *((self.admission_config,) if self.admission_config is not None else ()),
            ),
            ready=self._answers("apiserver", "/readyz"),
            # The default roles come a second later than all else (the hook polls); who is an administrator need not
            # wait for them.
            serving=self._answers("apiserver", "/readyz?exclude=poststarthook/rbac/bootstrap-roles"),
        )

    def _admission_flags(self) -> tuple[str, ...]:
        if self.admission_config is None:
            return ()
        return (f"--admission-control-config-file={self.admission_config}",)

    def _answers(self, port: str, path: str) -> Probe:
        """Asked as the administrator, whom all three know by the certificate alone."""
        return Probe(
            port=self.ports[port],
            path=path,
            ca=self.pki.certificate(CLUSTER_CA),
            certificate=self.pki.certificate("admin"),
            key=self.pki.key("admin"),
        )

    def controller_manager(self) -> Component:
        """With the two controllers that bootstrap tokens need, and no leader election: there is one."""
        argv = (
            self.binaries["kube-controller-manager"],
            *self._client_flags("controller-manager"),
            "--controllers=*,bootstrapsigner,tokencleaner",
            f"--cluster-signing-cert-file={self._crt(CLUSTER_CA)}",
            f"--cluster-signing-key-file={self._key(CLUSTER_CA)}",
            f"--root-ca-file={self._crt(CLUSTER_CA)}",
            f"--service-account-private-key-file={self._key('sa')}",
            "--use-service-account-credentials=true",
            f"--service-cluster-ip-range={self.service_cidr}",
            *self._pod_cidr_flags(),
            "--kube-api-qps=300",
            "--kube-api-burst=600",
        )
        return Component(
            name="kube-controller-manager",
            argv=argv,
            ports={"HTTPS": self.ports["controller_manager"]},
            inputs=(*self._pairs("controller-manager", CLUSTER_CA), self.pki.key("sa")),
            ready=self._answers("controller_manager", "/healthz"),
        )

    def _pod_cidr_flags(self) -> tuple[str, ...]:
        if not self.pod_cidr:
            return ()
        return (
            "--allocate-node-cidrs=true",
            f"--cluster-cidr={self.pod_cidr}",
            f"--node-cidr-mask-size={self.node_prefix}",
        )

    def scheduler(self) -> Component:
        """The default profile."""
        argv = (
            self.binaries["kube-scheduler"],
            *self._client_flags("scheduler"),
            "--kube-api-qps=300",
            "--kube-api-burst=600",
        )
        return Component(
            name="kube-scheduler",
            argv=argv,
            ports={"HTTPS": self.ports["scheduler"]},
            inputs=self._pairs("scheduler", CLUSTER_CA),
            # Its informers back off when they are refused, so an early start is a late one.
            gate=self._answers("apiserver", "/readyz"),
            ready=self._answers("scheduler", "/readyz"),
        )

    def _client_flags(self, name: str) -> Sequence[str]:
        kubeconfig = self.state.etc / f"{name}.conf"
        return (
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            # The client CA is given, so nothing has to be looked up (and retried) while the API server starts.
            "--authentication-skip-lookup=true",
            f"--client-ca-file={self._crt(CLUSTER_CA)}",
            # Health, too, is for those whom the API server's roles let see it (wasilet.controlplane.public_info).
            "--authorization-always-allow-paths=",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={self.ports[name.replace('-', '_')]}",
            # A serving certificate of the cluster's, or it makes an RSA one of its own at each start.
            f"--tls-cert-file={self._crt(name)}",
            f"--tls-private-key-file={self._key(name)}",
            "--leader-elect=false",
            "--profiling=false",
        )


def cat_facts_origin(port: int) -> str:
    """The origin of the demos' own API, which the nodes allow pods to call on this machine."""
    return f"http://{LOOPBACK}:{port}"
