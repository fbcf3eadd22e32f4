"""Volumes: one file per kind, one interface."""
