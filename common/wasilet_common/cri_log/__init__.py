"""The log of a container, in CRI's format: where it lies, what a record is, who writes it, who reads it.

The supervisor writes, the agent removes, the kubelet API and termination messages read; all of them by this package, so
that a name or a tag is decided in one place. Sources: KEP-1602 (CRI logging), kubelet's container log manager, and
cri-client/pkg/logs.
"""
