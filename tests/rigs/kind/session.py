"""kind for a test session: on the Docker that runs, with kind's own node image; else on an engine and an image of the
rig's own, on a machine that allows it (root, Debian). Elsewhere it is said why not, and the tests are skipped.

``WASILET_TEST_KIND_IMAGE=rig`` asks for the rig's image on an engine that runs already, as on a machine that can pull
none; any other value is an image to use.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasilet import process
from wasilet.build import apt
from wasilet.controlplane.gobuild import find_go
from wasilet.errors import HarnessError
from wasilet.settings import cache_root

from tests.rigs.kind.engine import Engine, answers, docker_engine
from tests.rigs.kind.image import build_go_program, build_go_tool, node_image

IMAGE = "WASILET_TEST_KIND_IMAGE"
LINUX = Path(__file__).resolve().parent.parent / "linux"
_CONFIG = """\
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes:
  - role: control-plane
    kubeadmConfigPatches:
      - |
        kind: InitConfiguration
        skipPhases: [preflight]
{extra}      - |
        kind: KubeletConfiguration
        failCgroupV1: false
"""
"""kubelet starts on control groups of version 1 only when told to (since 1.35), and this machine may have them. kind
0.33 leaves kubeadm's preflight out by this list, which takes the place of its own."""

_TAINTED = """\
        nodeRegistration:
          taints:
            - {{key: node-role.kubernetes.io/control-plane, effect: NoSchedule}}
            - {{key: {key}, effect: {effect}}}
"""
"""kind takes the first one away again, and fails when it is not there."""


class RigUnavailableError(HarnessError):
    """kind cannot be had on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class KindRig:
    """Where tests make kind clusters."""

    engine: Engine
    image: str
    """For ``--image``; empty: kind's own."""

    folder: Path
    """For configuration files; private."""

    def config(self, *, linux_taint: str = "") -> Path:
        """A cluster configuration for ``--config``; its node with a taint (``key:Effect``), or with none."""
        key, _, effect = linux_taint.partition(":")
        path = self.folder / ("tainted.yaml" if key else "plain.yaml")
        extra = _TAINTED.format(key=key, effect=effect) if key else ""
        path.write_text(_CONFIG.format(extra=extra), encoding="utf-8")
        return path

    def push_linux(self, registry: str, docker_config: Path) -> str:
        """Build the Linux image of ``tests/rigs/linux``, push it with Docker, and return its reference.
        ``docker_config``: the folder with the registry's login."""
        reference = f"{registry}/linux:v1"
        binary = build_go_program(LINUX, self.folder / "linux")
        context = self.folder / "image"
        context.mkdir(exist_ok=True)
        binary.replace(context / "linux")
        (context / "Dockerfile").write_text(
            'FROM scratch\nCOPY linux /linux\nENTRYPOINT ["/linux"]\n', encoding="utf-8"
        )
        process.run(
            ["docker", "build", "--quiet", "--tag", reference, str(context)],
            timeout_seconds=120,
            env={**self.engine.environment, "DOCKER_BUILDKIT": "0"},
        )
        process.run(
            ["docker", "push", reference],
            timeout_seconds=120,
            env={**self.engine.environment, "DOCKER_CONFIG": str(docker_config)},
        )
        self.engine.docker("rmi", "--force", reference)
        return reference


@contextlib.contextmanager
def kind_rig(folder: Path, *, say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> Iterator[KindRig]:
    """For as long as the block runs. Raises RigUnavailableError, and HarnessError when what should work does not."""
    binaries = cache_root(environ)
    cache = binaries / "rigs"
    wanted = environ.get(IMAGE, "")
    if answers(dict(environ)):
        engine = Engine(environment=dict(environ), softened=False)
        image = node_image(engine, cache=cache, binaries_cache=binaries, say=say) if wanted == "rig" else wanted
        yield KindRig(engine=engine, image=image, folder=folder)
        return
    if why := unavailable(environ):
        raise RigUnavailableError(why)
    cache.mkdir(parents=True, exist_ok=True)
    softrunc = build_go_tool("softrunc", cache=cache)
    with docker_engine(cache=cache, softrunc=softrunc, say=say) as engine:
        image = node_image(engine, cache=cache, binaries_cache=binaries, say=say)
        yield KindRig(engine=engine, image=image, folder=folder)


def unavailable(environ: Mapping[str, str]) -> str:
    """Why no Docker engine can be started here; empty when one can."""
    if os.geteuid() != 0:
        return "no Docker engine runs, and only root could start one"
    if not apt.available(environ):
        return "no Docker engine runs, and without apt none can be installed"
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    if release.get("VERSION_CODENAME") != "bookworm":
        return f"no Docker engine runs, and the rig is made for Debian 12, not {release.get('PRETTY_NAME', 'this')}"
    go = find_go(environ)
    return f"no Docker engine runs, and the rig's node image needs Go: {go.problem}" if go.path is None else ""
