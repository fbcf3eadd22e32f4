"""Sphinx's settings. The pages are Markdown that is read on its own too, so nothing but MyST's basics is used."""  # noqa: INP001

project = "Wasilet"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "requirements.in"]
html_theme = "furo"
html_title = "Wasilet"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
myst_heading_anchors = 4
# Anchors as GitHub makes them, so that a link works in both places.
suppress_warnings = ["myst.xref_ambiguous"]
