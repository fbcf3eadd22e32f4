"""The one entry point to the API server: requests, watches, errors, retries, events."""
