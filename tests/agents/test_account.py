"""What is spent on language models: written down before and after, limited, and never paid twice."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agents.account import Account, CallFailed, Conversation, LimitMistake, Limits, Spent
from agents.answer import Answer
from agents.proposer import naming_failures
from tap_eval.measuring.ledger import Ledger
from tap_eval.mistake import StorageMistake
from tests.faults.faults import full

PRICES = {"paid": (1.0, 10.0)}
"""a call of 1,000 tokens in and 100 out costs 0.002 USD"""
SAID = Answer(content="Well.", tokens=(1000, 100))


def ask(account: Account, name: str = "p000", llm: str = "paid", send: Callable[[], Answer] = lambda: SAID) -> Answer:
    """The first call of a proposal, for which 2,000 tokens in and 1,000 out are reserved: 0.012 USD."""
    return account.ask(Conversation(account, name, llm).call(name, 2000, 1000), send)


def test_what_has_ended_costs_what_it_took_and_what_failed_what_it_might_have(tmp_path: Path) -> None:
    def fails(failure: CallFailed) -> Callable[[], Answer]:
        def send() -> Answer:
            raise failure

        return send

    with Account(tmp_path / "calls.sqlite", prices=PRICES) as account:
        ask(account)
        assert account.spent() == Spent(calls=1, tokens_in=1000, tokens_out=100, cost=0.002)
        with pytest.raises(CallFailed):
            ask(account, "p001", send=fails(CallFailed("500", free=True)))
        assert account.spent() == Spent(calls=2, tokens_in=1000, tokens_out=100, cost=0.002)
        with pytest.raises(CallFailed):
            ask(account, "p002", send=fails(CallFailed("no answer in time")))
        assert account.spent() == Spent(calls=3, tokens_in=3000, tokens_out=1100, cost=0.014)


def test_a_call_that_a_kill_cut_short_counts_at_its_reservation_and_is_sent_again(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    program = f"""
import pathlib, time
from tests.agents.test_account import PRICES, SAID, ask
from agents.account import Account
account = Account(pathlib.Path({str(path)!r}), prices=PRICES)
ask(account)
ask(account, "p001", send=lambda: (print("sent", flush=True), time.sleep(60)))
"""
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert running.stdout
    assert running.stdout.readline() == "sent\n"
    running.send_signal(signal.SIGKILL)
    running.wait()
    sent: list[str] = []
    with Account(path, prices=PRICES) as account:
        assert account.spent() == Spent(calls=2, tokens_in=3000, tokens_out=1100, cost=0.014)
        for name in ("p000", "p001"):
            ask(account, name, send=lambda name=name: sent.append(name) or SAID)  # type: ignore[misc]
        assert sent == ["p001"]
        assert account.spent().calls == 3
        assert [(name, ordinal) for name, ordinal, _, _ in account.answers()] == [("p000", 1), ("p001", 1)]


def test_an_answer_that_is_not_what_was_written_is_asked_for_again(tmp_path: Path) -> None:
    path, sent = tmp_path / "calls.sqlite", list[str]()
    with Account(path) as account:
        ask(account)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE calls SET answer = replace(answer, 'Well', 'Ill')")
    with Account(path) as account:
        assert account.answers() == []
        assert ask(account, send=lambda: sent.append("again") or SAID) == SAID  # type: ignore[func-returns-value]
        assert (sent, account.spent().calls) == (["again"], 2)


def test_a_full_disk_is_not_blamed_on_the_language_model(tmp_path: Path) -> None:
    with Account(tmp_path / "calls.sqlite") as account:
        with (
            full(),
            pytest.raises(StorageMistake, match=r"calls.sqlite cannot be written \(.*make room"),
            naming_failures("go on"),
        ):
            ask(account, send=lambda: pytest.fail("it was sent"))
        assert ask(account) == SAID


@pytest.mark.parametrize(
    ("limits", "most", "says"),
    [
        (Limits(calls=5), 5, "--max-calls 5 is reached"),
        (Limits(cost=0.021), 5, "--max-cost 0.021 would be passed"),
        (Limits(cost=0.03, calls=40), 10, "a call of paid can cost"),
    ],
)
def test_limits_count_what_is_in_flight_in_other_threads(limits: Limits, most: int, says: str) -> None:
    account = Account(limits=limits, prices=PRICES)
    inside = threading.Semaphore(0)
    reserved: list[float] = []

    def slow() -> Answer:
        spent = account.spent()
        assert spent.cost is not None
        reserved.append(spent.cost)
        inside.acquire(timeout=0.05)
        return SAID

    def worker(index: int) -> str:
        try:
            ask(account, f"p{index:03d}", send=slow)
        except LimitMistake as limit:
            return str(limit)
        return ""

    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(worker, range(24)))
    assert ends.count("") == account.spent().calls == most
    assert all(says in end for end in ends if end)
    assert max(reserved) <= (limits.cost or 1)


def test_time_is_limited_over_all_sessions() -> None:
    taken = 59.0
    account = Account(limits=Limits(minutes=1), seconds=lambda: taken)
    ask(account)
    taken = 60.0
    with pytest.raises(LimitMistake, match="--max-minutes 1 is reached"):
        ask(account, "p001")


def test_a_price_that_is_missing_makes_the_cost_unknown_until_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    with Account(path, prices=PRICES) as account:
        ask(account)
        ask(account, "p001", llm="other")
        assert account.spent() == Spent(calls=2, tokens_in=2000, tokens_out=200, cost=None)
    with Account(path, Limits(cost=1.0), PRICES | {"other": (2.0, 20.0)}) as account:
        assert account.spent().cost == pytest.approx(0.006)


def test_a_cached_answer_costs_nothing_and_is_no_call(tmp_path: Path) -> None:
    cache = Ledger(tmp_path / "answers.sqlite")
    with Account(prices=PRICES, cache=cache) as first, Account(prices=PRICES, cache=cache) as second:
        ask(first)
        assert ask(second, send=lambda: pytest.fail("it was sent")) == SAID
        assert second.spent() == Spent(calls=0, tokens_in=0, tokens_out=0, cost=0)
        assert second.answers() == first.answers()


def test_an_answer_of_the_run_itself_goes_before_that_of_another_which_the_cache_has(tmp_path: Path) -> None:
    path, cache = tmp_path / "calls.sqlite", Ledger(tmp_path / "answers.sqlite")
    with Account(path) as account:  # as after an interrupt, of which the cache knows nothing
        ask(account)
    with Account(cache=cache) as other:
        ask(other, send=lambda: Answer(content="Another."))
    with Account(path, cache=cache) as account:
        assert ask(account).content == "Well."
        assert [answer.content for *_, answer in account.answers()] == ["Well."]
