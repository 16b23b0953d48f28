"""What an agent may measure, however it asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tap_eval.measuring.bench import Bench
from tools.sandbox import MontySandbox
from tools.toolbox import Draft, make_tools

GOOD = "def sensitivity(layers, task):\n    return [(x['params'] + 1) ** -0.{} for x in layers]\n"
BAD = "def sensitivity(layers, task):\n    return [1 / 0 for x in layers]\n"


def test_calls_side_by_side_share_the_allowance_and_a_failure_takes_none_of_it(
    bench: Bench, sandbox: MontySandbox
) -> None:
    drafts: list[Draft] = []
    _, measure, _ = make_tools([bench], sandbox, 2, drafts=drafts)
    assert "ZeroDivisionError" in measure.invoke({"code": BAD})
    with ThreadPoolExecutor(4) as threads:
        said = list(threads.map(measure.invoke, [{"code": GOOD.format(power)} for power in range(1, 5)]))
    assert sum("KL divergence" in each for each in said) == len(drafts) == 2
    assert sum("used up" in each for each in said) == 2
