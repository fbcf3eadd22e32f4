"""The component host: a small Rust library that runs components inside the sandbox.

Its crate is ``node/component_host``, whose README is the guide to it. Here is Python's side: where the library is
(``locate``), how it is made (``build``), how it is entered (``library``, ``entry``), and what it counts (``counters``).
"""
