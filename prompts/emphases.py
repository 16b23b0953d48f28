"""What agents that are asked for the same are told to look at, so that they do not all have the same idea."""

from __future__ import annotations

EMPHASES = {
    "structure": "let the architecture say more: first and last layers, depthwise ones, strides, ends of blocks, "
    "and how wide and how large a layer is beside its neighbours",
    "statistics": "let other statistics of weights, inputs or outputs say it, of layers or of their channels",
    "exponents": "ask of each factor how steeply the score should follow it, and derive that from how rounding errors "
    "arise and reach the output",
    "simplification": "say it with fewer factors, each of which has a reason; drop what is there for one network alone",
    "transfer": "make it hold for networks and budgets that are not here: ratios within the network in place of "
    "absolute numbers, no thresholds that were fitted",
}
"""what each is called, and how it is put"""
