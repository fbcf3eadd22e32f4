"""Tools of those who work on Wasilet: benchmarks, the makers of the documentation, the test runner. Not in the
wheel."""
