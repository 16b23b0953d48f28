"""What may go wrong with a run, what its user then sees, and what is kept: plans with which the program is driven."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from tap_agent.exit import Exit
from tests.agents.scripted import refusal
from tests.faults import damage
from tests.faults.faults import (
    Fault,
    answered,
    cached,
    down,
    down_midway,
    dribbling,
    every_file_cut,
    file,
    forgotten,
    full,
    hanging,
    impatient,
    nothing,
    read_only,
    refusing,
    typed,
    written_elsewhere,
)

RUN = "run"
"""the folder that commands name"""
SETTINGS = [
    "--population", "2", "--generations", "1", "--search", "100", "--test", "100", "--draws", "1",
    "--baselines", "uniform", "--no-second-budget", "--no-finish", "--llm", "scripted",
]  # fmt: skip
"""of every run, with the address of its server"""


@dataclass(frozen=True)
class Plan:
    """One thing that goes wrong, with a run that was broken off within its last generation, unless it had `ended`."""

    kind: str
    what: str
    fault: Fault
    command: str
    exit: Exit | signal.Signals
    """a signal is what ends it"""
    sees: str
    """part of what is said; where nothing is to be said, \"\" """
    kept: str
    ended: bool = False
    then: str | None = None
    """the command after which, the fault being over, the run is as if nothing had happened; "" where it is at once"""
    sent: tuple[signal.Signals, ...] = ()
    """what the program gets, one after the other, while a call of its language model is under way"""

    @property
    def name(self) -> str:
        """Of the plan among the tests."""
        return f"{self.what}: {self.command}"


NEW = "run --out new"
RESUME = "resume run"
APPLY = "apply uniform:3 --search 100 --test 100 --draws 1 --baselines uniform"
AGAIN = "all; the rest of the search gives what it would have given"
WHOLE = "the run, as it was"
NOTHING = "nothing is left of it"
TALK = "what was said; `again` goes on"
GOES_ON = "continue with: tap-agent resume run"
BUSY = refusal(429, "busy", retry_after="1")
FAILING = refusal(500, "out of order", retry_after="0")
WRONG_KEY = refusal(401, "no such key")
CUT = {"half": b'{"id": "x", "object": "chat.completion", "choices": [{"index": 0, "mess'}
CUT_STREAM = {"role": "assistant", "content": "Since the", "broken": True}
NO_JSON = {"raw": b"<html>Bad gateway</html>"}
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
ASIDE = "the damaged file too, beside it as FILE.damaged"
PLANS = [
    # files of a run
    Plan("files", "config.yaml is cut at the end of a line", file("config.yaml", damage.cut_at_line), RESUME, Exit.OK,
         "config.yaml is not what was written, and is config.yaml.damaged now: is written anew", ASIDE, then=""),
    Plan("files", "config.yaml is empty", file("config.yaml", damage.emptied), "apply run", Exit.DAMAGED,
         "config.yaml is empty: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "a bit of config.yaml is another", file("config.yaml", damage.flipped), "apply run", Exit.DAMAGED,
         "config.yaml is not what was written: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "config.yaml is of a newer version", file("config.yaml", damage.newer), RESUME, Exit.DAMAGED,
         "config.yaml was written by a newer version of tap-agent (form 9, and this one knows 1): update", WHOLE),
    Plan("files", "result.json is cut at the end of a line", file("result.json", damage.cut_at_line), "report run",
         Exit.DAMAGED, "result.json is not what was written: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "result.json is cut", file("result.json", damage.cut), "chat run", Exit.DAMAGED,
         "result.json is not what was written: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "result.json is empty", file("result.json", damage.emptied), "report run", Exit.DAMAGED,
         "result.json is empty: `tap-agent resume run` writes it anew", WHOLE, ended=True),
    Plan("files", "a bit of result.json is another", file("result.json", damage.flipped), RESUME, Exit.OK,
         "result.json is not what was written, and is result.json.damaged now: it is written anew", ASIDE, ended=True,
         then=""),
    Plan("files", "result.json is of a newer version", file("result.json", damage.newer), "report run", Exit.DAMAGED,
         "result.json was written by a newer version of tap-agent", WHOLE, ended=True),
    Plan("files", "all lines of events.jsonl but the first are lost", file("events.jsonl", damage.tail_lost), RESUME,
         Exit.OK, "", AGAIN, then=""),
    Plan("files", "a bit of events.jsonl is another", file("events.jsonl", damage.flipped), RESUME, Exit.OK,
         "run/events.jsonl has lines that are not what was written, and are left out: 1", AGAIN, then=""),
    Plan("files", "a bit of the last step is another", file("checkpoints.sqlite", damage.step_flipped), RESUME, Exit.OK,
         "its steps are done again from what was answered and measured", ASIDE, then=""),
    Plan("files", "checkpoints.sqlite is empty", file("checkpoints.sqlite", damage.emptied), RESUME, Exit.OK,
         "checkpoints.sqlite holds no step: its steps are done again", AGAIN, then=""),
    Plan("files", "checkpoints.sqlite is of a newer version", file("checkpoints.sqlite", damage.newer), RESUME,
         Exit.DAMAGED, "checkpoints.sqlite was written by a newer version of tap-agent", WHOLE),
    Plan("files", "calls.sqlite is cut", file("calls.sqlite", damage.cut), RESUME, Exit.DAMAGED,
         "calls.sqlite is not what was written", WHOLE),
    Plan("files", "calls.sqlite is empty", file("calls.sqlite", damage.emptied), RESUME, Exit.DAMAGED,
         "calls.sqlite is empty: put it back from a copy, or move it away", WHOLE),
    # caches
    Plan("caches", "every file of the cache is cut", every_file_cut, RESUME, Exit.OK,
         "it is measurements.sqlite.damaged now, and all is measured anew", "all; the cache is made anew", then=""),
    Plan("caches", "the measurements are of a newer version", cached("measurements.sqlite", damage.newer), RESUME,
         Exit.DAMAGED, "measurements.sqlite was written by a newer version of tap-agent", WHOLE),
    # disks
    Plan("disks", "the disk is full when a run begins", full, NEW, Exit.STORAGE,
         "cannot be written (File too large): make room there, or point TMPDIR at", NOTHING),
    Plan("disks", "the disk is full while a run goes on", full, RESUME, Exit.STORAGE, "cannot be written", AGAIN,
         then=RESUME),
    Plan("disks", "the disk of the cache is full", forgotten(full), APPLY, Exit.STORAGE,
         "make room, or point TAP_CACHE at a folder that takes files", "what was measured before"),
    Plan("disks", "the run's folder is read-only", read_only(lambda place: place.run), RESUME, Exit.RUN,
         "cannot be written", WHOLE),
    Plan("disks", "the cache is read-only", forgotten(read_only(lambda place: place.cache)), APPLY, Exit.STORAGE,
         "make room, or point TAP_CACHE at a folder that takes files", "what was measured before"),
    # servers of language models
    Plan("models", "the server is down when a run begins", down, NEW, Exit.MODEL,
         "): start the server, or give another --base-url, or take --llm embedded", NOTHING),
    Plan("models", "the server refuses the key when a run begins", refusing, NEW, Exit.MODEL,
         "refuses the key in OPENAI_API_KEY (401): set a valid one", NOTHING),
    Plan("models", "the server goes down within a generation", down_midway, RESUME, Exit.MODEL,
         "Connection error. (All connection attempts failed)): see to it, then resume the run", AGAIN, then=RESUME),
    Plan("models", "the server refuses the key within a search", answered(WRONG_KEY), RESUME, Exit.MODEL,
         "Error code: 401 - no such key): see to it, then resume the run", AGAIN, then=RESUME),
    Plan("models", "the server is busy (429, Retry-After: 1), then well", answered(BUSY), RESUME, Exit.OK, "", AGAIN,
         then=""),
    Plan("models", "the server fails (500) three times, then is well", answered(*[FAILING] * 3), RESUME, Exit.MODEL,
         "Error code: 500 - out of order): see to it, then resume the run", AGAIN, then=RESUME),
    Plan("models", "an answer is cut off, then the server is well", answered(CUT), RESUME, Exit.OK, "", AGAIN, then=""),
    Plan("models", "answers are no JSON", answered(*[NO_JSON] * 3), RESUME, Exit.MODEL,
         "the language model failed (scripted: the server's answer is garbled", AGAIN, then=RESUME),
    Plan("models", "an answer has no end", impatient(dribbling), RESUME, Exit.MODEL,
         "the language model failed (scripted: no whole answer within 1 s)", AGAIN, then=RESUME),
    Plan("models", "the server takes a request and says nothing", impatient(hanging), RESUME, Exit.MODEL,
         "the language model failed (scripted: no whole answer within 1 s)", AGAIN, then=RESUME),
    Plan("models", "a stream is cut off in a conversation", typed("Why?\nquit\n", answered(CUT_STREAM)), "chat run",
         Exit.OK, "the language model failed (scripted: ConnectionError: the answer was cut off)", TALK, ended=True),
    # signals
    Plan("signals", "Ctrl-C (SIGINT) within a generation", nothing, RESUME, Exit.INTERRUPTED, GOES_ON, AGAIN,
         then=RESUME, sent=(INT,)),
    Plan("signals", "Ctrl-C twice", nothing, RESUME, Exit.INTERRUPTED, "", AGAIN, then=RESUME, sent=(INT, INT)),
    Plan("signals", "SIGTERM within a generation", nothing, RESUME, TERM, "", AGAIN, then=RESUME, sent=(TERM,)),
    Plan("signals", "the terminal is closed (SIGHUP) within a generation", nothing, RESUME, HUP, "", AGAIN, then=RESUME,
         sent=(HUP,)),
    # clocks
    Plan("clocks", "the clock was put back by a century within a run", file("events.jsonl", damage.of_another_day),
         "resume run --max-minutes 60", Exit.OK, "", AGAIN, then=""),
    # processes
    Plan("processes", "another process writes the run", written_elsewhere, RESUME, Exit.RUN,
         "run is being written by another process: wait for it, or stop it", WHOLE),
]  # fmt: skip
