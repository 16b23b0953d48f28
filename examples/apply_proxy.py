"""A proxy written by hand, applied to the digits network through the library: scores, bits, accuracy.

python examples/apply_proxy.py
"""

from __future__ import annotations

from tap_agent.paths import cache_folder
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.images.sources import open_source, split
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.load import load_network
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import score
from tools.sandbox import MontySandbox

PROXY = '''
def sensitivity(layers, task):
    """Rounding errors of a layer grow with its weights and inputs, and count once for each use of a weight."""
    return [layer["weight_std"] * layer["input_std"] * layer["macs"] / layer["params"] for layer in layers]
'''


def main() -> None:
    """Prints the layers with their scores and bits, and what that is worth."""
    cache = cache_folder()
    images = split(open_source("digits"), calibration=None, seed=0)
    task = Task(Choices(weights=(2, 4, 8)), Budget.parse("3bit"))
    ledger = Ledger(cache / "measurements.sqlite")
    bench = Bench("digits", load_network("digits", None, cache).network, images, task, ledger)
    with MontySandbox() as sandbox:
        scored = score(PROXY, [bench], sandbox)
    if isinstance(scored, Rejection):
        raise SystemExit(f"{scored.failure}: {scored.message}")
    (scores,), (allocation,) = scored.scores, scored.allocations
    print(f"{'layer':12} {'weights':>7} {'score':>8}  bits")
    for layer, value, bits in zip(bench.layers, scores, allocation.weights, strict=True):
        print(f"{layer.name:12} {layer.params:7,} {value:8.4f}  {bits}")
    print("full precision", bench.measure(None))
    print("quantized     ", bench.measure(allocation))


if __name__ == "__main__":
    main()
