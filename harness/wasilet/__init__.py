"""Wasilet's harness: stands a local Kubernetes cluster up around the node agent, and drives it."""
