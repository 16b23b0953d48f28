"""Measured allocations in a file, against which anything that foretells them can be held."""
