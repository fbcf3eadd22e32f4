"""The pod network: addresses, network namespaces and what joins them. Linux only, by netlink alone."""
