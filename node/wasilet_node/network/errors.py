"""What goes wrong with the pod network."""

from __future__ import annotations


class NetworkError(Exception):
    """A pod's or the node's network could not be had; the message is for events and the log."""


class AddressesExhaustedError(NetworkError):
    """Every address of the Node's podCIDR is taken."""


class NetworkAbsentError(NetworkError):
    """This machine, or its settings, allow no pod network: pods then share the machine's, as the message explains."""
