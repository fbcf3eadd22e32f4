"""Images: references, pulls, layouts, the content store, compilation, credentials."""
