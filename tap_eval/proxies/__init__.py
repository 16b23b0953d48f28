"""A proxy and how it fails, the features that it sees, and fitness."""
