"""Lifecycle hooks: postStart and preStop, by exec (a fresh instance), httpGet with a host, or sleep."""

from __future__ import annotations

import asyncio
from typing import Any

from wasilet_common import pod_fields
from wasilet_common.pod_fields import Container, Pod

from wasilet_node.network.attachment import Networks
from wasilet_node.pods import handlers
from wasilet_node.pods.handlers import Reach
from wasilet_node.runtime.protocol import Runtime, RuntimeUnavailableError

POST_START_TIMEOUT_SECONDS = 300.0
"""kubelet waits for postStart without end, which would hold a pod's other containers for ever."""


class HookError(Exception):
    """The hook failed; the message is kubelet's."""


async def run_hook(
    runtime: Runtime,
    pod: Pod,
    container: Container,
    container_id: str,
    hook: dict[str, Any],
    *,
    timeout_seconds: float,
    networks: Networks | None = None,
) -> None:
    """Carry out one handler within ``timeout_seconds``. Raises HookError."""
    reach = Reach.of(networks, pod) if networks is not None else Reach()
    where = f'Container "{container["name"]}" in Pod "{pod_fields.format_pod(pod)}"'
    if "exec" in hook:
        command = [str(word) for word in hook["exec"].get("command") or ()]
        what = f"Exec lifecycle hook ([{' '.join(command)}]) for {where}"
        try:
            outcome = await handlers.run_command(runtime, container_id, command, timeout_seconds=timeout_seconds)
        except (handlers.HandlerError, RuntimeUnavailableError) as error:
            raise HookError(f"{what} failed - error: {error}") from error
        if not outcome.ok:
            raise HookError(f'{what} failed - error: command failed, message: "{outcome.output}"')
    elif "httpGet" in hook:
        what = f"HTTP lifecycle hook ({hook['httpGet'].get('path', '')}) for {where}"
        try:
            outcome = await handlers.http_get(hook["httpGet"], container, reach=reach, timeout_seconds=timeout_seconds)
        except handlers.HandlerError as error:
            raise HookError(f"{what} failed - error: {error}") from error
        # kubelet looks only at whether the request could be made, not at the status that came back.
        if not outcome.ok and not outcome.output.startswith("HTTP probe failed with statuscode"):
            raise HookError(f"{what} failed - error: {outcome.output}")
    elif "sleep" in hook:
        seconds = float(hook["sleep"].get("seconds", 0))
        if seconds > timeout_seconds:
            await asyncio.sleep(timeout_seconds)
            raise HookError(
                f"Sleep lifecycle hook ({seconds:g}) for {where} failed - "
                "error: container terminated before sleep hook finished"
            )
        await asyncio.sleep(seconds)
    elif "tcpSocket" in hook:
        outcome = await handlers.tcp_connect(hook["tcpSocket"], container, reach=reach, timeout_seconds=timeout_seconds)
        if not outcome.ok:
            raise HookError(f"TCP lifecycle hook for {where} failed - error: {outcome.output}")
