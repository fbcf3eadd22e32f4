"""Images and artifacts, as the node reads them and the harness writes them: references, media types, layouts, logins,
and the one client of registries."""
