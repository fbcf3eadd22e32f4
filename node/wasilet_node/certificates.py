"""The node's two certificates: the first join, the renewals, and the way back after an expiry.

``pki/client.pem`` says who the node is; ``pki/serving.pem`` is what its HTTPS server shows. Both are asked for by a
CertificateSigningRequest (``wasilet_node.certificates_csr``), renewed when 70 to 90 % of their life is over (kubelet's
figures; the jitter keeps nodes that joined together from renewing together), and handed on without closing a
connection: new requests go by a new ``KubeClient`` generation, new TLS sessions by a new context.

Who may renew what: a client certificate renews itself while it is valid. When it is expired (a laptop that slept), or
the API server no longer knows it (the cluster was made again), the bootstrap file is the only way back, and it is read
again for that, since the user who made the cluster again wrote a new one.

The serving certificate is never needed to be Ready. Until it is approved the server shows a self-signed one, which an
API server without ``--kubelet-certificate-authority`` (kubeadm's default, hence kind's) accepts.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from wasilet_common.backoff import RetryBackoff
from wasilet_common.files import make_folder, write_private

from wasilet_node.certificates_csr import (
    CLIENT_SIGNER,
    SERVING_SIGNER,
    CertificateError,
    CertificatePendingError,
    CertificateRefusedError,
    Wanted,
    forget,
    obtain,
)
from wasilet_node.certificates_store import (
    NodeNames,
    Pair,
    is_certificate,
    load_pair,
    save_pair,
    self_signed,
)
from wasilet_node.kube.base import ApiStatusError, ApiUnavailableError, KubeError
from wasilet_node.kube.client import KubeClient
from wasilet_node.kube.kubeconfig import (
    Cluster,
    Credentials,
    Kubeconfig,
    KubeconfigError,
    load,
    load_cluster,
    render_node_kubeconfig,
)

logger = logging.getLogger(__name__)

_JOIN_LIMIT_SECONDS = 3600.0
"""kubelet's limit for its first certificate; a person may have to approve it."""

_ATTEMPT_LIMIT_SECONDS = 900.0
_LONGEST_RETRY_SECONDS = 60.0
_LONGEST_FIRST_RETRY_SECONDS = 10.0
_LONGEST_AFTER_REFUSAL_SECONDS = 900.0
_CLOCK_STEP_SECONDS = 60.0
"""Sleeps are cut into steps of this: the monotonic clock stands still while a laptop sleeps, certificates do not."""

_RENEW_FROM = 0.7
_RENEW_TO = 0.9


class JoinError(Exception):
    """The node cannot join; the message says what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How patient a node is with what refuses it or does not answer."""

    first_retry_seconds: float = 1.0
    """Doubles from here; a fifth of it while the node joins."""

    after_refusal_seconds: float = 60.0
    """Doubles from here, after a certificate that was denied or is as old as the one before."""

    refused_token_seconds: float = 10.0
    """A token's Secret and its RBAC reach the API server's authenticators some time after they are written."""

    report_pending_seconds: float = 3.0
    """A request that waits for longer is reported, with what approves it."""


class Certificates:
    """Both certificates of one node. ``join`` first, then ``run`` for as long as the agent lives."""

    def __init__(
        self,
        *,
        node_name: str,
        pki: Path,
        kubeconfig: Path,
        bootstrap_file: Path | None,
        user_agent: str,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        renewal_share: Callable[[], float] = lambda: random.uniform(_RENEW_FROM, _RENEW_TO),  # noqa: S311  # jitter
        pace: Pace = Pace(),
    ) -> None:
        """``kubeconfig``: where the node's own one is kept. ``now``, ``renewal_share`` and ``pace`` are for tests."""
        self._node_name = node_name
        self._pki = pki
        self._kubeconfig = kubeconfig
        self._bootstrap_file = bootstrap_file
        self._user_agent = user_agent
        self._now = now
        self._renewal_share = renewal_share
        self._pace = pace
        self._kube: KubeClient | None = None
        self._client: Pair | None = None
        self._serving: Pair | None = None
        self._served_for: NodeNames | None = None
        self._names: NodeNames | None = None
        self._names_changed = asyncio.Event()
        self._rejected = asyncio.Event()
        self._on_serving: Callable[[Pair], None] | None = None
        self._on_client_ca: Callable[[str | None], None] | None = None

    @property
    def client_path(self) -> Path:
        """Certificate chain and key by which the node connects to the API server."""
        return self._pki / "client.pem"

    @property
    def serving_path(self) -> Path:
        """Certificate chain and key of the HTTPS server."""
        return self._pki / "serving.pem"

    @property
    def client_ca_path(self) -> Path:
        """What signs the API server's own client certificate; missing: not known."""
        return self._pki / "client-ca.pem"

    def client_ca(self) -> str | None:
        """PEM text, or None where the cluster's client CA is not known: then only tokens authenticate."""
        try:
            return self.client_ca_path.read_text(encoding="ascii")
        except (FileNotFoundError, ValueError):
            return None

    async def join(self) -> KubeClient:
        """Have an identity for the API server: by the certificate that is kept, else by the bootstrap file.

        An API server that does not answer is not waited for when there is a valid certificate. Raises JoinError.
        """
        make_folder(self._pki)
        bootstrap = self._read_bootstrap(needed=False)
        cluster = self._cluster(bootstrap)
        pair = load_pair(self.client_path)
        if pair is not None and not self._usable(pair):
            pair = None
        if pair is not None:
            kube = KubeClient(cluster, _credentials(pair), user_agent=self._user_agent)
            if await self._known(kube):
                self._kube, self._client = kube, pair
                self._keep_cluster(cluster)
                logger.info("using the client certificate that is valid until %s", _text(pair.not_after))
                return kube
            await kube.close()
            logger.warning("the API server does not know the certificate in %s; joining again", self.client_path)
        if bootstrap is None:
            bootstrap = self._read_bootstrap(needed=True)
            assert bootstrap is not None  # noqa: S101  # needed=True raises
        kube = KubeClient(bootstrap.cluster, bootstrap.credentials, user_agent=self._user_agent)
        try:
            pair = await self._first_certificate(kube)
        except BaseException:
            await kube.close()
            raise
        self._keep_client(pair, bootstrap.cluster)
        kube.set_credentials(_credentials(pair))
        self._kube = kube
        logger.info("joined as %s; the client certificate is valid until %s", pair.common_name, _text(pair.not_after))
        return kube

    def serving_pair(self, names: NodeNames) -> Pair:
        """What the HTTPS server shows from its first connection on: the kept one, else a self-signed one."""
        pair = load_pair(self.serving_path)
        if pair is not None and pair.valid_at(self._now()):
            self._serving = pair
            return pair
        return self_signed(self._node_name, names)

    def set_names(self, names: NodeNames) -> None:
        """The addresses that are in Node.status now: a serving certificate for them is asked for when it is missing.

        Only what the Node states is approved, so this comes after the status was written.
        """
        if names != self._names:
            self._names = names
            self._names_changed.set()

    def rejected(self) -> None:
        """The API server answered 401: the certificate is checked, and the bootstrap file used when need be."""
        self._rejected.set()

    async def run(
        self,
        *,
        on_serving: Callable[[Pair], None],
        on_client_ca: Callable[[str | None], None] | None = None,
    ) -> None:
        """Renew until cancelled. ``on_serving`` is called with each new serving pair, before it is first needed."""
        if self._kube is None or self._client is None:
            raise RuntimeError("join comes first")
        self._on_serving = on_serving
        self._on_client_ca = on_client_ca
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_client_valid(self._kube), name="client-certificate")
            group.create_task(self._keep_serving_valid(self._kube), name="serving-certificate")

    async def _first_certificate(self, kube: KubeClient) -> Pair:
        loop = asyncio.get_running_loop()
        began = loop.time()
        wanted = Wanted(signer=CLIENT_SIGNER, node_name=self._node_name)
        retry = RetryBackoff(self._pace.first_retry_seconds / 5, _LONGEST_FIRST_RETRY_SECONDS)
        while True:
            left = _JOIN_LIMIT_SECONDS - (loop.time() - began)
            try:
                pair = await self._obtain(kube, wanted, timeout_seconds=left)
            except CertificateError as error:
                raise JoinError(str(error)) from error
            except ApiStatusError as error:
                spent = loop.time() - began
                if error.code not in (401, 403) and error.code < 500:
                    raise JoinError(f"the API server refuses a certificate request: {error}") from error
                if error.code in (401, 403) and spent > self._pace.refused_token_seconds:
                    raise JoinError(self._explain_refusal(error)) from error
                failure: KubeError = error
            except ApiUnavailableError as error:
                failure = error
            else:
                return pair
            delay = retry.next()
            if left <= delay:
                raise JoinError(f"the API server could not be asked for a certificate: {failure}") from failure
            logger.warning("cannot ask for a certificate yet: %s", failure)
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))  # noqa: S311  # jitter, not a secret

    def _explain_refusal(self, error: ApiStatusError) -> str:
        if error.code == 401:
            return (
                f"the API server does not accept the token in {self._bootstrap_file}: it is unknown or has expired; "
                "make a new one, for example with: kubeadm token create"
            )
        return (
            f"the token in {self._bootstrap_file} may not ask for certificates ({error}); its group needs the "
            "ClusterRole system:node-bootstrapper"
        )

    async def _known(self, kube: KubeClient) -> bool:
        try:
            await kube.get(f"/api/v1/nodes/{self._node_name}", timeout_seconds=5.0)
        except ApiStatusError as error:
            return error.code != 401
        except ApiUnavailableError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                logger.warning("%s", error)
        return True

    async def _keep_client_valid(self, kube: KubeClient) -> None:
        retry = RetryBackoff(self._pace.first_retry_seconds, _LONGEST_RETRY_SECONDS)
        planned: Pair | None = None
        deadline = self._now()
        while True:
            pair = self._client
            assert pair is not None  # noqa: S101  # run checked it
            if pair is not planned:
                planned, deadline = pair, pair.renewal_time(self._renewal_share())
            await self._sleep_until(deadline, self._rejected)
            rejected = self._rejected.is_set()
            self._rejected.clear()
            try:
                await self._renew_client(kube, pair, rejected=rejected)
                retry.reset()
                if self._client is not pair:
                    await self._pause_if_old(self._client, self._rejected)
            except CertificatePendingError as error:
                logger.warning("%s", error)
            except (KubeError, CertificateError, JoinError, KubeconfigError, OSError, ValueError) as error:
                logger.warning("the client certificate (valid until %s) was not renewed: %s",
                               _text(pair.not_after), error)  # fmt: skip
                refused = isinstance(error, CertificateRefusedError)
                await asyncio.sleep(retry.next(at_least=self._pace.after_refusal_seconds if refused else 0.0))
                if rejected:
                    self._rejected.set()

    async def _renew_client(self, kube: KubeClient, pair: Pair, *, rejected: bool) -> None:
        wanted = Wanted(signer=CLIENT_SIGNER, node_name=self._node_name)
        cluster = kube.cluster
        if pair.valid_at(self._now()) and not (rejected and not await self._known(kube)):
            if rejected:
                return
            renewed = await self._obtain(kube, wanted)
        else:
            bootstrap = self._read_bootstrap(needed=True)
            assert bootstrap is not None  # noqa: S101  # needed=True raises
            cluster = bootstrap.cluster
            logger.warning("the client certificate is of no more use; joining again with %s", self._bootstrap_file)
            temporary = KubeClient(cluster, bootstrap.credentials, user_agent=self._user_agent)
            try:
                renewed = await self._obtain(temporary, wanted)
            finally:
                await temporary.close()
        self._keep_client(renewed, cluster)
        kube.set_credentials(_credentials(renewed), cluster=cluster)
        if self._on_client_ca is not None:
            self._on_client_ca(self.client_ca())
        logger.info("the client certificate was renewed; it is valid until %s", _text(renewed.not_after))

    async def _keep_serving_valid(self, kube: KubeClient) -> None:
        retry = RetryBackoff(self._pace.first_retry_seconds, _LONGEST_RETRY_SECONDS)
        refusal = RetryBackoff(self._pace.after_refusal_seconds, _LONGEST_AFTER_REFUSAL_SECONDS)
        planned: Pair | None = None
        deadline = self._now()
        while True:
            names = self._names
            if names is None:
                await self._names_changed.wait()
                self._names_changed.clear()
                continue
            pair = self._serving
            if pair is not None and names in (pair.names, self._served_for):
                if pair is not planned:
                    planned, deadline = pair, pair.renewal_time(self._renewal_share())
                await self._sleep_until(deadline, self._names_changed)
                if self._names_changed.is_set():
                    self._names_changed.clear()
                    if self._names == names:
                        continue
            try:
                await self._renew_serving(kube, self._names or names)
                retry.reset()
                refusal.reset()
                if self._serving is not pair:
                    await self._pause_if_old(self._serving, self._names_changed)
            except CertificatePendingError as error:
                logger.debug("%s", error)
            except CertificateRefusedError as error:
                delay = refusal.next()
                logger.error("%s; asking again in %d s", error, delay)  # noqa: TRY400  # a traceback says no more
                await self._sleep(delay, self._names_changed)
            except (KubeError, CertificateError, OSError) as error:
                logger.warning("no new serving certificate yet: %s", error)
                await self._sleep(retry.next(), self._names_changed)

    async def _renew_serving(self, kube: KubeClient, names: NodeNames) -> None:
        """Raises what ``obtain`` does; ends without a new pair when the names change meanwhile."""
        wanted = Wanted(signer=SERVING_SIGNER, node_name=self._node_name, names=names)
        self._names_changed.clear()
        asking = asyncio.create_task(self._obtain(kube, wanted))
        changed = asyncio.create_task(self._names_changed.wait())
        try:
            await asyncio.wait({asking, changed}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return
            pair = asking.result()
        finally:
            for task in (asking, changed):
                task.cancel()
            await asyncio.gather(asking, changed, return_exceptions=True)
        save_pair(self.serving_path, pair)
        forget(self._pending("serving"))
        # Signers may leave names out or put some in, and would do so again: what was asked for counts.
        self._serving, self._served_for = pair, names
        if not (names.dns <= pair.names.dns and names.ips <= pair.names.ips):
            logger.warning("the serving certificate is for %s, though %s was asked for", pair.names, names)
        if self._on_serving is not None:
            self._on_serving(pair)
        logger.info("serving with a certificate for %s, valid until %s", pair.names, _text(pair.not_after))

    async def _obtain(
        self, kube: KubeClient, wanted: Wanted, *, timeout_seconds: float = _ATTEMPT_LIMIT_SECONDS
    ) -> Pair:
        """See ``obtain``."""
        return await obtain(
            kube,
            wanted,
            pending_file=self._pending(wanted.what),
            timeout_seconds=timeout_seconds,
            report_after_seconds=self._pace.report_pending_seconds,
        )

    def _keep_client(self, pair: Pair, cluster: Cluster) -> None:
        """The order matters to a crash: the pair, then the request it came from, then what points to it."""
        save_pair(self.client_path, pair)
        forget(self._pending("client"))
        self._client = pair
        self._keep_cluster(cluster)

    def _keep_cluster(self, cluster: Cluster) -> None:
        if cluster.client_ca_data is not None:
            if not is_certificate(cluster.client_ca_data):
                raise JoinError(f"{self._bootstrap_file}: the client CA is not a certificate")
            _write_if_different(self.client_ca_path, cluster.client_ca_data.encode())
        else:
            self.client_ca_path.unlink(missing_ok=True)
        document = render_node_kubeconfig(cluster, node_name=self._node_name, pair_path=self.client_path)
        _write_if_different(self._kubeconfig, document)

    def _cluster(self, bootstrap: Kubeconfig | None) -> Cluster:
        """The bootstrap file says where the cluster is now; without one, where it was."""
        if bootstrap is not None:
            return bootstrap.cluster
        try:
            return load_cluster(self._kubeconfig)
        except KubeconfigError as error:
            if not self._kubeconfig.exists():
                raise JoinError(self._explain_no_bootstrap()) from error
            raise JoinError(str(error)) from error

    def _read_bootstrap(self, *, needed: bool) -> Kubeconfig | None:
        if self._bootstrap_file is None or (not needed and not self._bootstrap_file.exists()):
            if needed:
                raise JoinError(self._explain_no_bootstrap())
            return None
        try:
            return load(self._bootstrap_file)
        except KubeconfigError as error:
            raise JoinError(str(error)) from error

    def _explain_no_bootstrap(self) -> str:
        if self._bootstrap_file is not None:
            return f"the node has no client certificate yet and there is no {self._bootstrap_file} to join with"
        return "the node has no valid client certificate; say how to join with --bootstrap-file"

    def _usable(self, pair: Pair) -> bool:
        if pair.common_name != f"system:node:{self._node_name}":
            logger.warning("%s is for %s, not for this node's name", self.client_path, pair.common_name)
            return False
        if not pair.valid_at(self._now()):
            logger.warning("the client certificate was valid until %s; joining again", _text(pair.not_after))
            return False
        return True

    def _pending(self, what: str) -> Path:
        return self._pki / f"{what}.pending.json"

    async def _pause_if_old(self, pair: Pair | None, unless: asyncio.Event) -> None:
        """A new certificate that is due for renewal shows a wrong clock; each further one would be as old."""
        if pair is not None and pair.renewal_time(_RENEW_FROM) <= self._now():
            logger.warning("the certificate that was just signed is valid until %s: is a clock wrong?",
                           _text(pair.not_after))  # fmt: skip
            await self._sleep(self._pace.after_refusal_seconds, unless)

    async def _sleep_until(self, moment: datetime, unless: asyncio.Event) -> None:
        """Until the wall clock says ``moment`` or the event is set."""
        while not unless.is_set():
            left = (moment - self._now()).total_seconds()
            if left <= 0:
                return
            await self._sleep(min(left, _CLOCK_STEP_SECONDS), unless)

    @staticmethod
    async def _sleep(seconds: float, unless: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(seconds):
                await unless.wait()
        except TimeoutError:
            pass


def _credentials(pair: Pair) -> Credentials:
    return Credentials(certificate=pair.certificate, key=pair.key)


def _write_if_different(path: Path, data: bytes) -> None:
    try:
        if path.read_bytes() == data:
            return
    except FileNotFoundError:
        pass
    write_private(path, data)


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
