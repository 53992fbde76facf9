"""Peers that queue in a SQLite file: how each takes an order in, and how it hands orders to a handler, one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Figures, fresh, timed
from benchmarks.order import PlainOrder, bodies, decode

PUBLISHED = 2_000
WAITING = 10_000
"""How many events wait when a consumer starts; some peers get slower the more there are, so FEW is shown beside it."""
FEW = 1_000


class Handler:
    """Decodes what it is given to the typed class, as every case of the sqlite rows does."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, body: bytes | str) -> None:
        order = decode(body)
        assert isinstance(order, PlainOrder)
        self.seen += 1


class Queue(NamedTuple):
    """A peer: publish a body; take the next, hand it to the handler and acknowledge it."""

    publish: Callable[[bytes], object]
    consume: Callable[[], object]


Make = Callable[[Path, Handler], Queue]


def publish(make: Make, folder: Path) -> Figures:
    """Events a second that a peer takes in."""
    queue = make(folder, Handler())
    events = bodies(PUBLISHED)
    with timed() as taken:
        for body in events:
            queue.publish(body)
    return {"rate": PUBLISHED / taken()}


def consume(make: Make, waiting: int, folder: Path) -> Figures:
    """Events a second that a peer hands to its handler and acknowledges."""
    handler = Handler()
    queue = make(folder, handler)
    for body in bodies(waiting):
        queue.publish(body)
    with timed() as taken:
        for _ in range(waiting):
            queue.consume()
    assert handler.seen == waiting
    return {"rate": waiting / taken()}


def huey(folder: Path, handler: Handler) -> Queue:
    """A task a body, dequeued and executed in this process; ``synchronous`` is SQLite's default, FULL."""
    from huey import SqliteHuey

    queue = SqliteHuey("bench", filename=str(fresh(folder, "huey.db")), results=False)

    @queue.task()
    def handle(body: bytes) -> None:
        handler(body)

    return Queue(handle, lambda: queue.execute(queue.dequeue()))


def persist_queue(folder: Path, handler: Handler) -> Queue:
    """Its queue with acknowledgement: put; get, handle, ack."""
    from persistqueue import SQLiteAckQueue

    queue = SQLiteAckQueue(str(fresh(folder, "persist-queue")), auto_commit=True)

    def consume() -> None:
        body = queue.get()
        handler(body)
        queue.ack(body)

    return Queue(queue.put, consume)


def litequeue(folder: Path, handler: Handler) -> Queue:
    """Put; pop, handle, done. It does not wait for the disk: it sets ``synchronous`` to NORMAL."""
    from litequeue import LiteQueue

    queue = LiteQueue(fresh(folder, "litequeue.db"))

    def consume() -> None:
        message = queue.pop()
        handler(message.data)
        queue.done(message.message_id)

    return Queue(lambda body: queue.put(body.decode()), consume)
