"""The account of a run: every call of a language model, written down before it is sent and after it has ended.

One row of one SQLite file is one request. It is committed with the most that the request can
cost before that leaves, and completed with what came of it. So a kill loses nothing: an answer
that was paid for is read from here when its proposal is made again, and a call without an end
counts at what was reserved for it. The limits hold for what has ended, what is in flight and
the call that asks, in whichever thread.
"""

from __future__ import annotations

import datetime
import itertools
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from agents.answer import Answer
from tap_eval.measuring.ledger import Ledger, key
from tap_eval.mistake import Mistake
from tap_eval.sealed import Damage, mark_database, sealed, unsealed
from tap_eval.storage import RUN, writing

Price = tuple[float, float]
"""USD for a million tokens in, and for a million out"""

CHAT = "chat about "
"""begins the name of a call for a conversation, where another has that of a candidate"""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY,
    at TEXT NOT NULL,
    llm TEXT NOT NULL,
    name TEXT NOT NULL,         -- of the candidate, after `CHAT` for a conversation about it
    ordinal INTEGER NOT NULL,   -- of the call within the proposal, from 1; further tries have the same
    request TEXT NOT NULL,      -- hash
    sent INTEGER NOT NULL,      -- 0 for an answer from the cache or a replay file, which is free
    reserved_in INTEGER NOT NULL,
    reserved_out INTEGER NOT NULL,
    reserved_cost REAL,         -- USD; NULL where the price is unknown
    tokens_in INTEGER,
    tokens_out INTEGER,
    cost REAL,
    seconds REAL,
    answer TEXT,
    error TEXT
)
"""
_SPENT = """
SELECT count(*), total(coalesce(tokens_in, reserved_in)), total(coalesce(tokens_out, reserved_out)),
       total(coalesce(cost, reserved_cost)), total(coalesce(cost, reserved_cost) IS NULL)
FROM calls WHERE sent
"""


class LimitMistake(Mistake):
    """A limit of the run that the next call would pass."""

    kind = "limit"


class Stopping(Exception):
    """A call that does not begin, since its run was interrupted."""


class Interrupted(KeyboardInterrupt):
    """An interrupt while a call was under way, whose `answer` came all the same: it is paid for."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class CallFailed(Exception):
    """A request without an answer; `free` where the server refused it, `again` where another try may help."""

    def __init__(
        self, reason: str, *, free: bool = False, again: bool = False, pause: float | None = None, refusal: str = ""
    ) -> None:
        super().__init__(reason)
        self.free = free
        self.again = again
        self.pause = pause
        """seconds that the server wants to be left alone"""
        self.refusal = refusal
        """what a server says that does not take the request as it is"""


@dataclass(frozen=True)
class Limits:
    """What a run may spend over all its sessions; None is no limit."""

    cost: float | None = None
    """USD"""
    calls: int | None = None
    minutes: float | None = None


class Spent(BaseModel):
    """What was spent on language models."""

    model_config = ConfigDict(frozen=True)
    calls: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    """USD; None where a price is unknown"""


@dataclass(frozen=True)
class Call:
    """One call of one proposal, with the most tokens that it can take."""

    llm: str
    name: str
    ordinal: int
    request: str
    tokens_in: int
    tokens_out: int


class Account(AbstractContextManager["Account"]):
    """The calls of one run, in the file at `path` or, without one, in memory; for any number of threads.

    `seconds` tells the time that the run has taken. With a `cache`, answers are kept there for
    other runs, and taken from there for nothing. Once `stopping` is set, no call begins.
    """

    def __init__(
        self,
        path: Path | None = None,
        limits: Limits | None = None,
        prices: Mapping[str, Price] | None = None,
        seconds: Callable[[], float] = float,
        cache: Ledger | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        """Raises `StorageMistake` where the file cannot be written, as every call then does."""
        self._path = path or Path(":memory:")
        self._limits = limits or Limits()
        self._prices = prices or {}
        self._seconds = seconds
        self._cache = cache
        self.stopping = stopping or threading.Event()
        """set once no call is to begin"""
        self._ended = threading.Condition()
        self._in_flight: dict[int, float] = {}
        with writing(self._path, RUN):
            self._database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._database.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; {_SCHEMA};")
            mark_database(self._database)
            for llm, price in self._prices.items():  # which may have become known since
                self._database.execute(
                    "UPDATE calls SET reserved_cost = (reserved_in * :in + reserved_out * :out) / 1e6, "
                    "cost = coalesce(cost, (tokens_in * :in + tokens_out * :out) / 1e6) "
                    "WHERE llm = :llm AND sent AND reserved_cost IS NULL",
                    {"llm": llm, "in": price[0], "out": price[1]},
                )

    def __exit__(self, *_: object) -> None:
        with self._ended:
            self._database.close()

    def ask(self, call: Call, send: Callable[[], Answer]) -> Answer:
        """The answer to `call`: what it was earlier in this run, what the cache has, or what `send` brings.

        Raises `LimitMistake` where sending would pass a limit, and whatever `send` raises.
        """
        if recorded := self._recorded(call):
            return recorded
        if self._cache is None:
            return self._sent(call, send)
        found = self._cache.recall(call.request, lambda: self._sent(call, send).model_dump(mode="json"))
        answer = Answer.model_validate(found)
        if self._recorded(call) is None:
            self.keep(call, answer)
        return answer

    def keep(self, call: Call, answer: Answer) -> None:
        """Writes down an answer that was had for nothing."""
        with self._held():
            self._insert(call, sent=False, cost=0.0, answer=answer)

    def check(self) -> None:
        """Raises `Stopping` once no call is to begin, and `LimitMistake` when the run has taken its minutes."""
        self._check_stopping()
        limit = self._limits.minutes
        if limit is not None and self._seconds() >= 60 * limit:
            raise LimitMistake(f"--max-minutes {limit:g} is reached: {_FURTHER}.")

    def _check_stopping(self) -> None:
        if self.stopping.is_set():
            raise Stopping("the run is being stopped")

    def spent(self) -> Spent:
        """Everything sent so far; what has no end counts at its reservation."""
        with self._held():
            return self._spent()

    def answers(self) -> list[tuple[str, int, str, Answer]]:
        """Candidate, ordinal, language model and latest answer of every answered call of the search, in order."""
        with self._held():
            rows = self._database.execute(
                "SELECT name, ordinal, llm, answer, max(id) FROM calls WHERE answer IS NOT NULL AND name NOT LIKE ? "
                "GROUP BY name, ordinal ORDER BY name, ordinal",
                (f"{CHAT}%",),
            ).fetchall()
        found = [(name, ordinal, llm, _answer(answer)) for name, ordinal, llm, answer, _ in rows]
        return [(name, ordinal, llm, answer) for name, ordinal, llm, answer in found if answer]

    def _recorded(self, call: Call) -> Answer | None:
        with self._held():
            row = self._database.execute(
                "SELECT answer FROM calls WHERE name = ? AND ordinal = ? AND request = ? AND answer IS NOT NULL "
                "ORDER BY id DESC",
                (call.name, call.ordinal, call.request),
            ).fetchone()
        return _answer(row[0]) if row else None

    def _sent(self, call: Call, send: Callable[[], Answer]) -> Answer:
        row = self._reserve(call)
        started = time.perf_counter()
        end: dict[str, Any] = {}
        try:
            answer = send()
            end = self._end(call, answer)
            return answer
        except Interrupted as late:
            end = self._end(call, late.answer)
            raise
        except CallFailed as failed:
            end = {"error": str(failed)} | ({"tokens_in": 0, "tokens_out": 0, "cost": 0.0} if failed.free else {})
            raise
        finally:
            with self._held():
                del self._in_flight[row]
                self._ended.notify_all()
                columns = {"seconds": round(time.perf_counter() - started, 3), **end}
                self._database.execute(
                    f"UPDATE calls SET {', '.join(f'{name} = :{name}' for name in columns)} WHERE id = :row",  # noqa: S608
                    {"row": row, **columns},
                )

    def _end(self, call: Call, answer: Answer) -> dict[str, Any]:
        """What is written down of an answered call."""
        end: dict[str, Any] = {"answer": _kept(answer)}
        if answer.tokens:
            end |= {"tokens_in": answer.tokens[0], "tokens_out": answer.tokens[1]}
            end["cost"] = self._cost(call.llm, *answer.tokens)
        return end

    def _reserve(self, call: Call) -> int:
        """Commits the row of a call that may be sent, and gives its id.

        Where only reservations stand in the way, it waits for their calls to end: most cost far
        less than was reserved for them, and a run should not stop for want of what it has.
        """
        cost = self._cost(call.llm, call.tokens_in, call.tokens_out)
        with self._held():
            self._check_stopping()
            while not self._may(call, cost):
                self._ended.wait(_PATIENCE)
                self._check_stopping()
            row = self._insert(call, sent=True, cost=cost)
            self._in_flight[row] = cost or 0.0
            return row

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The database for one thread at a time; raises `StorageMistake`."""
        with self._ended, writing(self._path, RUN):
            yield

    def _may(self, call: Call, cost: float | None) -> bool:
        """Whether the call fits now; raises `LimitMistake` when it will not fit later either."""
        spent = self._spent()
        if self._limits.calls is not None and spent.calls >= self._limits.calls:
            raise LimitMistake(f"--max-calls {self._limits.calls} is reached: {_FURTHER}.")
        limit = self._limits.cost
        if limit is None:
            return True
        if cost is None or spent.cost is None:
            raise LimitMistake(f"--max-cost {limit:g} cannot be held: the price of a call is unknown.")
        ended = spent.cost - sum(self._in_flight.values())
        if round(ended + cost, 9) > limit:
            raise LimitMistake(
                f"--max-cost {limit:g} would be passed: ${spent.cost:.4f} is spent, and a call of {call.llm} "
                f"can cost ${cost:.4f}; {_FURTHER}."
            )
        return round(spent.cost + cost, 9) <= limit

    def _insert(self, call: Call, *, sent: bool, cost: float | None, answer: Answer | None = None) -> int:
        columns: dict[str, Any] = {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "llm": call.llm,
            "name": call.name,
            "ordinal": call.ordinal,
            "request": call.request,
            "sent": sent,
            "reserved_in": call.tokens_in,
            "reserved_out": call.tokens_out,
            "reserved_cost": cost,
            "answer": answer and _kept(answer),
        }
        marks = ", ".join(f":{name}" for name in columns)
        statement = f"INSERT INTO calls ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608
        row = self._database.execute(statement, columns).lastrowid
        assert row is not None
        return row

    def _spent(self) -> Spent:
        calls, tokens_in, tokens_out, cost, unknown = self._database.execute(_SPENT).fetchone()
        return Spent(calls=calls, tokens_in=tokens_in, tokens_out=tokens_out, cost=None if unknown else round(cost, 9))

    def _cost(self, llm: str, tokens_in: int, tokens_out: int) -> float | None:
        price = self._prices.get(llm)
        return price and (tokens_in * price[0] + tokens_out * price[1]) / 1e6


_PATIENCE = 0.5  # seconds between two looks whether the run is being stopped
_FURTHER = "resume the run with a higher one to go on"


def _kept(answer: Answer) -> str:
    return sealed(answer.model_dump_json(exclude_defaults=True))


def _answer(text: str) -> Answer | None:
    """What `_kept` was given; None where that is not what is there any more, and is to be asked for again."""
    try:
        return Answer.model_validate_json(unsealed(text))
    except Damage:
        return None


class Conversation:
    """The calls for one proposal, numbered from 1."""

    def __init__(self, account: Account, name: str, llm: str) -> None:
        self.account = account
        self.name = name
        self.llm = llm
        self._ordinals = itertools.count(1)

    def call(self, request: object, tokens_in: int = 0, tokens_out: int = 0) -> Call:
        """The next call, for `request`, which is JSON; raises what `Account.check` does."""
        self.account.check()
        return Call(self.llm, self.name, next(self._ordinals), key(request), tokens_in, tokens_out)
