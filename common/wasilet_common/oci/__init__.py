"""Images and artifacts, as the node reads them and the harness writes them: references and media types."""
