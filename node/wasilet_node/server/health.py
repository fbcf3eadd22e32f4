"""``/healthz`` and ``/configz``: whether the agent works, and the configuration it works by.

Sources: k8s.io/apiserver/pkg/server/healthz and k8s.io/component-base/configz; the fields of ``kubeletconfig`` are
those of KubeletConfiguration (kubelet.config.k8s.io/v1beta1) that mean something here, with the values in force.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web
from wasilet_common.time_format import go_duration

from wasilet_node.server.auth import ALLOW_TTL_SECONDS, AUTHENTICATION_TTL_SECONDS, DENY_TTL_SECONDS
from wasilet_node.settings import NodeSettings

logger = logging.getLogger(__name__)


class HealthViews:
    """The handlers of the two routes."""

    def __init__(self, *, settings: NodeSettings, healthy: Callable[[], str | None]) -> None:
        self._settings = settings
        self._checks: dict[str, Callable[[], str | None]] = {
            "ping": lambda: None,
            "log": lambda: None,
            "syncloop": healthy,
        }

    async def healthz(self, request: web.Request) -> web.Response:
        """``GET /healthz``: ``ok``, or 500 with a line for each check; ``verbose`` lists them in any case."""
        excluded = set(request.query.getall("exclude", []))
        lines, failed = [], False
        for name, check in self._checks.items():
            if name in excluded:
                lines.append(f"[+]{name} excluded: ok")
            elif (problem := check()) is None:
                lines.append(f"[+]{name} ok")
            else:
                logger.warning("health check %s failed: %s", name, problem)
                lines.append(f"[-]{name} failed: reason withheld")
                failed = True
        if failed:
            return web.Response(status=500, text="\n".join([*lines, "healthz check failed", ""]))
        if "verbose" in request.query:
            return web.Response(text="\n".join([*lines, "healthz check passed", ""]))
        return web.Response(text="ok")

    async def check(self, request: web.Request) -> web.Response:
        """``GET /healthz/<check>``."""
        check = self._checks.get(request.match_info["check"])
        if check is None:
            raise web.HTTPNotFound
        problem = check()
        if problem is not None:
            return web.Response(status=500, text=f"internal server error: {problem}\n")
        return web.Response(text="ok")

    async def configz(self, _: web.Request) -> web.Response:
        """``GET /configz``: ``{"kubeletconfig": {...}}``."""
        settings = self._settings
        return web.json_response(
            {
                "kubeletconfig": {
                    "enableServer": True,
                    "address": settings.bind_address or settings.node_ip or "",
                    "port": settings.port,
                    "serverTLSBootstrap": True,
                    "rotateCertificates": True,
                    "tlsMinVersion": "VersionTLS12",
                    "authentication": {
                        "x509": {},
                        "webhook": {"enabled": True, "cacheTTL": go_duration(AUTHENTICATION_TTL_SECONDS)},
                        "anonymous": {"enabled": False},
                    },
                    "authorization": {
                        "mode": "Webhook",
                        "webhook": {
                            "cacheAuthorizedTTL": go_duration(ALLOW_TTL_SECONDS),
                            "cacheUnauthorizedTTL": go_duration(DENY_TTL_SECONDS),
                        },
                    },
                    "enableDebuggingHandlers": True,
                    "enableSystemLogHandler": False,
                    "enableProfilingHandler": False,
                    "enableDebugFlagsHandler": False,
                    "nodeStatusUpdateFrequency": go_duration(settings.status_interval_seconds),
                    "nodeStatusReportFrequency": go_duration(settings.status_report_interval_seconds),
                    "nodeLeaseDurationSeconds": settings.lease_duration_seconds,
                    "maxPods": settings.max_pods,
                    "containerLogMaxSize": str(settings.logs.max_size_bytes),
                    "containerLogMaxFiles": settings.logs.max_files,
                    "imageMinimumGCAge": go_duration(settings.images.gc_minimum_age_seconds),
                    "imageGCHighThresholdPercent": settings.images.gc_high_threshold_percent,
                    "imageGCLowThresholdPercent": settings.images.gc_low_threshold_percent,
                    "maxParallelImagePulls": settings.images.max_parallel_pulls,
                    "serializeImagePulls": False,
                    "registerNode": True,
                    "providerID": settings.provider_id or "",
                }
            }
        )
