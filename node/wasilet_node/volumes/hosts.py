"""The contents of ``/etc/hosts``, with the text of kubelet's managed hosts file.

Every container has the file, as with kubelet, unless it mounts something of its own there. It is given in a folder
preopened as ``/etc``, which would hide what a volume mounted at ``/`` has there: with such a volume, only pods that ask
for aliases get it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wasilet_node.kube import fields
from wasilet_node.volumes.base import Pod

PATH = "/etc/hosts"
_HEADER = "# Kubernetes-managed hosts file.\n"
_HOST_NETWORK_HEADER = "# Kubernetes-managed hosts file (host network).\n"
_LOCAL = (
    "127.0.0.1\tlocalhost\n"
    "::1\tlocalhost ip6-localhost ip6-loopback\n"
    "fe00::0\tip6-localnet\n"
    "fe00::0\tip6-mcastprefix\n"
    "fe00::1\tip6-allnodes\n"
    "fe00::2\tip6-allrouters\n"
)


def content(pod: Pod, pod_ips: Sequence[str], cluster_domain: str, *, node_hosts: Path = Path(PATH)) -> bytes:
    """The whole file. A hostNetwork pod gets the machine's, with its aliases added."""
    spec = pod.get("spec", {})
    if spec.get("hostNetwork"):
        try:
            text = _HOST_NETWORK_HEADER + node_hosts.read_text(errors="replace")
        except OSError:
            text = _HOST_NETWORK_HEADER + _LOCAL
    else:
        name, domain = fields.hostname(pod), fields.host_domain(pod, cluster_domain)
        names = f"{name}.{domain}\t{name}" if domain else name
        text = _HEADER + _LOCAL + "".join(f"{address}\t{names}\n" for address in pod_ips)
    aliases = spec.get("hostAliases") or []
    if aliases:
        text += "\n# Entries added by HostAliases.\n"
        text += "".join(f"{alias['ip']}\t{chr(9).join(alias.get('hostnames') or [])}\n" for alias in aliases)
    return text.encode()
