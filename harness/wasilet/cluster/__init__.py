"""A cluster from nothing to a Ready node and back: ``up``, ``down``, ``status``, joining, and what stays known in
between."""
