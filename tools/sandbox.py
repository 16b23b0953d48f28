"""The sandbox: the only place where code that a model wrote is run.

Two walls that do not trust each other. `forbidden` reads the code on the host, with `ast.parse` alone, and
refuses what is not on `ALLOWED`, the list that the prompt publishes: it gives the agent a sentence to repair
from. The boundary is `MontySandbox`: Monty interprets a subset of Python in which no file, network, process
or environment exists, in a worker process that serves one candidate and ends.

Covered: time (sleep counts) and memory, by Monty's own limits, and behind them by a deadline that kills the
worker and by the kernel's limits on its addresses and CPU time; crashes, which cost one candidate; secrets (a
worker's environment is empty); traces (no file written, no core dump, no name left to the next run); floods
(what is printed is dropped, a result is measured and the text of an exception cut before they cross); and what
comes back (plain data of bounded size, depth and integers, never a pickle).

Not covered: a memory-corruption bug in Monty would run as our user, under these limits but with no filter of
system calls. A deadline is wall-clock time, so a machine under load fails slow code. Monty is not CPython to
the last digit in `cbrt`, `erf`, `gamma` and `round(x, digits)`. macOS limits no address space, and Windows has
no shell that sets limits: it takes the e2b sandbox. `MontySandbox.guards` says what holds on this machine.
"""

from __future__ import annotations

import ast
import builtins
import datetime
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import pydantic_monty as monty

from tap_eval.mistake import Mistake
from tap_eval.proxies.proxy import LONGEST_MESSAGE, Failure, Rejection
from tap_eval.scratch import scratch
from tools.guard import guarded
from tools.syntax import parse

JSON: TypeAlias = "None | bool | int | float | str | Sequence[JSON] | Mapping[str, JSON]"

_LONGEST_CODE = 20_000  # characters
_LONGEST_INTEGER = 1024  # bits of a literal, as many as a float can hold
_DEEPEST_CODE = 100  # levels of the syntax tree
_DEEPEST_RESULT = 32  # levels of lists and dicts


class SandboxError(Mistake):
    """The sandbox itself failed, not a candidate in it; the message ends with the next step."""

    kind = "sandbox"


@dataclass(frozen=True)
class Allowed:
    """What code may use, each entry tried in Monty; of syntax, what it may not, as the shorter list."""

    modules: tuple[str, ...]
    builtins: tuple[str, ...]
    absent: Mapping[type[ast.AST], str]


_BUILTINS = """
    abs all any bool chr dict divmod enumerate filter float format frozenset int isinstance len list map max
    min ord pow print range repr reversed round set slice sorted str sum tuple type zip
    ArithmeticError AssertionError Exception IndexError KeyError LookupError OverflowError RuntimeError
    TypeError ValueError ZeroDivisionError
"""
ALLOWED = Allowed(
    modules=("math",),
    builtins=tuple(_BUILTINS.split()),
    absent={
        ast.AsyncFunctionDef: "async",
        ast.Await: "await",
        ast.ClassDef: "class",
        ast.Delete: "del",
        ast.MatMult: "a @ b",
        ast.TryStar: "except*",
        ast.Yield: "yield",
        ast.YieldFrom: "yield from",
    },
)


def published() -> str:
    """`ALLOWED` and `Limits` as Markdown bullets, for a prompt."""
    limits = Limits()
    return f"""\
- Imports: {_listed(ALLOWED.modules)} and nothing else: no numpy, statistics, random or typing.
- Builtins: {_listed(ALLOWED.builtins)}. The name of any other builtin is refused, for a variable too.
- Not there: {_listed(tuple(ALLOWED.absent.values()))}, names like `__this__`, `int.bit_length`,
  `float.is_integer`, and methods as values: write `key=lambda name: d[name]`, not `key=d.get`.
- At most {_LONGEST_CODE:,} characters, and for the layers of all networks together {limits.seconds:g} s and
  {limits.memory_bytes // 2**20} MiB. Other networks have thousands of channels a layer, so never loop over
  channels inside a loop over channels. What is printed is dropped."""


def forbidden(code: str) -> Rejection | None:
    """Why `code` may not be run, or None. The host parses it, and neither compiles nor runs it."""
    if len(code) > _LONGEST_CODE:
        return Rejection(Failure.UNPARSABLE, f"the code is longer than {_LONGEST_CODE:,} characters.")
    try:
        tree = parse(code)
    except SyntaxError as error:
        return Rejection(Failure.UNPARSABLE, f"line {error.lineno or 1}: {error.msg}.")
    except ValueError:
        return Rejection(Failure.UNPARSABLE, "the code holds a null byte or half of a surrogate pair.")
    except (RecursionError, MemoryError):
        return Rejection(Failure.UNPARSABLE, "the code is nested too deeply to be parsed.")
    waiting: list[tuple[ast.AST, int, int]] = [(tree, 1, 1)]  # not recursion, whose depth would be theirs
    while waiting:
        node, depth, line = waiting.pop()
        line = getattr(node, "lineno", line)
        if depth > _DEEPEST_CODE:
            return Rejection(Failure.UNPARSABLE, f"line {line}: nested too deeply; use a loop or more names.")
        if objection := _objection(node):
            return Rejection(Failure.FORBIDDEN, f"line {line}: {objection}")
        waiting += reversed([(child, depth + 1, line) for child in ast.iter_child_nodes(node)])
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "sensitivity" and len(node.args.args) == 2:
            return None
    return Rejection(Failure.UNPARSABLE, "define a top-level function `sensitivity(layers, task)`.")


def _objection(node: ast.AST) -> str | None:
    """What of `node` itself, without its children, is not on the list."""
    match node:
        case ast.Import(names=names):
            foreign = [alias.name for alias in names if alias.name not in ALLOWED.modules]
        case ast.ImportFrom(module=module, names=names, level=level):
            fine = module in ALLOWED.modules and names[0].name != "*" and not level
            foreign = [] if fine else [f"{module}.{names[0].name}"]
        case ast.Name(id=name) | ast.Attribute(attr=name) if name.startswith("__") and name.endswith("__"):
            return f"`{name}` is not available; no name between double underscores is."
        case ast.Name(id=name) if hasattr(builtins, name) and name not in (*ALLOWED.builtins, "_"):
            return f"`{name}` is not available, even as a variable; builtins: {_listed(ALLOWED.builtins)}."
        case ast.Constant(value=int(value)) if value.bit_length() > _LONGEST_INTEGER:
            return f"an integer of {value.bit_length():,} bits is not available; write a float."
        case _:
            word = ALLOWED.absent.get(type(node))
            return f"`{word}` is not available; write functions, loops and lists." if word else None
    return f"`{foreign[0]}` cannot be imported; modules: {_listed(ALLOWED.modules)}." if foreign else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def plain(value: object, depth: int = 0) -> JSON:
    """`value` as plain data, with tuples as lists; raises `ValueError`, naming what is no such thing."""
    if depth > _DEEPEST_RESULT:
        raise ValueError(f"the result is nested deeper than {_DEEPEST_RESULT} levels.")
    match value:
        case None | bool() | float() | str():
            return value
        case int() if value.bit_length() <= 64:
            return value
        case list() | tuple():
            return [plain(entry, depth + 1) for entry in cast("Sequence[object]", value)]
        case dict() if all(isinstance(key, str) for key in cast("dict[object, object]", value)):
            return {key: plain(entry, depth + 1) for key, entry in cast("dict[str, object]", value).items()}
        case int():
            raise ValueError("the result holds an integer of more than 64 bits.")
        case dict():
            raise ValueError("the result holds a dict with keys that are not strings.")
        case _:
            raise ValueError(f"the result holds a {type(value).__name__}, which is not plain data.")


@dataclass(frozen=True)
class Limits:
    """What one candidate may cost, all of its layers and networks together."""

    seconds: float = 5.0  # of wall-clock time, sleep included
    memory_bytes: int = 256 * 2**20
    result_bytes: int = 2**23  # of the result as JSON
    result_lists: int = 2**16  # lists and dicts in it, each of which costs the host what fifty numbers do

    def hit(self, failure: Failure) -> Rejection:
        """The sentence for the limit behind `failure`: TIMEOUT, MEMORY or, for the size, WRONG_SHAPE."""
        sentences = {
            Failure.TIMEOUT: f"it ran longer than {self.seconds:g} s, sleep included.",
            Failure.MEMORY: f"it exceeded {self.memory_bytes // 2**20} MiB of memory.",
            Failure.WRONG_SHAPE: f"the result exceeds {self.result_bytes:,} bytes, or {self.result_lists:,} lists.",
        }
        return Rejection(failure, sentences[failure])


def too_many(result: str, limits: Limits) -> bool:
    """Whether a result, as JSON, holds more lists and dicts than it may."""
    return result.count("[") + result.count("{") > limits.result_lists


class Sandbox(Protocol):
    """Where candidates run. Several threads may call `run` at once."""

    def run(self, code: str, call: str, inputs: Mapping[str, JSON]) -> JSON | Rejection:
        """The value of the expression `call` after `code` has run, with `inputs` as globals, as plain data.

        `call` is ours and trusted; `code` is not. No name outlives the call; the same code and inputs
        give the same value. Tuples come back as lists; NaN and infinity pass. Raises `SandboxError`.
        """
        ...


# Limits that a worker cannot raise, an empty environment, no terminal for its panics, and no Ctrl-C, which a terminal
# sends to it too: it would die of it, and its candidate would be judged by that.
_LAUNCHER = """#!/bin/sh
trap '' INT
ulimit -c 0 && ulimit -f 0 && ulimit -n 16 && ulimit -t {cpu_seconds} || exit 1
ulimit -v {kibibytes} 2>/dev/null || {without}
exec env -i {binary} "$@" 2>/dev/null
"""
_UNGUARDED = 2**24
"""bytes of memory where an exception's text has no bound but this"""
_OWN_ADDRESSES = 256 * 2**20  # what the interpreter takes before any code runs, and room for its answer
_GRACE = 1.0  # seconds in which the interpreter may stop by itself before it is killed
_CODE = "<python-input-1>"  # what a traceback calls the code, which is the second thing fed to its worker
_POLICY: monty.OSPolicy = {
    "datetime": datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC),
    "random_start": {"seed": 0},
    "sleep_system_max": math.inf,  # no sleep is cut short; it is charged, and refused beyond the limit
}
# The result is measured where it is, as `too_many` does: something else comes back in its place if it is too large.
_FETCH = """
import json as _json
_text = _json.dumps(_result)
_text[{bytes}:{bytes} + 1] or _text.count('[') + _text.count('{{') > {lists} or (_result,)
"""
_STARTS = 3  # workers that may die before they have answered, each in the place of the one before


class MontySandbox(AbstractContextManager["MontySandbox"]):
    """The default: a pool of guarded Monty workers, a fresh one for each run (about 4 ms), two for one that raises."""

    def __init__(self, limits: Limits | None = None, workers: int | None = None) -> None:
        """Runs at most `workers` candidates at once, by default one a CPU. Raises `SandboxError`."""
        self.limits = limits or Limits()
        self._fetch = _FETCH.format(bytes=self.limits.result_bytes, lists=self.limits.result_lists)
        binary = shutil.which("monty", path=sysconfig.get_path("scripts")) or shutil.which("monty")
        if binary is None:
            raise SandboxError("there is no `monty` program: pip install pydantic-monty, or use e2b.")
        with ExitStack() as held:
            pool = monty.Monty(
                binary_path=self._launcher(held.enter_context(scratch()), binary),
                min_processes=0,
                max_processes=workers,
                max_checkouts_per_worker=1,
                request_timeout=self.limits.seconds + _GRACE,
            )
            self._pool = held.enter_context(pool)
            self.guards()  # a worker starts, or the user is told now
            self._held = held.pop_all()

    def _launcher(self, folder: Path, binary: str) -> Path:
        launcher = folder / "worker"
        launcher.write_text(
            _LAUNCHER.format(
                cpu_seconds=math.ceil(2 * self.limits.seconds + 10),
                kibibytes=(self.limits.memory_bytes + _OWN_ADDRESSES) // 1024,
                without="exit 1" if sys.platform == "linux" else "true",
                binary=shlex.quote(binary),
            )
        )
        launcher.chmod(0o700)
        return launcher

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; from here on `run` raises `SandboxError`."""
        self._held.close()

    def guards(self) -> dict[str, bool]:
        """Which of the kernel's guards a worker has, as read from one; without /proc none can be seen."""
        with self._worker() as worker:
            process = Path(f"/proc/{worker.worker_pid}")
            seen = process.is_dir()
            limits = (process / "limits").read_text() if seen else ""
            empty = seen and not (process / "environ").read_bytes()
        guards = {"address space": "Max address space", "CPU time": "Max cpu time", "files": "Max file size"}
        limited = {name: re.search(rf"{row} +\d", limits) is not None for name, row in guards.items()}
        return {"empty environment": empty, **limited}

    def run(self, code: str, call: str, inputs: Mapping[str, JSON]) -> JSON | Rejection:
        """See `Sandbox.run`. All of it, conversions included, ends within a second of `limits.seconds`."""
        try:
            feeds = guarded([code, f"_result = {call}"], LONGEST_MESSAGE)
        except SyntaxError as error:
            return Rejection(Failure.UNPARSABLE, f"{error.msg}.")
        found, left = self._fed(feeds, inputs, self.limits.seconds)
        if not isinstance(found, monty.MontyError):
            return found
        said, lines = str(found), [""]
        if len(said) <= LONGEST_MESSAGE:  # without the guard it comes again, and has its line
            again, _ = self._fed([f"{code}\n_end = 0", f"_result = {call}"], inputs, left, _UNGUARDED)
            if isinstance(again, monty.MontyRuntimeError | monty.MontySyntaxError) and str(again) == said:
                lines += [f"line {frame.line}: " for frame in again.traceback() if frame.filename == _CODE]
        failure = Failure.UNPARSABLE if isinstance(found, monty.MontySyntaxError) else Failure.ERROR
        return Rejection(failure, lines[-1] + said)

    def _fed(
        self, feeds: Sequence[str], inputs: Mapping[str, JSON], seconds: float, memory: int = sys.maxsize
    ) -> tuple[JSON | Rejection | monty.MontyError, float]:
        """What a fresh worker makes of it in `seconds` and `memory`, exceptions too, and the seconds that are left."""
        with self._worker(memory) as worker:
            ends = time.monotonic() + seconds
            watchdog = threading.Timer(seconds + _GRACE, _kill, [worker.worker_pid])
            watchdog.start()
            try:
                found = self._result(worker, feeds, inputs, ends)
            finally:
                watchdog.cancel()
        left = ends - time.monotonic()
        late = left < 0 and not isinstance(found, Rejection)
        return self.limits.hit(Failure.TIMEOUT) if late else found, max(left, 0.0)

    def _result(
        self, worker: monty.MontySession, feeds: Sequence[str], inputs: Mapping[str, JSON], ends: float
    ) -> JSON | Rejection | monty.MontyError:
        try:
            worker.feed_run(feeds[0], print_callback=_drop)
            worker.feed_run(feeds[1], inputs=dict(inputs), print_callback=_drop)
        except monty.MontyError as error:
            return self._death(error, ends) or error
        try:
            fetched: object = worker.feed_run(self._fetch)
        except monty.MontyError as error:
            return self._death(error, ends) or Rejection(Failure.WRONG_SHAPE, str(error))
        if not isinstance(fetched, tuple):
            return self.limits.hit(Failure.WRONG_SHAPE)
        try:
            return plain(cast("tuple[object]", fetched)[0])
        except ValueError as error:
            return Rejection(Failure.WRONG_SHAPE, str(error))

    @contextmanager
    def _worker(self, memory: int = sys.maxsize) -> Generator[monty.MontySession]:
        """A fresh worker that has answered, so that whatever fails after this is the candidate's doing."""
        limits: monty.ResourceLimits = {
            "max_feed_duration_secs": self.limits.seconds,
            "max_total_sleep_secs": self.limits.seconds,
            "max_memory": min(memory, self.limits.memory_bytes),
            "max_suspensions": 10,  # sleeps and whatever asks the host, which only ever answers no
        }
        for left in reversed(range(_STARTS)):
            with ExitStack() as stack:
                try:
                    worker = stack.enter_context(self._pool.checkout(limits=limits, os_policy=_POLICY))
                    worker.feed_run("pass")
                except (monty.MontyError, OSError, RuntimeError) as error:
                    if left:
                        continue
                    raise SandboxError(
                        f"no Monty worker starts ({error}): free some memory, set TMPDIR to a folder from which "
                        "programs may run, or take the e2b sandbox."
                    ) from error
                yield worker
                return

    def _death(self, error: monty.MontyError, ends: float) -> Rejection | None:
        """Which death `error` tells of, or None if it is an exception like any other."""
        if isinstance(error, monty.MontyConversionError):
            raise SandboxError(f"{error}: pass plain data as inputs.") from error
        cause, crashed = error.exception(), isinstance(error, monty.MontyCrashedError)
        if isinstance(cause, TimeoutError) or (crashed and time.monotonic() > ends):
            return self.limits.hit(Failure.TIMEOUT)
        if isinstance(cause, MemoryError):
            return self.limits.hit(Failure.MEMORY)
        if crashed:
            said = "the interpreter broke off: too much memory, too deep a recursion, or NaN in a sort."
            return Rejection(Failure.MEMORY, said)
        return None


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _drop(*_: str) -> None:
    """Keeps what is printed from our terminal."""
