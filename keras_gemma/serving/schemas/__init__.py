"""Bodies of requests, one file per API."""
