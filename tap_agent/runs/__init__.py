"""Runs as they are kept: folders, results, checkpoints, and how far each has come."""
