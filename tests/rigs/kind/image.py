"""Making a kind node image: Debian packages, binaries from the pinned Go modules, and a containerd filled beforehand.

The image is kept by the engine under a tag that names what it was made of, so it is made once per machine (about two
minutes when the binaries are there). Its parts are this folder's ``files``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from wasilet import process
from wasilet.build import apt
from wasilet.controlplane.acquire import acquire
from wasilet.controlplane.binaries import BINARIES
from wasilet.controlplane.gobuild import find_go
from wasilet.errors import HarnessError

from tests.rigs.kind.engine import Engine

FILES = Path(__file__).resolve().parent / "files"
SUITE = "bookworm"
REPOSITORY = "wasilet-kind-node"
BASE = "wasilet-kind-base"
_NODE_PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "containerd", "runc", "containernetworking-plugins", "conntrack", "iptables"),
    *("ethtool", "socat", "iproute2", "kmod", "procps", "mount", "util-linux", "ca-certificates", "hostname", "curl"),
)
_PROGRAMS = (
    *("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy"),
    *("kubelet", "kubeadm", "kubectl", "etcd", "coredns"),
)
_ETCD_TAG = "3.7.0-0"
_PAUSE_TAG = "3.10.2"
_COREDNS_TAG = "v1.14.6"
"""The tags that kubeadm 1.37 asks for; what is inside them is ours."""


def build_go_tool(name: str, *, cache: Path) -> Path:
    """Compile one of ``files``'s small Go programs; Go's own cache makes the second time quick."""
    return build_go_program(FILES / name, cache / "bin" / name)


def build_go_program(source: Path, output: Path) -> Path:
    """Compile a Go program without dependencies to a static executable. Raises HarnessError."""
    go = find_go(os.environ)
    if go.path is None:
        raise HarnessError(f"{source.name} needs Go: {go.problem}")
    output.parent.mkdir(parents=True, exist_ok=True)
    process.run(
        [str(go.path), "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", str(output), "."],
        cwd=source,
        env={**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local", "GOFLAGS": ""},
        timeout_seconds=300,
    )
    return output


def node_image(engine: Engine, *, cache: Path, binaries_cache: Path, say: Callable[[str], None]) -> str:
    """The node image's reference; made when the engine has none of these parts. Raises HarnessError."""
    base = f"{BASE}:{_key(*sorted(_NODE_PACKAGES), SUITE)}"
    image = f"{REPOSITORY}:{_key(base, _files_digest(), *(BINARIES[name].version for name in _PROGRAMS))}"
    if _has(engine, image):
        return image
    say("making a kind node image from Debian packages and Go modules (once per machine)")
    found = acquire(_PROGRAMS, cache=binaries_cache, environ=os.environ, progress=say)
    programs = {name: place.path for name, place in found.items()}
    programs |= {name: build_go_tool(name, cache=cache) for name in ("softrunc", "pause", "corefile")}
    if not _has(engine, base):
        _make_base(engine, base, cache, say)
    engine.docker("tag", base, f"{BASE}:latest")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".image-") as temporary:
        folder = Path(temporary)
        _make_empty_node(engine, programs, folder, say)
        images = _make_images(engine, programs, folder, say)
        _fill(engine, images, image, folder, say)
    return image


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _files_digest() -> str:
    files = sorted(path for path in FILES.rglob("*") if path.is_file())
    return _key(*(f"{path.relative_to(FILES)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files))


def _has(engine: Engine, image: str) -> bool:
    return engine.docker("image", "inspect", "--format", "{{.Id}}", image, check=False).returncode == 0


def _make_base(engine: Engine, tag: str, cache: Path, say: Callable[[str], None]) -> None:
    if missing := apt.missing(["debootstrap"]):
        apt.install(missing, why="the root file system of a kind node", say=say)
    say("debootstrap of the node's root file system")
    with tempfile.TemporaryDirectory(dir=cache, prefix=".root-") as temporary:
        root, archive = Path(temporary) / "root", Path(temporary) / "root.tar"
        process.run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(_NODE_PACKAGES)}", SUITE, str(root)],
            timeout_seconds=900,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            on_line=lambda line: say(line) if line.startswith(("I: Retrieving InRelease", "I: Base system")) else None,
        )
        shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)
        process.run(["tar", "-C", str(root), "-cf", str(archive), "."], timeout_seconds=300)
        engine.docker("import", str(archive), tag, timeout_seconds=300)


def _build(engine: Engine, folder: Path, tag: str, *, dockerfile: str | Path, timeout_seconds: float = 300.0) -> None:
    """``docker build`` by the old builder, which needs no image of its own to run."""
    if isinstance(dockerfile, str):
        (folder / "Dockerfile").write_text(dockerfile, encoding="utf-8")
        dockerfile = folder / "Dockerfile"
    process.run(
        ["docker", "build", "--quiet", "--tag", tag, "--file", str(dockerfile), str(folder)],
        timeout_seconds=timeout_seconds,
        env={**engine.environment, "DOCKER_BUILDKIT": "0"},
    )


def _make_empty_node(engine: Engine, programs: dict[str, Path], folder: Path, say: Callable[[str], None]) -> None:
    say("building the node without its images")
    context = folder / "node"
    shutil.copytree(FILES, context / "files")
    (context / "bin").mkdir()
    for name in ("kubeadm", "kubelet", "kubectl", "softrunc"):
        shutil.copy2(programs[name], context / "bin" / name)
    (context / "kind-version").write_text(f"v{BINARIES['kubelet'].version}\n", encoding="utf-8")
    _build(engine, context, f"{REPOSITORY}:empty", dockerfile=FILES / "Dockerfile")


_PROXY_DOCKERFILE = f"""
FROM {BASE}:latest AS root
COPY proxy-root /
RUN sh /proxy-root
FROM scratch
COPY --from=root /out /
COPY bin/ /usr/local/bin/
ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin
"""
_PROXY_ROOT = r"""
set -eu
mkdir -p /out
for program in xtables-nft-multi xtables-legacy-multi conntrack; do
    path=$(command -v $program)
    cp --parents -L "$path" $(ldd "$path" | grep -o '/[^ )]*') /out
done
for link in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
    ln -s xtables-nft-multi /out/usr/sbin/$link
done
cp -r --parents /usr/lib/*/xtables /out
cp --parents -L $(ldd /usr/lib/*/xtables/*.so | grep -o '/[^ )]*\.so[^ )]*' | grep -v xtables | sort -u) /out
mkdir -p /out/run /out/tmp
"""


def _make_images(engine: Engine, programs: dict[str, Path], folder: Path, say: Callable[[str], None]) -> list[str]:
    """The control plane's images, under the names that kubeadm asks for."""
    say("building the control plane's images")
    version = f"v{BINARIES['kube-apiserver'].version}"
    static = "FROM scratch\nCOPY bin/ /usr/local/bin/\nENV PATH=/usr/local/bin\n"
    tags = {
        "kube-apiserver": (version, static),
        "kube-controller-manager": (version, static),
        "kube-scheduler": (version, static),
        "etcd": (_ETCD_TAG, static),
        "coredns": (_COREDNS_TAG, 'FROM scratch\nCOPY bin/ /\nENTRYPOINT ["/corefile"]\n'),
        "pause": (_PAUSE_TAG, 'FROM scratch\nCOPY bin/pause /pause\nENTRYPOINT ["/pause"]\n'),
        "kube-proxy": (
            version,
            _PROXY_DOCKERFILE,
        ),
    }
    references = []
    for name, (tag, dockerfile) in tags.items():
        context = folder / name
        (context / "bin").mkdir(parents=True)
        for program in (name, "corefile") if name == "coredns" else (name,):
            shutil.copy2(programs[program], context / "bin" / program)
        (context / "proxy-root").write_text(_PROXY_ROOT, encoding="utf-8")
        repository = "coredns/coredns" if name == "coredns" else name
        references.append(f"registry.k8s.io/{repository}:{tag}")
        _build(engine, context, references[-1], dockerfile=dockerfile)
        shutil.rmtree(context)
    return references


def _fill(engine: Engine, images: list[str], tag: str, folder: Path, say: Callable[[str], None]) -> None:
    """Import ``images`` into the node's containerd, where kubelet finds them without a pull."""
    say("filling the node's containerd")
    archive = folder / "images.tar"
    engine.docker("save", "--output", str(archive), *images, timeout_seconds=300)
    container = f"wasilet-kind-fill-{os.getpid()}"
    engine.docker(
        *("run", "--detach", "--name", container, "--privileged", "--entrypoint", "/usr/bin/containerd"),
        *("--volume", f"{archive}:/images.tar:ro", f"{REPOSITORY}:empty"),
    )
    try:
        done = engine.docker(
            *("exec", container, "sh", "-c"),
            "for i in $(seq 100); do ctr version >/dev/null 2>&1 && break; sleep 0.1; done; "
            "exec ctr -n k8s.io images import /images.tar",
            timeout_seconds=300,
        )
        if missing := [image for image in images if image not in done.stdout]:
            raise HarnessError(f"containerd did not import {', '.join(missing)}")
        engine.docker("stop", "--time", "20", container)
        entrypoint = 'ENTRYPOINT ["/usr/local/bin/entrypoint", "/sbin/init"]'
        engine.docker("commit", "--change", entrypoint, container, tag, timeout_seconds=300)
    finally:
        engine.docker("rm", "--force", "--volumes", container, check=False)
        engine.docker("rmi", f"{REPOSITORY}:empty", *images, check=False)
