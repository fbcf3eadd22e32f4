"""The control plane of the host provider: etcd, API server, controller-manager, scheduler, and the flags of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wasilet.controlplane.components import Component
from wasilet.controlplane.health import LOOPBACK, Probe
from wasilet.controlplane.pki import CLUSTER_CA, ETCD_CA, FRONT_PROXY_CA, Pki
from wasilet.kube.manifests import manifests_folder
from wasilet.state import State

SERVICE_CIDR = "10.96.0.0/16"
SERVICE_IP = "10.96.0.1"
AUDIT_POLICY = "audit-policy.yaml"
AUDIT_FILE_MEGABYTES = 20
AUDIT_FILES = 4
_RESIZE_VALIDATOR = "PodResizeValidator"
"""Refuses resizes on nodes whose ``kubernetes.io/os`` is not ``linux``. A wasm node's is not, but it can resize, and
judges by itself what it has room for."""

_RESIZE_VALIDATOR_SINCE = (1, 36)


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

    kubernetes: str = ""
    """Its version, as ``1.37.2``: which admission plugins there are; empty: not known, and none is named by it."""

    node_prefix: int = 24
    admission_config: Path | None = None
    """For the API server; None: its admission as it comes."""

    egress_config: Path | None = None
    """How the API server connects to the cluster; None: by the machine's network."""

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
            *self._egress_flags(),
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
                *(path for path in (self.admission_config, self.egress_config) if path is not None),
            ),
            ready=self._answers("apiserver", "/readyz"),
            # The default roles come a second later than all else (the hook polls); who is an administrator need not
            # wait for them.
            serving=self._answers("apiserver", "/readyz?exclude=poststarthook/rbac/bootstrap-roles"),
        )

    def _egress_flags(self) -> tuple[str, ...]:
        return (f"--egress-selector-config-file={self.egress_config}",) if self.egress_config is not None else ()

    def _admission_flags(self) -> tuple[str, ...]:
        flags: list[str] = []
        # An API server that does not know a plugin's name does not start.
        if self.kubernetes and tuple(int(part) for part in self.kubernetes.split(".")[:2]) >= _RESIZE_VALIDATOR_SINCE:
            flags.append(f"--disable-admission-plugins={_RESIZE_VALIDATOR}")
        if self.admission_config is not None:
            flags.append(f"--admission-control-config-file={self.admission_config}")
        return tuple(flags)

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
            # It waits for the default roles itself, but ends after 10 s without them, as on a busy machine; then no
            # node can join.
            gate=self._answers("apiserver", "/readyz"),
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
