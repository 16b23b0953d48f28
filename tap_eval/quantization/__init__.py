"""Integers and scales, calibration, the simulated path that defines what is right, and the integer path."""
