"""The list on the host, and then the boundary, which code reaches here without passing the list."""

from __future__ import annotations

import ast
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tools.sandbox as sandbox_module
from tap_eval.proxies.proxy import Failure, Rejection
from tools.sandbox import ALLOWED, JSON, Limits, MontySandbox, SandboxError, forbidden, plain, published

LIMITS = Limits(seconds=1.0, memory_bytes=64 * 2**20, result_bytes=64 * 2**10)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PROXY = "def sensitivity(layers, task):\n    "

BUILTINS = """
abs(-1); all([1, 0]); any([1, 0]); bool(2); chr(97); dict(a=1); divmod(7, 2); list(enumerate('ab', 1))
list(filter(lambda x: x > 1, [1, 2])); float('1e-3'); format(1.5, '.3f'); len(frozenset([1, 1])); print(1)
isinstance(1, (int, float)); list(map(abs, [-1])); max([1, -3], key=abs); min([], default=0); pow(2, 0.5)
list(range(5, 0, -2)); list(reversed([1, 2])); round(-2.5); len({1, 1} | set([2])); [1, 2, 3][slice(1, 3)]
sorted([2, 1], reverse=True); sum([0.5, 2]); tuple('ab'); type(1) is int; list(zip([1], [2], strict=True))
ord('a'); repr(0.1); str(1.0); int(2.9); math.log(3); math.exp(-2); math.sqrt(2); math.fsum([0.1]); math.pi
"""
EXAMPLES = [example.strip() for line in BUILTINS.split("\n") for example in line.split(";") if example]
ERRORS = [name for name in ALLOWED.builtins if name.endswith(("Error", "Exception"))]
ABSENT = {
    ast.AsyncFunctionDef: "async def f(): pass",
    ast.Await: "await x",
    ast.ClassDef: "class A: pass",
    ast.Delete: "del x",
    ast.MatMult: "x @= y",
    ast.TryStar: "try: pass\n    except* ValueError: pass",
    ast.Yield: "yield 1",
    ast.YieldFrom: "yield from x",
}
FOREIGN = """
import numpy as np; import math, os; import os.path; from random import random; from . import math
from .math import exp; from math import *; __import__('os'); open('x'); eval('1'); exec(''); getattr(x, 'y')
globals(); x.__class__; ().__class__.__subclasses__(); __builtins__; input = 1; lambda: compile
"""
UNPARSABLE = {
    "syntax error": PROXY + "return (",
    "no sensitivity": "def score(layers, task): return []",
    "sensitivity in a function": "def f():\n    def sensitivity(layers, task): return []",
    "one argument": "def sensitivity(layers): return []",
    "too long": PROXY + "return []" + "#" * 20_000,
    "null byte": PROXY + "return '\0'",
    "half a surrogate pair": PROXY + "return '\ud800'",
    "parser's stack": PROXY + "return " + "-" * 19_000 + "1",
    "brackets": PROXY + "return " + "[" * 5_000 + "]" * 5_000,
    "long sum": PROXY + "return " + " + ".join("1" * 2_000),
    "long chain": PROXY + "return x" + ".a" * 9_000,
    "empty": "",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[MontySandbox]:
    with MontySandbox(LIMITS) as opened:
        yield opened


def test_every_entry_of_the_list_has_an_example_here() -> None:
    nodes = [node for example in EXAMPLES for node in ast.walk(ast.parse(example))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert used - {"x", "math"} | {*ERRORS} == {*ALLOWED.builtins}
    assert ABSENT.keys() == ALLOWED.absent.keys()


def test_every_entry_of_the_list_is_published() -> None:
    entries = (*ALLOWED.modules, *ALLOWED.builtins, *ALLOWED.absent.values())
    assert [entry for entry in entries if f"`{entry}`" not in published()] == []


@pytest.mark.parametrize("expression", EXAMPLES)
def test_a_builtin_on_the_list_gives_what_it_gives_in_python(sandbox: MontySandbox, expression: str) -> None:
    code = f"import math\n{PROXY}return {expression}"
    assert forbidden(code) is None
    assert sandbox.run(code, "sensitivity([], {})", {}) == plain(eval(expression))


@pytest.mark.parametrize("name", ERRORS)
def test_an_exception_on_the_list_can_be_caught(sandbox: MontySandbox, name: str) -> None:
    code = f"{PROXY}try:\n        raise {name}('x')\n    except {name}:\n        return [1.0]"
    assert forbidden(code) is None
    assert sandbox.run(code, "sensitivity([], {})", {}) == [1.0]


@pytest.mark.parametrize("line", [*ABSENT.values(), *FOREIGN.strip().replace("\n", "; ").split("; ")])
def test_what_is_not_on_the_list_is_named(line: str) -> None:
    rejection = forbidden(f"{PROXY}{line}\n    return []")
    assert rejection is not None
    assert rejection.failure is Failure.FORBIDDEN
    assert rejection.message.startswith("line 2: `")


@pytest.mark.parametrize("code", UNPARSABLE.values(), ids=UNPARSABLE.keys())
def test_what_is_no_proxy_is_unparsable(code: str) -> None:
    rejection = forbidden(code)
    assert rejection is not None
    assert rejection.failure is Failure.UNPARSABLE


def test_half_a_megabyte_of_features_gives_what_it_gives_in_python(sandbox: MontySandbox) -> None:
    code = f"from math import log\n{PROXY}return [sum(log(x) ** 1.5 for x in y['std']) for y in layers]"
    features = [[1 + index * channel / 7 for channel in range(512)] for index in range(60)]
    layers: list[JSON] = [{"std": values} for values in features]
    expected = [sum(math.log(value) ** 1.5 for value in values) for values in features]
    assert sandbox.run(code, "sensitivity(layers, {})", {"layers": layers}) == expected


def test_plain_data_comes_back_as_numbers_strings_lists_and_dicts(sandbox: MontySandbox) -> None:
    call = "(1, [2.5, (True, None)], {'a': {'b': 'c'}}, 2**64 - 1, float('inf'))"
    assert sandbox.run("", call, {}) == [1, [2.5, [True, None]], {"a": {"b": "c"}}, 2**64 - 1, math.inf]
    assert str(sandbox.run("", "[float('nan')]", {})) == "[nan]"


def test_one_deadline_holds_for_all_of_a_run(sandbox: MontySandbox) -> None:
    started = time.monotonic()
    answer = sandbox.run("import math, time\ntime.sleep(0.9)", "math.isqrt(10**4_000_000)", {})
    assert answer == LIMITS.hit(Failure.TIMEOUT)
    assert time.monotonic() - started < LIMITS.seconds + 1.6


def test_a_message_names_the_line_and_is_harmless_to_a_terminal(sandbox: MontySandbox) -> None:
    answer = sandbox.run("def f(x):\n    y = x\n    return y[9]", "f([1])", {})
    assert answer == Rejection(Failure.ERROR, "line 3: IndexError: list index out of range")
    answer = sandbox.run(r"raise ValueError('\x1b[31m\n' * 10**6)", "1", {})
    assert isinstance(answer, Rejection)
    assert len(answer.message) <= 1000
    assert answer.message.isprintable()


MEANINGS = [
    'x = """a\n b\n\tc"""\ndef f():\n\tif x:\n\t\treturn x',
    "def f():\r\n  return [1,\r\n2, \\\r\n  3]  # 4",
    'def f():\n    y = f"""a{\n1\n}\n  b"""\n    return y\n# the end',
    '"A docstring."\ndef f():\n    """Of\nits own."""\n    return "é\\\n  ☃"',
    "try:\n    [].x\nexcept Exception as e:\n    text = str(e)\nelse: pass\ndef f(): return text",
]


@pytest.mark.parametrize("code", MEANINGS, ids=["tabs", "returns", "braces", "docstrings", "handlers"])
def test_code_means_under_the_guard_what_it_means_in_python(sandbox: MontySandbox, code: str) -> None:
    names: dict[str, Callable[[], object]] = {}
    exec(code, names)
    assert sandbox.run(code, "f()", {}) == names["f"]()


def test_the_names_of_the_guard_cannot_be_given_another_meaning(sandbox: MontySandbox) -> None:
    code = "BaseException = Exception = type = str = KeyError\ndef f(): raise ValueError('x' * 10**6)"
    found = sandbox.run(code, "f()", {})
    assert isinstance(found, Rejection)
    assert found.message.startswith("Exception: ValueError: xxx")


def test_what_is_printed_is_dropped(sandbox: MontySandbox, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys\nprint('x', file=sys.stderr)\nfor _ in range(10**4): print('x' * 10**3)"
    assert sandbox.run(code, "print('x')", {}) is None
    assert sandbox.run(code + "\nwhile True: print('x' * 10**3)", "1", {}) == LIMITS.hit(Failure.TIMEOUT)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("end", ["", "\npass", " if 1 else None", "; 0 if 1 else 0", " # \\"])
def test_a_value_at_the_end_of_the_code_does_not_cross(sandbox: MontySandbox, end: str) -> None:
    assert sandbox.run("[0] * 10**6" + end, "1", {}) == 1  # crossing, it would exhaust the memory


def test_names_and_changes_end_with_the_run(sandbox: MontySandbox) -> None:
    given: list[JSON] = [0]
    assert sandbox.run("left = 1\ndef f(x):\n    x.append(1)\n    return x", "f(x)", {"x": given}) == [0, 1]
    assert given == [0]
    assert sandbox.run("", "left", {}) == Rejection(Failure.ERROR, "NameError: name 'left' is not defined")


def test_the_same_code_gives_the_same_value(sandbox: MontySandbox) -> None:
    code = "import random, datetime\nf = lambda: [random.random(), str(datetime.datetime.now()), hash('a')]"
    first = sandbox.run(code, "[f(), id(f), list({str(i) for i in range(99)})]", {})
    assert isinstance(first, list)
    assert sandbox.run(code, "[f(), id(f), list({str(i) for i in range(99)})]", {}) == first


def test_threads_run_side_by_side() -> None:
    def squared(number: int) -> object:
        return opened.run("import time\ntime.sleep(0.5)", "x * x", {"x": number})

    with MontySandbox(LIMITS, workers=4) as opened, ThreadPoolExecutor(8) as threads:
        started = time.monotonic()
        assert list(threads.map(squared, range(8))) == [number**2 for number in range(8)]
        assert time.monotonic() - started < 8 * 0.5


def workers() -> list[Path]:
    """The /proc folders of the workers that run now."""
    ours = Path("/proc/self/task").glob("*/children")
    folders = [Path("/proc", child) for children in ours for child in children.read_text().split()]
    return [folder for folder in folders if folder.joinpath("comm").read_text() == "monty\n"]


def while_it_loops(sandbox: MontySandbox, look: Callable[[Path], None]) -> JSON | Rejection:
    with ThreadPoolExecutor(1) as thread:
        looping = thread.submit(sandbox.run, "while True: pass", "1", {})
        time.sleep(0.4)
        (worker,) = workers()
        look(worker)
        return looping.result()


@LINUX
def test_each_run_has_a_worker_without_environment_under_the_kernels_limits(
    sandbox: MontySandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}
    served: list[str] = []

    def look(worker: Path) -> None:
        served.append(worker.name)
        seen["environment"] = worker.joinpath("environ").read_text()
        for line in worker.joinpath("limits").read_text().splitlines():
            seen[line[:25].strip()] = line[25:].split()[0]

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    while_it_loops(sandbox, look)
    while_it_loops(sandbox, look)
    assert served[0] != served[1]
    assert seen["environment"] == ""
    assert 0 < int(seen["Max address space"]) - LIMITS.memory_bytes <= 256 * 2**20
    assert (seen["Max file size"], seen["Max core file size"], seen["Max open files"]) == ("0", "0", "16")
    assert int(seen["Max cpu time"]) < 60
    assert set(sandbox.guards().values()) == {True}


@LINUX
def test_a_killed_worker_costs_one_run(sandbox: MontySandbox) -> None:
    answer = while_it_loops(sandbox, lambda worker: os.kill(int(worker.name), signal.SIGKILL))
    assert isinstance(answer, Rejection)
    assert answer.failure is Failure.MEMORY
    assert "broke off" in answer.message
    assert sandbox.run("", "1 + 1", {}) == 2


@LINUX
def test_ctrl_c_in_a_terminal_which_workers_get_too_fails_no_candidate(sandbox: MontySandbox) -> None:
    answer = while_it_loops(sandbox, lambda worker: os.kill(int(worker.name), signal.SIGINT))
    assert isinstance(answer, Rejection)
    assert answer.failure is Failure.TIMEOUT  # as without it


@LINUX
def test_a_worker_that_is_killed_before_it_has_answered_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, more = tmp_path / "killed", tmp_path / "more"
    head, rest = sandbox_module._LAUNCHER.split("\n", 1)
    first = f"mkdir '{killed}' 2>/dev/null && kill -9 $$\ntest -e '{more}' && kill -9 $$\n"
    monkeypatch.setattr(sandbox_module, "_LAUNCHER", f"{head}\n{first}{rest}")
    with MontySandbox(LIMITS) as opened:
        killed.rmdir()
        assert opened.run("", "1 + 1", {}) == 2
        assert killed.exists()
        more.mkdir()
        with pytest.raises(SandboxError, match="no Monty worker starts"):
            opened.run("", "1 + 1", {})
        more.rmdir()
        assert opened.run("", "1 + 1", {}) == 2


def test_a_failure_of_our_own_is_an_error() -> None:
    opened = MontySandbox(LIMITS)
    with pytest.raises(SandboxError, match="plain data"):
        opened.run("", "x", {"x": threading.Lock()})  # type: ignore[dict-item]
    opened.close()
    with pytest.raises(SandboxError, match="no Monty worker starts"):
        opened.run("", "1", {})
    with pytest.raises(SandboxError, match="no Monty worker starts"):
        MontySandbox(Limits(memory_bytes=1))
