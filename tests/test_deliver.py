"""A remote service as the handler: what is sent, and what each answer means."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from stentor import App, Batch, Event, Group, Retry
from stentor.cloudevents import from_batch, from_headers, from_structured
from stentor.errors import ConfigError, DefinitionError
from stentor.health import Health
from stentor.message import DeadLetter, dead_topic, decode_dead_letter
from stentor.sinks.http import Target
from stentor.worker import Worker
from tests.receiver import Answer, Receiver, Request, receiving

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
QUICK = Retry(attempts=3, first="10ms", jitter=0)


class Placed(Event, topic="orders", key="order_id", type="com.shop.order.placed"):
    order_id: str
    amount: float = 1.0


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as found:
        yield found


@asynccontextmanager
async def shop(to: Any, *types: type[Any], **options: Any) -> AsyncIterator[App]:
    app = App("shop", broker="memory://")
    app.deliver(*(types or (Placed,)), to=to, **{"retry": QUICK, "group": Group("away"), **options})
    async with app:
        yield app


async def idle(app: App) -> None:
    """Come back when nothing is under way, and nothing waits for a retry."""
    assert app.program is not None
    async with asyncio.timeout(60):
        while any(worker.busy for worker in app.program.workers) or any(
            lag.events or lag.parked for lag in await app.broker.admin.lag()
        ):
            await asyncio.sleep(0.01)


async def held(app: App) -> Worker:
    """Come back when the group holds."""
    assert app.program is not None
    [worker] = app.program.workers
    async with asyncio.timeout(60):
        while worker.hold.reason is None:
            await asyncio.sleep(0.005)
    return worker


async def dead(app: App, group: str = "away") -> list[DeadLetter]:
    return [
        decode_dead_letter(message.data)
        async for _, message in app.broker.browse(dead_topic(group), "earliest", follow=False)
    ]


# ---- what is sent ---------------------------------------------------------------------------------------------------


async def test_binary_mode_with_a_signature_that_the_official_library_takes(receiver: Receiver) -> None:
    async with shop(receiver.url, secret=SECRET) as app:
        receipt = await app.publish(Placed(order_id="ä-1", amount=2.5), subject="Größe 1%")
        [request] = await receiver.got(1)
        await idle(app)
    assert (request.method, request.path) == ("POST", "/hook")
    message = from_headers(request.headers, request.body)
    assert (message.id, message.type, message.key) == (receipt.id, "com.shop.order.placed", "ä-1")
    assert (message.subject, message.datacontenttype) == ("Größe 1%", "application/json")
    assert Webhook(SECRET).verify(request.body, request.headers) == {"order_id": "ä-1", "amount": 2.5}


async def test_structured_mode(receiver: Receiver) -> None:
    async with shop(Target(receiver.url, mode="structured", secret=SECRET, headers={"x-api-key": "k"})) as app:
        receipt = await app.publish(Placed(order_id="o-1"))
        [request] = await receiver.got(1)
    assert request.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    assert request.headers["x-api-key"] == "k"
    assert from_structured(request.body).id == receipt.id
    Webhook(SECRET).verify(request.body, request.headers)


async def test_batches_are_one_request_and_what_is_bad_in_one_is_found_alone(receiver: Receiver) -> None:
    def refuse_the_bad(request: Request) -> Answer:
        return 422 if b'"bad"' in request.body else 202

    receiver.answer = refuse_the_bad
    async with shop(receiver.url, batch=Batch(10, wait="1s"), secret=SECRET) as app:
        await app.publish([Placed(order_id="bad" if number == 7 else f"o-{number}") for number in range(10)])
        requests = await receiver.got(11)
        await idle(app)
        [letter] = await dead(app)
    assert [len(from_batch(request.body)) for request in requests] == [10] + [1] * 10
    assert letter.message.key == "bad"
    assert "answered 422" in letter.reason
    for request in requests:
        Webhook(SECRET).verify(request.body, request.headers)


async def test_a_batch_that_failed_as_a_whole_is_not_taken_apart(receiver: Receiver) -> None:
    answers = iter([500, 202])
    receiver.answer = lambda request: next(answers)
    async with shop(receiver.url, batch=Batch(10, wait="100ms")) as app:
        await app.publish([Placed(order_id=f"o-{number}") for number in range(10)])
        requests = await receiver.got(2)
        await idle(app)
    first, second = ({message.id for message in from_batch(request.body)} for request in requests)
    assert first == second
    assert len(first) == 10


async def test_a_repetition_carries_the_same_ids(receiver: Receiver) -> None:
    answers = iter([503, 202])
    receiver.answer = lambda request: next(answers)
    async with shop(receiver.url, secret=SECRET) as app:
        await app.publish(Placed(order_id="o-1"))
        first, second = await receiver.got(2)
    for header in ("ce-id", "webhook-id"):
        assert first.headers[header] == second.headers[header]


async def test_the_order_of_a_key_is_kept_through_failures(receiver: Receiver) -> None:
    seen: list[tuple[str, int]] = []

    def flaky(request: Request) -> Answer:
        if len(receiver.requests) % 3 == 0:
            return 500 if len(receiver.requests) % 2 else 409
        data = json.loads(request.body)
        seen.append((data["order_id"], int(data["amount"])))
        return 202

    receiver.answer = flaky
    async with shop(receiver.url, retry=Retry(attempts=None, first="5ms", longest="20ms")) as app:
        await app.publish([Placed(order_id=f"o-{number % 5}", amount=number) for number in range(100)])
        await idle(app)
    for key in range(5):
        assert [amount for order, amount in seen if order == f"o-{key}"] == list(range(key, 100, 5))


async def test_connections_are_used_again_and_bounded(receiver: Receiver) -> None:
    async with shop(receiver.url, group=Group("away", concurrency=3)) as app:
        await app.publish([Placed(order_id=f"o-{number}") for number in range(60)])
        await receiver.got(60)
    assert len(receiver.connections) <= 3


async def test_filters(receiver: Receiver) -> None:
    async with shop(receiver.url, where=lambda order: order.amount > 5) as app:
        await app.publish([Placed(order_id="small"), Placed(order_id="large", amount=10)])
        await idle(app)
    assert [json.loads(request.body)["order_id"] for request in receiver.requests] == ["large"]
    async with shop(receiver.url, where="partitionkey = 'x'") as app:
        await app.publish([Placed(order_id="y"), Placed(order_id="x")])
        await idle(app)
    assert [json.loads(request.body)["order_id"] for request in receiver.requests] == ["large", "x"]


async def test_a_whole_topic_goes_as_it_is(receiver: Receiver) -> None:
    app = App("shop", broker="memory://")
    app.deliver(topic="raw", to=receiver.url)
    app.deliver(Placed, to=receiver.url, group="second")
    assert list(app.groups()) == [f"shop.{receiver.url[7:-5].replace(':', '-')}", "second"]
    async with app:
        await app.publish(app.event("anything", {"a": [1, 2]}, topic="raw"))
        [request] = await receiver.got(1)
    assert json.loads(request.body) == {"a": [1, 2]}
    assert request.headers["ce-type"] == "anything"


# ---- what an answer means -------------------------------------------------------------------------------------------

DEAD = [300, 301, 302, 303, 307, 308, 400, 401, 403, 404, 405, 406, 410, 411, 413, 415, 422, 451, 499]
AGAIN = [408, 409, 425, 429, 500, 501, 502, 503, 504, 599]


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 299])
async def test_any_2xx_is_the_ack(receiver: Receiver, status: int) -> None:
    receiver.answer = lambda request: status
    async with shop(receiver.url) as app:
        await app.publish(Placed(order_id="o-1"))
        await idle(app)
        assert len(receiver.requests) == 1
        assert await dead(app) == []


async def test_these_answers_are_dead_letters_at_once(receiver: Receiver) -> None:
    receiver.answer = lambda request: (
        int(json.loads(request.body)["order_id"]), {"location": receiver.url + "/elsewhere"}, b"no\n thanks"
    )  # fmt: skip
    async with shop(receiver.url) as app:
        await app.publish([Placed(order_id=str(status)) for status in DEAD])
        await idle(app)
        letters = {letter.message.key: letter for letter in await dead(app)}
    assert sorted(json.loads(request.body)["order_id"] for request in receiver.requests) == sorted(map(str, DEAD))
    assert {request.path for request in receiver.requests} == {"/hook"}  # no redirect was followed
    for status in DEAD:
        assert letters[str(status)].attempts == 1
        assert f"{receiver.url} answered {status}" in letters[str(status)].reason
        assert letters[str(status)].reason.endswith(": no thanks")


@pytest.mark.parametrize("status", AGAIN)
async def test_these_answers_are_retried_by_the_groups_policy(receiver: Receiver, status: int) -> None:
    receiver.answer = lambda request: status
    async with shop(receiver.url) as app:
        await app.publish(Placed(order_id="o-1"))
        await idle(app)
        assert len(receiver.requests) == 3
        [letter] = await dead(app)
    assert (letter.reason, letter.attempts) == ("attempts", 3)
    assert all(f"answered {status}" in error.text for error in letter.errors)
    assert len(letter.errors) == 3


async def test_no_answer_in_time_and_a_refused_connection_are_retried() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with shop(f"http://127.0.0.1:{port}/", timeout="50ms") as app:
        await app.publish(Placed(order_id="o-1"))
        await idle(app)
        [letter] = await dead(app)
    assert [error.text for error in letter.errors] == [f"http://127.0.0.1:{port}/ did not answer within 0.05 s"] * 3
    server.close()
    await server.wait_closed()
    async with shop(f"http://127.0.0.1:{port}/") as app:
        await app.publish(Placed(order_id="o-1"))
        await idle(app)
        [letter] = await dead(app)
    assert letter.attempts == 3
    assert "connect" in letter.errors[0].text.lower()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_retry_after_holds_the_whole_group(receiver: Receiver, status: int, form: str) -> None:
    begun: list[float] = []

    def busy(request: Request) -> Answer:
        begun.append(asyncio.get_running_loop().time())
        if len(begun) > 1:
            return 202
        wait = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2.01), usegmt=True)
        return status, {"retry-after": wait}, b""

    receiver.answer = busy
    async with shop(receiver.url) as app:
        await app.publish(Placed(order_id="o-1"))
        await receiver.got(1)
        await held(app)
        await app.publish([Placed(order_id=f"o-{number}") for number in range(2, 20)])
        assert app.program is not None
        ready = await Health(app.program).ready()
        assert f"{receiver.url} is away" in ready["groups"][0]["held"]
        assert ready["status"] == "ready"  # this process is well
        metrics, _ = await Health(app.program).metrics("", {}, 0)
        assert b'stentor_held{group="away"} 1.0' in metrics
        await receiver.got(20)
        await idle(app)
    assert begun[1] - begun[0] >= 0.99
    assert begun[-1] - begun[0] < 10


async def test_a_target_that_is_away_burns_no_attempts_and_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stentor.sinks.http.FIRST_PAUSE", 0.05)
    monkeypatch.setattr("stentor.sinks.http.LONGEST_PAUSE", 0.1)
    async with receiving() as receiver:
        url, port = receiver.url, int(receiver.url.split(":")[2].split("/")[0])
    async with shop(url, group=Group("away", concurrency=2), retry=QUICK) as app:
        for number in range(200):
            await app.publish(Placed(order_id=f"o-{number}"))
        worker = await held(app)
        pauses, last = 0, None
        async with asyncio.timeout(60):
            while pauses < 5:  # many more tries than an event has attempts
                if worker.hold.reason is None and last is not None:
                    pauses += 1
                last = worker.hold.reason
                await asyncio.sleep(0.002)
        failed = worker.counts.failed
        assert failed <= 6  # those that found out; each pause after that cost no event an attempt
        assert await dead(app) == []
        async with receiving(Receiver(), port=port) as receiver:
            await receiver.got(200)
            await idle(app)
        assert sorted(r.headers["ce-partitionkey"] for r in receiver.requests) == sorted(f"o-{n}" for n in range(200))
        assert worker.counts.failed == failed


async def test_an_event_that_always_fails_does_not_hold_up_the_others(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stentor.sinks.http.FIRST_PAUSE", 0.02)
    others: set[str] = set()

    def answer(request: Any) -> int:
        if b"poison" in request.body:
            return 202 if len(others) == 20 else 500
        others.add(request.headers["ce-id"])
        return 202

    receiver.answer = answer
    async with shop(receiver.url, retry=Retry(attempts=None, first="1ms", longest="5ms")) as app:
        await app.publish([Placed(order_id="poison"), *(Placed(order_id=f"o-{number}") for number in range(20))])
        await idle(app)
    assert len(others) == 20
    assert sum(b"poison" in request.body for request in receiver.requests) > 1


async def test_a_stop_while_the_target_is_away_is_quick_and_loses_nothing(tmp_path: Any) -> None:
    async with receiving() as receiver:
        url, port = receiver.url, int(receiver.url.split(":")[2].split("/")[0])

    def make() -> App:
        app = App("shop", broker=f"sqlite:///{tmp_path}/shop.db")
        app.deliver(Placed, to=url, group="away", retry=Retry(attempts=10, first="10ms"))
        return app

    app = make()
    async with app:
        await app.publish([Placed(order_id=f"o-{number}") for number in range(100)])
        await held(app)
        began = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - began < 5
    async with receiving(port=port) as receiver, make() as app:
        await receiver.got(100)
        await idle(app)
    assert {request.headers["ce-partitionkey"] for request in receiver.requests} == {f"o-{n}" for n in range(100)}


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "no URL"), ("shop.example/hook", "no URL"), ("ftp://shop.example/", "no URL"), ("https://", "no URL"),
        ("https://host:99999/", "no URL"), ("https://host/a b", "no URL"), ("https://host/\n", "no URL"),
        ("https://user:hunter2@host/", "no user"), ("https://host/#there", "fragment"),
    ],
)  # fmt: skip
def test_a_wrong_url_is_one_clear_error(url: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        App("shop").deliver(Placed, to=url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("secret", ["hunter2!", "whsec_hunter2!", "whsec_" + "QUJD"])
def test_a_wrong_secret_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ConfigError, match="secret") as caught:
        App("shop").deliver(Placed, to="https://host/", secret=secret)
    assert secret not in str(caught.value)


def test_other_wrong_settings() -> None:
    app = App("shop")
    with pytest.raises(DefinitionError, match="a URL or a Target"):
        app.deliver(Placed, to=7)  # type: ignore[call-overload]
    with pytest.raises(DefinitionError, match="give the secret to"):
        app.deliver(Placed, to=Target("https://host/"), secret=SECRET)
    with pytest.raises(ConfigError, match="mode must be"):
        Target("https://host/", mode="batch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave mode= out"):
        app.deliver(Placed, to=Target("https://host/", mode="structured"), batch=Batch())
    with pytest.raises(ConfigError, match="certificate, key or ca"):
        Target("https://host/", ca="/nothing/there.pem")
