"""Runs in the browser: the page of `tap-agent ui`."""
