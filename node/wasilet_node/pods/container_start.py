"""Starting one instance of a container: image, compiled module, environment, mounts, then the runtime.

Whatever goes wrong becomes a ``ContainerStartError`` with kubelet's waiting reason, the message for the status, and
what the event says. An id that was handed to the runtime is never given up half-way: a cancelled start first waits for
the runtime's answer, so that no instance runs unknown to its pod.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence

from wasilet_common import pod_fields
from wasilet_common.backoff import RetryBackoff
from wasilet_common.cri_log import layout
from wasilet_common.oci.credentials import Credential
from wasilet_common.pod_fields import Container, Pod

from wasilet_node.images.model import EventSink, ImageError, PullPolicy
from wasilet_node.kube.base import KubeError
from wasilet_node.network.attachment import Attachment
from wasilet_node.network.errors import NetworkError
from wasilet_node.pods import resources
from wasilet_node.pods.dependencies import PodDependencies
from wasilet_node.pods.environment import expand_command, process_environment
from wasilet_node.pods.sandboxes import ANNOTATION_SANDBOX
from wasilet_node.pods.security_context import refuse_root
from wasilet_node.pods.server_settings import server_settings
from wasilet_node.runtime.protocol import (
    ContainerConfig,
    ContainerStatus,
    GuestKind,
    RuntimeUnavailableError,
    ServerSettings,
    StartError,
)
from wasilet_node.volumes.base import ContainerConfigError, VolumeError

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 5
ANNOTATION_MODULE = "wasilet.dev/module-digest"
"""On every instance: which module its image was, so that garbage collection knows after a restart of the agent."""


class ContainerStartError(Exception):
    """A container did not start. ``reason`` and the message go into ``state.waiting``."""

    def __init__(self, reason: str, message: str, *, counts: bool = False, at_once: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.counts = counts
        """An instance was attempted: the next try waits as after a crash."""

        self.at_once = at_once
        """The runtime was not there, which passes: no back-off."""


Late = Callable[[ContainerStatus], None]


async def start_container(
    dependencies: PodDependencies, pod: Pod, container: Container, *, attempt: int, sandbox: str, late: Late
) -> ContainerStatus:
    """Start an instance in the pod's sandbox of this id and return its status. Raises ContainerStartError; events are
    written on the way.

    ``late`` gets the status of an instance that came up although the start was cancelled meanwhile.
    """

    def warn(message: str) -> None:
        dependencies.events.event(
            pod, "Warning", "Failed", f"Error: {message}", field_path=pod_fields.field_path(pod, container["name"])
        )

    try:
        config = await _prepare(dependencies, pod, container, attempt, sandbox)
    except ImageError as error:
        # What goes wrong with a pull is reported by the images, in their own events.
        if error.reason == "CreateContainerError":
            warn(error.message)
        raise ContainerStartError(error.reason, error.message) from error
    except (ContainerConfigError, VolumeError) as error:
        warn(str(error))
        raise ContainerStartError("CreateContainerConfigError", str(error)) from error
    dependencies.events.event(
        pod,
        "Normal",
        "Created",
        f"Created container: {container['name']}",
        field_path=pod_fields.field_path(pod, container["name"]),
    )
    if config.network:
        await dependencies.networks.await_policies(pod)
    try:
        started = await _start_uninterrupted(dependencies, config, late)
    except StartError as error:
        warn(str(error))
        raise ContainerStartError("RunContainerError", str(error), counts=True) from error
    except RuntimeUnavailableError as error:
        raise ContainerStartError("RunContainerError", f"the runtime does not answer: {error}", at_once=True) from error
    dependencies.events.event(
        pod,
        "Normal",
        "Started",
        f"Started container {container['name']}",
        field_path=pod_fields.field_path(pod, container["name"]),
    )
    return started


async def _start_uninterrupted(dependencies: PodDependencies, config: ContainerConfig, late: Late) -> ContainerStatus:
    """``runtime.start``, which a cancellation does not interrupt: the caller that cancelled learns what has started.

    It is not stopped here: the one who cancels may be a pod's deletion, which stops all that it knows of, but also the
    end of the agent, and then containers go on.
    """
    task = asyncio.ensure_future(_start(dependencies, config))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=dependencies.timing.stop_timeout)
        if task.done() and not task.cancelled() and task.exception() is None:
            late(task.result())
        task.cancel()
        raise


async def _start(dependencies: PodDependencies, config: ContainerConfig) -> ContainerStatus:
    """Ask again with the same id while the runtime is being replaced: one id never starts twice."""
    retry = RetryBackoff(initial=0.1, maximum=1.0)
    for _ in range(_START_ATTEMPTS - 1):
        try:
            return await dependencies.runtime.start(config)
        except RuntimeUnavailableError as error:
            logger.info("the runtime did not answer, asking again: %s", error)
            await asyncio.sleep(retry.next())
    return await dependencies.runtime.start(config)


async def _prepare(
    dependencies: PodDependencies, pod: Pod, container: Container, attempt: int, sandbox: str
) -> ContainerConfig:
    name = container["name"]

    def event(type_: str, reason: str, message: str) -> None:
        dependencies.events.event(pod, type_, reason, message, field_path=pod_fields.field_path(pod, name))

    # Read before the image is pulled: a mistake in the pod should not cost a download.
    refuse_root(pod, container)
    policy = await dependencies.outbound.policy(pod)
    server = server_settings(pod, container)
    credentials, missing = await _credentials(dependencies, pod)
    try:
        await _image_volumes(dependencies, pod, container, credentials, event)
        image = await dependencies.images.ensure(
            container.get("image", ""),
            policy=_pull_policy(container.get("imagePullPolicy")),
            credentials=credentials,
            event=event,
            pod_uid=pod_fields.uid(pod),
        )
    except ImageError as error:
        _report_missing_secrets(dependencies, pod, missing, error)
        raise
    _report_ports(container, image.kind, attempt, event)
    node = dependencies.node()
    try:
        network = await dependencies.networks.attach(pod, image.kind)
        # A core module has no sockets, so it resolves no names.
        resolves = network is not None and image.kind is GuestKind.COMPONENT
        etc_files = await dependencies.networks.etc_files(pod) if resolves else ()
    except NetworkError as error:
        raise ContainerStartError("CreatePodSandboxError", f"failed to set up the pod's network: {error}") from error
    addresses = network.addresses if network is not None else node.addresses
    environment = await dependencies.environments.build(
        pod, container, pod_ips=addresses, host_ips=node.addresses, allocatable=node.allocatable
    )
    mounts = await dependencies.host_threads.run(
        f'the volumes of container "{name}"',
        lambda: dependencies.volumes.mounts(
            pod, container, environment, attempt=attempt, working_dir=image.working_dir
        ),
    )
    argv = expand_command(container, environment, image)
    if not argv:
        raise ContainerConfigError("no command specified")
    artifact = await dependencies.images.compiled(image, owner=pod["metadata"]["namespace"], event=event)
    return ContainerConfig(
        id=secrets.token_hex(32),
        pod_uid=pod_fields.uid(pod),
        pod_namespace=pod_fields.namespace(pod),
        pod_name=pod_fields.name(pod),
        container_name=name,
        attempt=attempt,
        artifact=str(artifact),
        kind=image.kind,
        argv=argv,
        env=process_environment(environment, pod, container, image),
        mounts=tuple(mounts),
        log_path=str(layout.log_file(dependencies.paths.logs, pod, name, attempt)),
        image=container.get("image", ""),
        image_id=image.image_id,
        memory_limit_bytes=resources.enforced_limit(pod, container, "memory"),
        cpu_limit_millicores=resources.enforced_limit(pod, container, "cpu"),
        cpu_request_millicores=resources.request(container, "cpu"),
        http=policy,
        server=_server(pod, server, network) if image.server else None,
        network=_network_key(network, image.kind),
        etc_files=etc_files,
        stdin=bool(container.get("stdin")),
        stdin_once=bool(container.get("stdinOnce")),
        tty=bool(container.get("tty")),
        annotations={
            ANNOTATION_MODULE: image.module_digest,
            ANNOTATION_SANDBOX: sandbox,
            **resources.held_to(pod, container),
        },
    )


def _report_ports(container: Container, kind: GuestKind, attempt: int, event: Callable[[str, str, str], None]) -> None:
    """Once: nothing will ever answer on the ports of a core module, and nothing else would report it."""
    if kind is GuestKind.MODULE and container.get("ports") and attempt == 0:
        event(
            "Warning",
            "CannotListen",
            f"container {container['name']} names ports, but its image is a core module (WASI preview 1), which cannot "
            "listen: a component (WASI 0.2) can",
        )


def _server(pod: Pod, settings: ServerSettings, network: Attachment | None) -> ServerSettings:
    if network is None and not pod["spec"].get("hostNetwork"):
        raise ContainerConfigError(
            "the component answers HTTP requests, but pods of this node have no network of their own to be reached "
            "by: set hostNetwork to listen on the node's addresses"
        )
    return settings


def _network_key(network: Attachment | None, kind: GuestKind) -> str:
    """A module has no sockets, and what it calls by wasi-experimental-http is judged and reached from the machine."""
    return network.key if network is not None and kind is GuestKind.COMPONENT else ""


def _pull_policy(text: str | None) -> PullPolicy:
    try:
        return PullPolicy(text or "IfNotPresent")
    except ValueError:
        return PullPolicy.IF_NOT_PRESENT


async def _image_volumes(
    dependencies: PodDependencies, pod: Pod, container: Container, credentials: Sequence[Credential], event: EventSink
) -> None:
    """Have the images of those that this container mounts, each time that it starts, as kubelet does. Raises
    ImageError."""
    mounted = {mount["name"] for mount in container.get("volumeMounts") or ()}
    for volume in pod["spec"].get("volumes") or ():
        source = volume.get("image")
        if source is None or volume["name"] not in mounted:
            continue
        files = await dependencies.images.ensure_files(
            source.get("reference", ""),
            policy=_pull_policy(source.get("pullPolicy")),
            credentials=credentials,
            event=event,
            pod_uid=pod_fields.uid(pod),
        )
        try:
            await dependencies.volumes.place_image(pod, volume["name"], files.module_path, files.module_digest)
        except VolumeError as error:
            raise ImageError("CreateContainerError", f'volume "{volume["name"]}": {error}') from error


async def _credentials(dependencies: PodDependencies, pod: Pod) -> tuple[Sequence[Credential], list[str]]:
    """The pod's pull secrets, to which admission has added its service account's; and the names of the missing ones,
    which hinder nothing: the image may be public."""
    found = []
    missing = []
    for reference in pod["spec"].get("imagePullSecrets") or ():
        name = reference.get("name", "")
        try:
            # A pod that restarts its containers need not read them again each time.
            found.append(
                await dependencies.references.secret(
                    pod_fields.namespace(pod), name, pod_uid=pod_fields.uid(pod), max_age_seconds=30.0
                )
            )
        except KubeError:
            missing.append(name)
    return (dependencies.parse_credentials(found) if found else ()), missing


def _report_missing_secrets(dependencies: PodDependencies, pod: Pod, missing: Sequence[str], error: ImageError) -> None:
    """Only of a pull that was tried and failed, as kubelets from 1.37 on do; not again while it is put off."""
    if missing and error.reason == "ErrImagePull":
        dependencies.events.event(
            pod,
            "Warning",
            "FailedToRetrieveImagePullSecret",
            f"Unable to retrieve some image pull secrets ({', '.join(missing)}); "
            "attempting to pull the image may not succeed.",
        )
