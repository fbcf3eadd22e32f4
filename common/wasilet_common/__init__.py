"""What the node and the harness share: formats and rules that must not be written twice. Knows neither of them."""

VERSION = "0.1.0"
"""Of everything in this repository."""
