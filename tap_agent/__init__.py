"""The command line, and everything that puts the parts together."""
