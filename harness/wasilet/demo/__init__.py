"""An app from its folder to an asserted log line: samples, templates, expectations, ``invoke demo``."""
