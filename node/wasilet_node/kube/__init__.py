"""The one door to the API server: requests, watches, errors, retries, events."""
