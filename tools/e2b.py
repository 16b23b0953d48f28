"""The alternative sandbox: a virtual machine of E2B's, driven by the real `e2b-code-interpreter` client.

Each run sends one program, with code and inputs in it as JSON. On the machine that program starts a fresh
Python for the candidate, with limits of its own on time and memory, and prints one line: a random marker and
the outcome as JSON. One machine, without internet access, serves all runs, one at a time; it ends on `close`,
or by itself ten minutes after the last run. The client reads `E2B_API_KEY`, and for a server of one's own
`E2B_API_URL` and `E2B_SANDBOX_URL`, which E2B has announced to remove in its next major version.

Covered: everything on our side, since nothing of a candidate is run here and what comes back is bounded as it
arrives and checked like any other result; time, sleep and memory; names, which do not outlive a run; what is
printed; a machine that hangs or is lost, which is replaced: the candidate is run once more, and where it loses
that machine too and others still run there, the loss is its own.

Not covered: this is all of CPython, so files and processes that code leaves on the machine can meet the next
candidate, and clocks and `random` are real. The imports it takes for that are refused by `forbidden`. Inputs and
code leave this computer.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress

import httpx
from e2b import TimeoutException
from e2b_code_interpreter import Sandbox as Machine  # pyright: ignore[reportMissingTypeStubs]

from tap_eval.proxies.proxy import LONGEST_MESSAGE, Failure, Rejection
from tools.keys import redacted
from tools.sandbox import JSON, Limits, SandboxError, plain, too_many

_IDLE = 600  # seconds that a machine outlives its last run
_GRACE = 3.0  # seconds beyond the limit for an answer; client 2.11 waits twice what it is told
_PATIENCE = 20.0  # seconds for a machine to start
_HASTE = 3.0  # seconds for one to be kept, or to end, neither of which is worth waiting for
_LONGEST_REPLY = 2**24 + 2**16  # bytes of what one run sends: the longest result as JSON in JSON, and what is around it
_OWN_ADDRESSES = 64 * 2**20  # what a bare Python takes
_SILENCED = "it stopped the machine from answering."
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
        told = f"{where}{type(error).__name__}: {error}"[:job["message"]]
        return json.dumps({"failure": failure, "message": told})

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


class _TooLong(Exception):
    """A reply beyond `_LONGEST_REPLY`."""


class _Lost(Exception):
    """A machine that does not answer as one of E2B's does."""


class _Machine(Machine):  # type: ignore[misc]  # whose package has no types
    """One of E2B's, of whose replies no more is taken than `_LONGEST_REPLY`."""

    @property
    def _client(self) -> httpx.Client:
        client: httpx.Client = super()._client
        client.headers["Accept-Encoding"] = "identity"
        client.event_hooks = {"response": [_bound]}
        return client


def _bound(response: httpx.Response) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _Lost("the reply is compressed, though that was not asked for")
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Bounded(response.stream)


class _Bounded(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._stream:
            size += len(part)
            if size > _LONGEST_REPLY:
                raise _TooLong
            yield part

    def close(self) -> None:
        self._stream.close()


class E2BSandbox(AbstractContextManager["E2BSandbox"]):
    """Runs candidates on one of E2B's machines, which is started at once, so that what is missing shows."""

    def __init__(self, limits: Limits | None = None) -> None:
        """Raises `SandboxError` without a key, and if no machine answers."""
        self._key = os.environ.get("E2B_API_KEY", "")
        if not self._key:
            raise SandboxError("E2B_API_KEY is not set: get a key at e2b.dev, or take the default sandbox.")
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._machine: Machine | None = None
        self._check()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the machine, as far as E2B can be reached; a later `run` would start another."""
        machine, self._machine = self._machine, None
        if machine is not None:
            with suppress(Exception):
                machine.kill(request_timeout=_HASTE)

    def run(self, code: str, call: str, inputs: Mapping[str, JSON]) -> JSON | Rejection:
        """See `tools.sandbox.Sandbox.run`."""
        with self._lock:
            for _ in range(2):
                with suppress(_Lost):
                    return self._once(code, call, inputs)
            self._check()
        return Rejection(Failure.ERROR, _SILENCED)

    def _check(self) -> None:
        """Raises `SandboxError` unless a machine does a sum."""
        try:
            answer = self._once("", "1 + 1", {})
        except _Lost as error:
            raise SandboxError(f"the E2B machine is lost ({error}): {_NEXT_STEP}") from error
        if answer != 2:
            self.close()
            said = answer.message if isinstance(answer, Rejection) else repr(answer)[:99]
            raise SandboxError(f"the E2B machine answers 1 + 1 with {said}: take the default sandbox.")

    def _once(self, code: str, call: str, inputs: Mapping[str, JSON]) -> JSON | Rejection:
        """One run on the machine, or on a fresh one where that has ended; raises `_Lost` and `SandboxError`."""
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
                "message": LONGEST_MESSAGE,
            }
        )
        program = f"JOB = {job!r}\nCHILD = {_CHILD!r}\n{_RELAY}"
        try:
            machine = self._machine = self._alive() or _Machine.create(
                timeout=_IDLE, allow_internet_access=False, request_timeout=_PATIENCE
            )
        except Exception as error:  # its client raises what it meets: of HTTP, JSON, keys that are not there
            raise SandboxError(f"no E2B machine starts ({self._told(error)}): {_NEXT_STEP}") from error
        started = time.monotonic()
        try:
            execution = machine.run_code(program, timeout=self.limits.seconds + _GRACE)
            said = "".join(execution.logs.stdout)
        except TimeoutException as error:  # of the code, or of the machine, which has ended then
            self.close()
            if time.monotonic() - started < self.limits.seconds:
                raise _Lost(self._told(error)) from error
            return self.limits.hit(Failure.TIMEOUT)
        except _TooLong:
            self.close()
            return self.limits.hit(Failure.WRONG_SHAPE)
        except Exception as error:
            self.close()
            raise _Lost(self._told(error)) from error
        return self._outcome(redacted(said, self._key).partition(marker)[2].strip())

    def _told(self, error: Exception) -> str:
        """What went wrong, in a line without the key."""
        words = str(redacted(f"{type(error).__name__}: {error}", self._key))
        return " ".join(words[:LONGEST_MESSAGE].split())[:200]

    def _alive(self) -> Machine | None:
        """The machine, kept for another ten minutes, unless it has ended."""
        with suppress(Exception):
            if self._machine is not None:
                self._machine.set_timeout(_IDLE, request_timeout=_HASTE)
                return self._machine
        return None

    def _outcome(self, answer: str) -> JSON | Rejection:
        """What the machine answered, which is trusted no more than the code that was run there."""
        if not answer:
            return Rejection(Failure.ERROR, _SILENCED)
        if len(answer) > self.limits.result_bytes or too_many(answer, self.limits):
            return self.limits.hit(Failure.WRONG_SHAPE)
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
