"""Durations as people write them, and when a failed handler runs again."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stentor import Batch, Retry
from stentor.clock import iso, parse_iso, seconds
from stentor.errors import DefinitionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200ms", 0.2),
        ("30s", 30),
        ("5m", 300),
        ("12h", 43_200),
        ("30d", 2_592_000),
        ("2w", 1_209_600),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        (" 5m ", 300),
        ("0s", 0),
        (timedelta(minutes=5), 300),
        (timedelta(0), 0),
    ],
)
def test_durations(text: str | timedelta, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong", ["", "5", "m", "5 m", "-5m", "5min", "1h 30m", "five", 5, 5.0, None, True, "5m!", "\u0665s"]
)
def test_what_is_no_duration_says_how_to_write_one(wrong: Any) -> None:
    with pytest.raises(DefinitionError, match=r'timeout: .* is no duration; write "200ms", "30s"'):
        seconds(wrong, "timeout")
    with pytest.raises(DefinitionError, match="is negative"):
        seconds(timedelta(seconds=-1))


@given(st.floats(0, 4e9))
def test_times_come_back(moment: float) -> None:
    assert parse_iso(iso(moment)) == pytest.approx(moment, abs=1e-6)


@pytest.mark.parametrize("wrong", ["", "2026-01-01T00:00:00", "yesterday"])
def test_times_without_a_zone_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_iso(wrong)


def test_the_wait_grows_to_the_longest() -> None:
    policy = Retry(first="200ms", factor=2, longest="5s", jitter=0)
    assert [policy.wait(n) for n in range(1, 8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert Retry(attempts=None, longest="10m", jitter=0).wait(10**9) == 600


@given(st.integers(1, 50), st.floats(0, 0.99))
def test_the_jitter_stays_in_its_share(attempt: int, jitter: float) -> None:
    even, spread = Retry(jitter=0), Retry(jitter=jitter)
    assert abs(spread.wait(attempt) - even.wait(attempt)) <= even.wait(attempt) * jitter + 1e-9


def test_when_it_gives_up() -> None:
    class Refused(Exception):
        pass

    assert [Retry(attempts=3).gives_up(ValueError(), n) for n in (1, 2, 3, 4)] == [False, False, True, True]
    assert not Retry(attempts=None).gives_up(ValueError(), 10**6)
    assert Retry(never=(Refused,)).gives_up(Refused(), 1)
    assert not Retry(never=(Refused,)).gives_up(ValueError(), 1)
    assert Retry(only=(OSError,)).gives_up(ValueError(), 1)
    assert not Retry(only=(OSError,)).gives_up(TimeoutError(), 1)
    assert Retry(only=(OSError,), never=(TimeoutError,)).gives_up(TimeoutError(), 1)
    assert Retry(never=Refused).never == (Refused,)  # type: ignore[arg-type]


def wrong(make: Callable[..., object], **settings: Any) -> object:
    return make(**settings)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Retry(attempts=0), "attempts must be a whole number from 1, or None, not 0"),
        (lambda: wrong(Retry, attempts=1.5), "attempts must be"),
        (lambda: Retry(attempts=True), "attempts must be"),
        (lambda: Retry(first="soon"), "Retry: first: 'soon' is no duration"),
        (lambda: wrong(Retry, longest=5), "Retry: longest: 5 is no duration"),
        (lambda: Retry(factor=0.5), "factor must be at least 1"),
        (lambda: Retry(jitter=1), "jitter must be from 0 up to 1"),
        (lambda: wrong(Retry, never=("ValueError",)), "never must be a tuple of exception classes"),
        (lambda: wrong(Retry, only=(5,)), "only must be a tuple of exception classes"),
        (lambda: Batch(0), "Batch: size must be a whole number from 1, not 0"),
        (lambda: Batch(True), "Batch: size"),
        (lambda: Batch(wait="later"), "Batch: wait: 'later' is no duration"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_written(make: Callable[..., object], complaint: str) -> None:
    with pytest.raises(DefinitionError, match=complaint):
        make()
