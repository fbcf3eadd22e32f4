"""The kubelet's HTTPS API."""
