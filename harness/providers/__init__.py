"""Cluster providers: host, kind, k3d, minikube, existing."""
