"""The control plane of the ``host`` provider: binaries, PKI, components."""
