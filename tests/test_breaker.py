"""The breaker of a group: what is called is away, and no event uses up its attempts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stentor import App, Batch, Breaker, Context, Event, Group, Retry
from stentor.errors import DefinitionError
from stentor.testing import harness
from stentor.testing.conformance.stage import until
from stentor.testing.harness import Harness


class Job(Event, topic="jobs", key="key", type="test.breaker.job"):
    key: str
    n: int


class Bank:
    """What the handlers call: there, or away."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.calls: list[int] = []
        self.attempts: list[int] = []

    def pay(self, n: int, attempt: int = 1) -> None:
        self.calls.append(n)
        self.attempts.append(attempt)
        if self.error is not None:
            raise self.error


def shop(bank: Bank, breaker: Breaker, *, batch: int = 0, broker: str = "memory://", **options: Any) -> App:
    group = Group("pay", breaker=breaker, **options)
    retry = Retry(attempts=3, first="100ms", jitter=0)
    if batch:

        @group.on(Job, retry=retry, batch=Batch(size=batch))
        async def many(some: list[Job]) -> None:
            for job in some:
                bank.pay(job.n)

    else:

        @group.on(Job, retry=retry)
        async def one(job: Job, ctx: Context) -> None:
            bank.pay(job.n, ctx.attempt)

    app = App("shop", broker=broker)
    app.add(group)
    return app


def held(t: Harness) -> str | None:
    [worker] = t._workers()
    return worker.hold.reason


def jobs(count: int, keys: int = 100) -> list[Job]:
    return [Job(key=f"k{n % keys}", n=n) for n in range(count)]


async def test_an_outage_costs_few_calls_and_no_attempts() -> None:
    """Away for an hour: a call a minute, nothing dies, and all is done soon after it is back."""
    bank = Bank()
    bank.error = ConnectionError("refused")
    async with harness(shop(bank, Breaker(pause="1s", longest="1m"), concurrency=1)) as t:
        await t.publish(jobs(50))
        await t.settled()
        assert len(bank.calls) == 5
        assert held(t) == "ConnectionError: refused"
        await t.advance("1h")
        assert 60 <= len(bank.calls) <= 75  # the pauses double to a minute; one handler tries after each
        bank.error = None
        await t.advance("2m")
        await t.settled()
        assert t.dead("pay") == []
        assert sorted(set(bank.calls)) == list(range(50))
        assert max(bank.attempts) <= 2
        assert held(t) is None


async def test_the_events_of_a_key_keep_their_order() -> None:
    bank = Bank()
    bank.error = ConnectionError("refused")
    async with harness(shop(bank, Breaker(after=1))) as t:
        await t.publish(jobs(20, keys=1))
        await t.settled()
        await t.advance("10s")
        assert set(bank.calls) == {0}
        bank.error = None
        await t.advance("30s")
        await t.settled()
        assert [n for n in bank.calls if n] == list(range(1, 20))


async def test_only_failures_in_a_row_open_it() -> None:
    bank = Bank()
    async with harness(shop(bank, Breaker(after=3), concurrency=1)) as t:
        for n in range(10):
            bank.error = None if n % 3 == 2 else TimeoutError("slow")
            await t.publish(Job(key=f"a{n}", n=n))
            await t.settled()
            assert held(t) is None
            bank.error = None
            await t.advance("10s")
            await t.settled()
    assert max(bank.attempts) == 2


async def test_other_errors_are_the_events_own() -> None:
    bank = Bank()
    bank.error = ValueError("no such account")
    async with harness(shop(bank, Breaker())) as t:
        await t.publish(jobs(20))
        await t.settled()
        await t.advance("1m")
        await t.settled()
        assert held(t) is None
        assert len(t.dead("pay")) == 20
    assert max(bank.attempts) == 3


async def test_what_a_handler_decides_itself_is_none_of_its_business() -> None:
    app = App("shop")
    group = Group("pay", breaker=Breaker(only=(Exception,), after=1))
    tried: list[int] = []

    @group.on(Job, retry=Retry(attempts=2))
    async def one(job: Job, ctx: Context) -> None:
        tried.append(job.n)
        if job.n == 0:
            ctx.dead("no such account")
        if ctx.attempt < 2:
            ctx.retry(after="1s")

    app.add(group)
    async with harness(app) as t:
        await t.publish(jobs(3))
        await t.settled()
        await t.advance("5s")
        assert held(t) is None
        assert [letter.reason for letter in t.dead("pay")] == ["no such account"]
    assert sorted(tried) == [0, 1, 1, 2, 2]


async def test_one_tries_and_then_all_go_on() -> None:
    bank = Bank()
    bank.error = ConnectionError("refused")
    async with harness(shop(bank, Breaker(after=1, pause="10s"), concurrency=8)) as t:
        await t.publish(jobs(30))
        await t.settled()
        before = len(bank.calls)
        await t.advance("10.5s")
        assert len(bank.calls) == before + 1
        bank.error = None
        await t.advance("21s")
        await t.settled()
        assert sorted(set(bank.calls)) == list(range(30))


async def test_a_batch_that_fails_so_is_not_taken_apart() -> None:
    bank = Bank()
    bank.error = ConnectionError("refused")
    async with harness(shop(bank, Breaker(after=15), batch=10, concurrency=1)) as t:
        await t.publish(jobs(20))
        await t.settled()
        assert len(bank.calls) == 2
        assert held(t) is not None
        bank.error = None
        await t.advance("1m")
        await t.settled()
        assert t.dead("pay") == []
        assert sorted(set(bank.calls)) == list(range(20))


async def test_with_a_rate_and_a_limiter() -> None:
    """What else decides how many begin does not open what the breaker has closed."""
    bank = Bank()
    bank.error = ConnectionError("refused")
    async with harness(shop(bank, Breaker(after=1, pause="10s"), concurrency="auto", rate="100/s")) as t:
        await t.publish(jobs(30))
        await t.settled()
        before = len(bank.calls)
        await t.advance("9s")
        assert len(bank.calls) == before
        bank.error = None
        await t.advance("1m")
        await t.settled()
        assert sorted(set(bank.calls)) == list(range(30))


async def test_a_restart_in_the_middle_of_an_outage_loses_nothing(tmp_path: Path) -> None:
    bank = Bank()
    bank.error = ConnectionError("refused")
    url = f"sqlite:///{tmp_path}/shop.db"
    app = shop(bank, Breaker(after=2, pause="50ms"), broker=url)
    async with app.running():
        await app.publish(jobs(20))
        await until(lambda: len(bank.calls) >= 4)
    bank.error = None
    async with shop(bank, Breaker(after=2, pause="50ms"), broker=url).running():
        await until(lambda: len(set(bank.calls)) == 20)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"after": 0}, "after must be a whole number from 1, not 0"),
        ({"only": ()}, "only must name an exception class"),
        ({"only": ("x",)}, "only must be a tuple of exception classes"),
        ({"pause": "0s"}, "pause must be more than 0"),
        ({"longest": "soon"}, "longest"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DefinitionError, match=complaint):
        Breaker(**options)


def test_a_group_wants_a_breaker() -> None:
    with pytest.raises(DefinitionError, match="breaker must be a Breaker, not 5"):
        Group("pay", breaker=5)  # type: ignore[arg-type]
