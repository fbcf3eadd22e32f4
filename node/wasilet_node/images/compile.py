"""Compilation as the image store sees it.

The cache itself lives below, in ``wasilet_node.runtime.compile``: ``invoke run`` compiles and runs a module without
images."""

from __future__ import annotations

from wasilet_node.runtime.compile import Begins, CompileError, Compiler

__all__ = ["Begins", "CompileError", "Compiler"]
