"""The alternative sandbox: a virtual machine of E2B's, driven by the real `e2b-code-interpreter` client.

Each run sends one program, with code and inputs in it as JSON. On the machine that program starts a fresh
Python for the candidate, with limits of its own on time and memory, and prints one line: a random marker and
the outcome as JSON. One machine, without internet access, serves all runs, one at a time; it ends on `close`,
or by itself ten minutes after the last run. The client reads `E2B_API_KEY`, and for a server of one's own
`E2B_API_URL` and `E2B_SANDBOX_URL`, which E2B has announced to remove in its next major version.

Covered: everything on our side, since nothing of a candidate is run here and what comes back is checked like
any other result; time, sleep and memory; names, which do not outlive a run; what is printed; a machine that
hangs, which is replaced.

Not covered: this is all of CPython, so files and processes that code leaves on the machine can meet the next
candidate, clocks and `random` are real, and code that attacks the machine can make a search fail, with a
`SandboxError`. The imports it takes for that are refused by `forbidden`. Inputs and code leave this computer.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress

import httpx
from e2b import SandboxException, TimeoutException
from e2b_code_interpreter import Sandbox as Machine  # pyright: ignore[reportMissingTypeStubs]

from tap_eval.proxies.proxy import Failure, Rejection
from tools.sandbox import JSON, Limits, SandboxError, plain

_IDLE = 600  # seconds that a machine outlives its last run
_GRACE = 3.0  # seconds beyond the limit for an answer; client 2.11 waits twice what it is told
_OWN_ADDRESSES = 64 * 2**20  # what a bare Python takes
_BROKEN = (SandboxException, httpx.HTTPError, ValueError)  # what the client raises; the last for bad JSON
_NEXT_STEP = "check the network, the key and the quota at e2b.dev, or take the default sandbox."

# In the candidate's own process: the job comes on stdin, and one JSON object goes to stdout.
_CHILD = """
import json, os, resource, sys, traceback
job = json.load(sys.stdin)
answer, sys.stdout = sys.stdout, open(os.devnull, "w")
resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))

def strange(value):
    if type(value) in (list, tuple):
        return next(filter(None, map(strange, value)), None)
    if type(value) is dict:
        keys = all(type(key) is str for key in value)
        return strange(list(value.values())) if keys else "dict with keys that are not strings"
    return None if value is None or type(value) in (bool, int, float, str) else type(value).__name__

def run():
    names = {"__name__": "proxy"}
    failure = "error"
    try:
        exec(compile(job["code"], "<proxy>", "exec"), names)
        names.update(job["inputs"])
        value = eval(job["call"], names)
        failure = "wrong shape"
        if kind := strange(value):
            raise TypeError(f"the result holds a {kind}, which is not plain data.")
        return json.dumps({"value": value})
    except MemoryError:
        return json.dumps({"failure": "memory"})
    except BaseException as error:
        steps = traceback.extract_tb(error.__traceback__)
        lines = [step.lineno for step in steps if step.filename == "<proxy>"]
        if isinstance(error, SyntaxError):
            failure, lines = "unparsable", [error.lineno]
        where = f"line {lines[-1]}: " if lines else ""
        return json.dumps({"failure": failure, "message": f"{where}{type(error).__name__}: {error}"})

answer.write(run())
answer.flush()
os._exit(0)
"""

# In the machine's notebook, which starts that process, ends it in time, and passes its answer on.
_RELAY = """
import json, subprocess, sys
job = json.loads(JOB)
try:
    answer = subprocess.run(
        [sys.executable, "-S", "-c", CHILD], input=JOB, timeout=job["seconds"], cwd="/",
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace",
        env={"PYTHONHASHSEED": "0"},
    ).stdout or json.dumps({"failure": "memory"})
    if len(answer) > job["longest"]:
        answer = json.dumps({"failure": "too long"})
except subprocess.TimeoutExpired:
    answer = json.dumps({"failure": "timeout"})
print(job["marker"] + answer, flush=True)
"""


class E2BSandbox(AbstractContextManager["E2BSandbox"]):
    """Runs candidates on one of E2B's machines, which is started at once, so that what is missing shows."""

    def __init__(self, limits: Limits | None = None) -> None:
        """Raises `SandboxError` without a key, and if no machine answers."""
        if not os.environ.get("E2B_API_KEY"):
            raise SandboxError("E2B_API_KEY is not set: get a key at e2b.dev, or take the default sandbox.")
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._machine: Machine | None = None
        if (answer := self.run("", "1 + 1", {})) != 2:
            self.close()
            raise SandboxError(f"the E2B machine answers 1 + 1 with {answer}: take the default sandbox.")

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the machine, as far as E2B can be reached; a later `run` would start another."""
        machine, self._machine = self._machine, None
        if machine is not None:
            with suppress(*_BROKEN):
                machine.kill()

    def run(self, code: str, call: str, inputs: Mapping[str, JSON]) -> JSON | Rejection:
        """See `tools.sandbox.Sandbox.run`."""
        marker = secrets.token_hex(16)
        job = json.dumps(
            {
                "code": code,
                "call": call,
                "inputs": dict(inputs),
                "marker": marker,
                "seconds": self.limits.seconds,
                "memory": self.limits.memory_bytes + _OWN_ADDRESSES,
                "longest": self.limits.result_bytes,
            }
        )
        program = f"JOB = {job!r}\nCHILD = {_CHILD!r}\n{_RELAY}"
        with self._lock:
            try:
                self._machine = self._alive() or Machine.create(timeout=_IDLE, allow_internet_access=False)
            except _BROKEN as error:
                raise SandboxError(f"no E2B machine starts ({error}): {_NEXT_STEP}") from error
            try:
                execution = self._machine.run_code(program, timeout=self.limits.seconds + _GRACE)
            except TimeoutException:
                self.close()
                return self.limits.hit(Failure.TIMEOUT)
            except _BROKEN as error:
                self.close()
                raise SandboxError(f"the E2B machine is lost ({error}): {_NEXT_STEP}") from error
        return self._outcome("".join(execution.logs.stdout).partition(marker)[2])

    def _alive(self) -> Machine | None:
        """The machine, kept for another ten minutes, unless it has ended."""
        with suppress(*_BROKEN):
            if self._machine is not None:
                self._machine.set_timeout(_IDLE)
                return self._machine
        return None

    def _outcome(self, answer: str) -> JSON | Rejection:
        """What the machine answered, which is trusted no more than the code that was run there."""
        if not answer:
            return Rejection(Failure.ERROR, "it stopped the machine from answering.")
        try:
            match json.loads(answer):
                case {"value": value}:
                    return plain(value)
                case {"failure": "timeout"}:
                    return self.limits.hit(Failure.TIMEOUT)
                case {"failure": "memory"}:
                    return self.limits.hit(Failure.MEMORY)
                case {"failure": "too long"}:
                    return self.limits.hit(Failure.WRONG_SHAPE)
                case {"failure": "error" | "unparsable" | "wrong shape" as failure, "message": str(message)}:
                    return Rejection(Failure(failure), message)
                case _:
                    return Rejection(Failure.WRONG_SHAPE, "it wrote an answer of its own.")
        except RecursionError:
            return Rejection(Failure.WRONG_SHAPE, "the result is nested too deeply.")
        except ValueError as error:
            return Rejection(Failure.WRONG_SHAPE, str(error))
