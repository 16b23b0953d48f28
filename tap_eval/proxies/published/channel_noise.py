"""A channel needs bits by the energy that its rounding error adds to the output, relative to the layer's own output.

The error of a channel goes with its squared range, and what it adds with the energy of the input and the fan-in. From
a search whose answers were written by hand (p003, an initialization), run on ResNet-20 at 2.5 bits:

    git show 4f45823:tests/replays/digits.jsonl > digits.jsonl
    tap-agent run --config configs/resnet20-cifar10.yaml --llm replay:digits.jsonl --population 4 --generations 2

Of the 11 candidates that lived it has the most of 2,500 search images right, 86.0 % (84.6 to 87.3) a layer at a time,
and is second by fitness, 0.788; p005 has 0.817 by its rank correlation, with 85.0 % right.
"""


def sensitivity(layers, task):
    scores = []
    for layer in layers:
        fan_in = layer["params"] / layer["out_channels"]
        energy = layer["activation_std"] ** 2 + 1e-9
        noise = fan_in * (layer["input_std"] ** 2 + layer["input_mean"] ** 2)
        scores.append([high**2 * noise / energy for high in layer["channels"]["weight_absmax"]])
    return scores
