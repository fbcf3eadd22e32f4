"""Wasilet's harness: creates a local Kubernetes cluster around the node agent, and drives it."""

from wasilet_common import VERSION

__version__ = VERSION
