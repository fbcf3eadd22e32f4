"""What binaries the control plane needs: where each comes from and how its version is found.

The versions are those of ``versions.toml``, to which the ``go.mod`` files beside it are held: one pin, used for every
source, so that a binary found on PATH, one that was downloaded and one that was built are the same release.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from wasilet.controlplane.versions import HERE, default_kubernetes, minor_of, versions

_KUBERNETES_VERSION_VARIABLES = (
    "k8s.io/component-base/version.gitVersion={version}",
    "k8s.io/component-base/version.gitMajor={major}",
    "k8s.io/component-base/version.gitMinor={minor}",
    "k8s.io/component-base/version.gitTreeState=clean",
    "k8s.io/client-go/pkg/version.gitVersion={version}",
    "k8s.io/client-go/pkg/version.gitMajor={major}",
    "k8s.io/client-go/pkg/version.gitMinor={minor}",
)


@dataclass(frozen=True, kw_only=True)
class Binary:
    """One executable: a package of a pinned Go module, and a file of that module's official release."""

    name: str
    pin: str
    """The folder beside this module whose go.mod pins it."""

    module: str
    package: str
    version_argv: tuple[str, ...] = ("--version",)
    version_pattern: str = r"v?(\d+\.\d+\.\d+)"
    linker_variables: tuple[str, ...] = ()
    """Templates of ``-X`` values; ``go build`` of a module knows no version by itself."""

    release_url: str = ""
    """Template of the download; empty: the project publishes none that Wasilet can use."""

    checksum_url: str = ""
    """Template of the published checksum: either a bare SHA-256 or lines ``<sha256>  <file>``."""

    archive_member: str = ""
    """Template of the path inside a .tar.gz; empty: the download is the executable itself."""

    @property
    def version(self) -> str:
        """The pinned version, as ``1.37.2``."""
        pin, _, minor = self.pin.partition("/")
        return versions().kubernetes[minor] if minor else versions().others[pin]

    @property
    def minimum_go(self) -> tuple[int, int]:
        """What the pin's go.mod asks for. Raises ValueError when it asks for nothing."""
        text = (HERE / self.pin / "go.mod").read_text(encoding="utf-8")
        found = re.search(r"^go (\d+)\.(\d+)", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"{self.pin}/go.mod names no version of Go")
        return int(found.group(1)), int(found.group(2))

    def fields(self, version: str, architecture: str) -> Mapping[str, str]:
        """What the templates above may name."""
        major, minor, *_ = version.split(".")
        return {
            "name": self.name,
            "version": f"v{version}",
            "number": version,
            "major": major,
            "minor": minor,
            "arch": architecture,
        }


def go_architecture(machine: str | None = None) -> str:
    """Go's name of a machine, by default this one. Raises ValueError for one that Wasilet does not run on."""
    machine = machine or platform.machine()
    names = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
    try:
        return names[machine]
    except KeyError:
        raise ValueError(f"no binaries for {machine}: Wasilet runs on x86_64 and arm64") from None


def _kubernetes(name: str, minor: str, *, version_argv: tuple[str, ...] = ("--version",)) -> Binary:
    return Binary(
        name=name,
        pin=f"kubernetes/{minor}",
        module="k8s.io/kubernetes",
        package=f"k8s.io/kubernetes/cmd/{name}",
        version_argv=version_argv,
        linker_variables=_KUBERNETES_VERSION_VARIABLES,
        release_url="https://dl.k8s.io/{version}/bin/linux/{arch}/{name}",
        checksum_url="https://dl.k8s.io/{version}/bin/linux/{arch}/{name}.sha256",
    )


def _all_of_kubernetes(minor: str) -> tuple[Binary, ...]:
    return (
        _kubernetes("kube-apiserver", minor),
        _kubernetes("kube-controller-manager", minor),
        _kubernetes("kube-scheduler", minor),
        _kubernetes("kube-proxy", minor),
        _kubernetes("kubelet", minor),
        _kubernetes("kubeadm", minor, version_argv=("version", "-o", "short")),
        _kubernetes("kubectl", minor, version_argv=("version", "--client")),
    )


_OTHERS = (
    Binary(
        name="etcd",
        pin="etcd",
        module="go.etcd.io/etcd/server/v3",
        package="go.etcd.io/etcd/server/v3",
        release_url="https://github.com/etcd-io/etcd/releases/download/{version}/etcd-{version}-linux-{arch}.tar.gz",
        checksum_url="https://github.com/etcd-io/etcd/releases/download/{version}/SHA256SUMS",
        archive_member="etcd-{version}-linux-{arch}/etcd",
    ),
    Binary(
        name="registry",
        pin="registry",
        module="github.com/distribution/distribution/v3",
        package="github.com/distribution/distribution/v3/cmd/registry",
        version_pattern=r" v?(\d+\.\d+\.\d+)",
        linker_variables=("github.com/distribution/distribution/v3/version.version={version}",),
        release_url=(
            "https://github.com/distribution/distribution/releases/download/{version}/"
            "registry_{number}_linux_{arch}.tar.gz"
        ),
        checksum_url=(
            "https://github.com/distribution/distribution/releases/download/{version}/"
            "registry_{number}_linux_{arch}.tar.gz.sha256"
        ),
        archive_member="registry",
    ),
    Binary(
        name="coredns",
        pin="coredns",
        module="github.com/coredns/coredns",
        package="wasilet.dev/coredns",
        version_argv=("-version",),
        version_pattern=r"CoreDNS-(\d+\.\d+\.\d+)",
        release_url=(
            "https://github.com/coredns/coredns/releases/download/{version}/coredns_{number}_linux_{arch}.tgz"
        ),
        checksum_url=(
            "https://github.com/coredns/coredns/releases/download/{version}/coredns_{number}_linux_{arch}.tgz.sha256"
        ),
        archive_member="coredns",
    ),
    Binary(
        name="kind",
        pin="kind",
        module="sigs.k8s.io/kind",
        package="sigs.k8s.io/kind",
        release_url="https://github.com/kubernetes-sigs/kind/releases/download/{version}/kind-linux-{arch}",
        checksum_url="https://github.com/kubernetes-sigs/kind/releases/download/{version}/kind-linux-{arch}.sha256sum",
    ),
)


def binaries(kubernetes: str = "") -> Mapping[str, Binary]:
    """All of them by name, those of Kubernetes of that version or minor; empty: the newest. Raises KeyError for a
    minor that is not supported."""
    minor = minor_of(kubernetes or default_kubernetes())
    versions().kubernetes[minor]
    return MappingProxyType({binary.name: binary for binary in (*_all_of_kubernetes(minor), *_OTHERS)})


BINARIES = binaries()
HOST_PROVIDER = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "registry")
"""What ``up`` needs on the ``host`` provider."""
LATER = ("kubectl", "kube-proxy", "coredns")
"""What no node needs to be Ready: brought after it, where minutes of building would come before the first log line."""
