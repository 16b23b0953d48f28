"""A layer needs bits by the norm of its weights times the entropy of its output, damped where early outputs are large.

Table 2 of "Training-free Automatic Proxy Discovery via Large Language Models" (Kang, Du, Lin 2025):
`||W_ij||_2 H(A_ij) e^(-A/i)`. The paper does not say what the A of the exponent is, nor where i begins; here it is the
mean magnitude of the output, as the root of its mean square, and i counts layers from 1.
"""

import math


def sensitivity(layers, task):
    return [
        layer["weight_l2"]
        * layer["activation_entropy"]
        * math.exp(-math.sqrt(layer["activation_power"]) / (layer["index"] + 1))
        for layer in layers
    ]
