"""The environment and the command line of a container.

Two layers, as between kubelet and a container runtime. ``EnvironmentBuilder.build`` gives what kubelet would hand over:
envFrom, env and service variables; ``$(NAME)`` sees those and nothing else. ``process_environment`` then puts the
image's variables and what runtimes set (PATH, HOSTNAME, HOME) below them. The order of precedence and the messages are
those of kubelet's ``makeEnvironmentVariables``.

A module's environment is text: a Secret's bytes that are not UTF-8 cannot be a variable (kubelet fails there too, later
and with a message about gRPC), nor can a value with a NUL.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from wasilet_node.images.model import Image
from wasilet_node.kube import fields
from wasilet_node.kube.base import KubeError, KubeObject, NotFoundError
from wasilet_node.kube.expansion import expand, mapping_for
from wasilet_node.kube.references import References
from wasilet_node.pods import envfiles
from wasilet_node.pods.service_environment import service_environment
from wasilet_node.volumes.base import Container, ContainerConfigError, Pod, Volumes

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class EnvironmentBuilder:
    """Builds environments; one object per node."""

    def __init__(self, references: References, volumes: Volumes) -> None:
        self._references = references
        self._volumes = volumes

    async def build(
        self,
        pod: Pod,
        container: Container,
        *,
        pod_ips: Sequence[str],
        host_ips: Sequence[str],
        allocatable: Mapping[str, str],
    ) -> dict[str, str]:
        """kubelet's variables of one container: those of envFrom and env in the order of the manifest, then services.

        ``allocatable`` is the node's, as quantities. Pass the result to ``expand_command`` and to
        ``Volumes.mounts``, and through ``process_environment`` to the runtime. Raises ContainerConfigError.
        """
        spec = pod.get("spec", {})
        try:
            services = await self._references.services(pod["metadata"]["namespace"])
            service_variables = service_environment(
                services, pod["metadata"]["namespace"], links=spec.get("enableServiceLinks", True) is not False
            )
            sources = _Sources(self._references, pod)
            variables: dict[str, str] = {}
            for source in container.get("envFrom") or []:
                variables |= await sources.all_of(source)
            mapping = mapping_for(variables, service_variables)
            for entry in container.get("env") or []:
                name, value = str(entry["name"]), entry.get("value") or ""
                if value:
                    variables[name] = expand(value, mapping)
                    continue
                origin = entry.get("valueFrom") or {}
                found: str | None = ""
                if reference := origin.get("fieldRef"):
                    found = fields.environment_field(
                        pod,
                        str(reference.get("fieldPath", "")),
                        pod_ips=pod_ips,
                        host_ips=host_ips,
                        api_version=str(reference.get("apiVersion") or "v1"),
                    )
                elif reference := origin.get("resourceFieldRef"):
                    found = fields.resource_field(pod, reference, allocatable, container=container)
                elif reference := origin.get("configMapKeyRef"):
                    found = await sources.config_map_key(reference)
                elif reference := origin.get("secretKeyRef"):
                    found = await sources.secret_key(reference)
                elif reference := origin.get("fileKeyRef"):
                    found = await self._file_key(pod, reference)
                elif origin:
                    kind = next(iter(origin))
                    raise ContainerConfigError(f"env {name}: valueFrom.{kind} is not supported by this node")
                if found is not None:
                    variables[name] = found
        except fields.FieldError as error:
            raise ContainerConfigError(str(error)) from error
        except KubeError as error:
            raise ContainerConfigError(str(error)) from error
        for name, value in service_variables.items():
            variables.setdefault(name, value)
        for name, value in variables.items():
            if "\0" in value or "\0" in name:
                raise ContainerConfigError(f"environment variable {name!r} contains a NUL byte")
        return variables

    async def _file_key(self, pod: Pod, reference: Mapping[str, Any]) -> str | None:
        """A variable of a file; None: it is not there, and need not be. An empty value counts as none, as in kubelet.

        A missing file is like a missing key, as the API's description of ``optional`` has it.
        """
        volume, path, key = (str(reference.get(name) or "") for name in ("volumeName", "path", "key"))
        data = await self._volumes.read_file(pod, volume, path, limit_bytes=envfiles.MAX_BYTES)
        try:
            value = envfiles.value_of((data or b"").decode(), key)
        except ValueError as error:
            reason = error if isinstance(error, envfiles.EnvFileError) else "it is not UTF-8"
            raise ContainerConfigError(f'couldn\'t parse env file "{path}" of volume "{volume}": {reason}') from error
        if value:
            return value
        if reference.get("optional"):
            return None
        raise ContainerConfigError(f'environment variable key "{key}" not found in file "{path}" of volume "{volume}"')


class _Sources:
    """The Secrets and ConfigMaps of one build: each is read once, so that all variables see the same state."""

    def __init__(self, references: References, pod: Pod) -> None:
        self._references = references
        self._namespace = str(pod["metadata"]["namespace"])
        self._uid = str(pod["metadata"]["uid"])
        self._read: dict[tuple[str, str], KubeObject] = {}

    async def _get(self, kind: str, reference: Mapping[str, Any]) -> KubeObject | None:
        name = str(reference.get("name", ""))
        if (kind, name) not in self._read:
            read = self._references.secret if kind == "Secret" else self._references.config_map
            try:
                self._read[kind, name] = await read(self._namespace, name, pod_uid=self._uid)
            except NotFoundError:
                if reference.get("optional"):
                    return None
                raise
        return self._read[kind, name]

    async def all_of(self, source: Mapping[str, Any]) -> dict[str, str]:
        prefix = str(source.get("prefix") or "")
        if reference := source.get("configMapRef"):
            found = await self._get("ConfigMap", reference)
            return {prefix + key: str(text) for key, text in sorted(((found or {}).get("data") or {}).items())}
        if reference := source.get("secretRef"):
            found = await self._get("Secret", reference)
            data = (found or {}).get("data") or {}
            return {prefix + key: self._text(reference, key, data[key]) for key in sorted(data)}
        return {}

    async def config_map_key(self, reference: Mapping[str, Any]) -> str | None:
        return await self._key("ConfigMap", reference)

    async def secret_key(self, reference: Mapping[str, Any]) -> str | None:
        found = await self._key("Secret", reference)
        return None if found is None else self._text(reference, str(reference["key"]), found)

    async def _key(self, kind: str, reference: Mapping[str, Any]) -> str | None:
        found = await self._get(kind, reference)
        if found is None:
            return None
        key = str(reference.get("key", ""))
        data = found.get("data") or {}
        if key in data:
            return str(data[key])
        if reference.get("optional"):
            return None
        raise ContainerConfigError(f"couldn't find key {key} in {kind} {self._namespace}/{reference.get('name', '')}")

    def _text(self, reference: Mapping[str, Any], key: str, encoded: str) -> str:
        where = f"key {key} in Secret {self._namespace}/{reference.get('name', '')}"
        try:
            return base64.b64decode(encoded, validate=True).decode()
        except UnicodeDecodeError:
            raise ContainerConfigError(f"{where} is not UTF-8, so it cannot be an environment variable") from None
        except binascii.Error:
            raise ContainerConfigError(f"{where} is not base64") from None


def expand_command(container: Container, environment: Mapping[str, str], image: Image) -> tuple[str, ...]:
    """The argv of a container.

    ``command`` replaces the image's entrypoint and cmd, ``args`` its cmd, and ``$(NAME)`` is expanded in both from
    ``environment`` (what ``build`` gave); the image's own message are taken as they are. Without ``command`` and
    entrypoint, argv[0] is the module's name, unless the image's cmd stands alone and so begins with it.
    """
    mapping = mapping_for(environment)
    command = tuple(expand(str(word), mapping) for word in container.get("command") or [])
    args = tuple(expand(str(word), mapping) for word in container.get("args") or [])
    if command:
        return command + args
    if image.entrypoint:
        return image.entrypoint + (args or image.cmd)
    if image.cmd and not args:
        return image.cmd
    return (image.module_name or image.module_path.name, *args)


def process_environment(
    environment: Mapping[str, str], pod: Pod, container: Container, image: Image
) -> tuple[tuple[str, str], ...]:
    """All variables of the process: PATH and HOME, the image's, HOSTNAME, then ``environment``, each overriding those
    before, as containerd and runc do it.

    PWD is set when a working directory is: Go's WASI port takes its own from there, since a module has no other way to
    learn it. Raises FieldError, as ``fields.process_hostname``.
    """
    variables = {"PATH": _DEFAULT_PATH, "HOME": "/"}
    working_dir = container.get("workingDir") or image.working_dir
    if working_dir:
        variables["PWD"] = str(working_dir)
    variables |= dict(image.env)
    variables["HOSTNAME"] = fields.process_hostname(pod)
    variables |= environment
    return tuple(variables.items())
