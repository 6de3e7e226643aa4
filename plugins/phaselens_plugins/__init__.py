"""The metrics that come with PhaseLens, a file each, written against the public plugin API."""
