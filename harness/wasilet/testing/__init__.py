"""What happens in a cluster, watched and judged: behind the pytest plugin and ``demo``."""
