"""Volumes: one file a kind, one interface."""
