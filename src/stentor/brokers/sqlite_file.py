"""The file under the sqlite broker: schema, one writer thread with group commit, a file lock, checkpoints, wake-ups.

All writes that wait become one transaction: one fsync for many publishes and settles. A lock on a file beside the
database is held around each transaction and checkpoint, so that processes take turns fairly, and no commit can meet a
checkpoint (the WAL-reset race of SQLite before 3.51.3, https://sqlite.org/wal.html#walresetbug).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import queue
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stentor.errors import BrokerError, PublishUnknown, StentorError, StorageFull, StorageUnusable, Unavailable

T = TypeVar("T")
VERSION = 1
APPLICATION = 0x53744E74  # "StNt"
LEAST = (3, 35, 0)
CHECKPOINT = 8 * 1024 * 1024
RESTART = 64 * 1024 * 1024
COLUMNS = 8
HAND_OVER = 128
"""Operations that are handed to the writer without waiting for the end of the loop's turn."""
LARGEST = 4096
"""Operations after which a transaction takes no more."""
CHUNKS = (128, 32, 8, 2, 1)
"""Rows per INSERT: many in one statement, as each statement gives the interpreter lock away and takes it back."""

SCHEMA = """
CREATE TABLE stentor_meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE stentor_topic (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, retention REAL);
CREATE TABLE stentor_event (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, topic INTEGER NOT NULL, slot INTEGER NOT NULL, id TEXT NOT NULL, key TEXT,
    type TEXT NOT NULL, ts REAL NOT NULL, head BLOB NOT NULL, body BLOB NOT NULL);
CREATE INDEX stentor_event_topic ON stentor_event (topic, seq);
CREATE TABLE stentor_delayed (
    n INTEGER PRIMARY KEY, due REAL NOT NULL, topic INTEGER NOT NULL, slot INTEGER NOT NULL, id TEXT NOT NULL, key TEXT,
    type TEXT NOT NULL, head BLOB NOT NULL, body BLOB NOT NULL);
CREATE INDEX stentor_delayed_due ON stentor_delayed (due, n);
CREATE INDEX stentor_delayed_id ON stentor_delayed (id);
CREATE TABLE stentor_seen (id TEXT PRIMARY KEY, ts REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE stentor_group (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, app TEXT NOT NULL, single INTEGER NOT NULL,
    expires REAL NOT NULL, touched REAL NOT NULL);
CREATE TABLE stentor_reads (
    grp INTEGER NOT NULL, topic INTEGER NOT NULL, replay TEXT NOT NULL DEFAULT '', until INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (grp, topic)) WITHOUT ROWID;
CREATE TABLE stentor_place (
    grp INTEGER NOT NULL, topic INTEGER NOT NULL, slot INTEGER NOT NULL, prefix INTEGER NOT NULL,
    done BLOB NOT NULL DEFAULT x'', PRIMARY KEY (grp, topic, slot)) WITHOUT ROWID;
CREATE TABLE stentor_slot (
    grp INTEGER NOT NULL, slot INTEGER NOT NULL, member INTEGER, epoch INTEGER NOT NULL DEFAULT 0,
    clean INTEGER NOT NULL DEFAULT 1, PRIMARY KEY (grp, slot)) WITHOUT ROWID;
CREATE TABLE stentor_worker (
    id INTEGER PRIMARY KEY AUTOINCREMENT, lease REAL NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL,
    address TEXT NOT NULL);
CREATE TABLE stentor_member (
    id INTEGER PRIMARY KEY AUTOINCREMENT, grp INTEGER NOT NULL, worker INTEGER NOT NULL);
CREATE TABLE stentor_journal (
    grp INTEGER NOT NULL, topic INTEGER NOT NULL, slot INTEGER NOT NULL, name TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (grp, topic, slot, name)) WITHOUT ROWID;
"""

Row = tuple[int, int, str, str | None, str, float, bytes, bytes]
"""topic, slot, id, key, type, ts, head, body"""


def insert_sql(table: str, columns: Sequence[str], rows: int, verb: str = "INSERT") -> str:
    """An INSERT of many rows in one statement."""
    row = f"({','.join('?' * len(columns))})"
    return f"{verb} INTO {table} ({','.join(columns)}) VALUES {','.join([row] * rows)}"


def chunks(total: int) -> Iterable[int]:
    """How many rows each statement takes: few distinct sizes, so that prepared statements are reused."""
    for size in CHUNKS:
        while total >= size:
            yield size
            total -= size


_EVENT = ("topic", "slot", "id", "key", "type", "ts", "head", "body")
_INSERTS = {size: insert_sql("stentor_event", _EVENT, size) for size in CHUNKS}


class Tx:
    """One transaction, as the operations in it see it."""

    __slots__ = ("_flat", "_rows", "db", "last", "now", "regrouped", "told")

    def __init__(self, db: sqlite3.Connection, now: float) -> None:
        self.db = db
        self.now = now
        found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'stentor_event'").fetchone()
        self.last: int = found[0] if found else 0
        """The highest sequence number given out so far."""
        self._flat: list[Any] = []
        self._rows = 0
        self.told = False
        """Other processes have something to look at."""
        self.regrouped = False
        """Members came or went, or slots are free: the other members must look at their shares."""

    def append(self, row: Row) -> int:
        """Add an event to the log; returns its sequence number."""
        self._flat.extend(row)
        self._rows += 1
        self.told = True
        return self.last + self._rows

    def flush(self) -> None:
        """Write what ``append`` gathered."""
        flat, start = self._flat, 0
        for size in chunks(self._rows):
            end = start + size * COLUMNS
            self.db.execute(_INSERTS[size], flat[start:end])
            start = end
        self.last += self._rows
        self._flat, self._rows = [], 0

    def many(self, verb: str, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write rows with few statements."""
        start = 0
        for size in chunks(len(rows)):
            part = rows[start : start + size]
            self.db.execute(insert_sql(table, columns, size, verb), [value for row in part for value in row])
            start += size


def translate(error: sqlite3.Error, path: Path) -> StentorError:
    """Stentor's error for one of SQLite's."""
    text = str(error)
    if "full" in text:
        return StorageFull(f"{path}: {text}; free some disk space")
    if "readonly" in text or "read-only" in text:
        return StorageUnusable(f"{path}: the file or its folder cannot be written")
    if "malformed" in text or "not a database" in text or "encrypted" in text:
        return StorageUnusable(f"{path}: {text}; restore it from a backup, or move it away to start a new one")
    if "locked" in text or "busy" in text:
        return Unavailable(f"{path}: another program holds a lock on the file; it must commit or close")
    if "unable to open" in text:
        return StorageUnusable(f"{path}: cannot be opened; does its folder exist, and may this user write there?")
    return BrokerError(f"{path}: {text}")


def host_id() -> str:
    """This boot of this machine, and the process namespace: where pids and the monotonic clock mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()}/{int(time.time() - time.monotonic()) // 60}"


def alive(pid: int) -> bool:
    """Whether a process of this host runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


_STORED, _REGROUPED = b"1", b"2"
Op = tuple[Callable[[Tx], Any] | Row, "asyncio.Future[Any] | None"]
"""What to do (a bare Row: append it), and who waits for it."""


class SqliteFile:
    """An open database file. ``run`` and ``told`` belong to the event loop that opened it."""

    def __init__(self, path: Path, *, synchronous: str, beat: float) -> None:
        self.path = path
        self.beat = beat
        self.on_beat: Callable[[Tx], None] | None = None
        """Called in a transaction of the writer thread every ``beat`` seconds."""
        self.on_wake: Callable[[bool], None] | None = None
        """Called in the loop when another process wrote something; True when that concerns the members of a group."""
        self.address = ""
        self._synchronous = synchronous
        self._queue: queue.SimpleQueue[list[Op] | None] = queue.SimpleQueue()
        self._pending: list[Op] = []
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._lock_fd = -1
        self._checked = 0.0
        self.closed = True

    # ---- opening ------------------------------------------------------------------------------------------------

    def connect(self, *, read_only: bool = False) -> sqlite3.Connection:
        """A connection of the settings that all of Stentor's must have."""
        db = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, cached_statements=256, timeout=5.0
        )
        try:
            db.execute("PRAGMA wal_autocheckpoint=0")
            db.execute(f"PRAGMA synchronous={self._synchronous}")
            db.execute("PRAGMA cache_size=-16000")
            if read_only:
                db.execute("PRAGMA query_only=1")
        except sqlite3.Error:
            db.close()
            raise
        return db

    def open(self) -> None:
        """Open or create the file. Raises StorageUnusable, StorageFull or Unavailable."""
        if sqlite3.sqlite_version_info < LEAST:
            raise StorageUnusable(
                f"SQLite {sqlite3.sqlite_version} is too old; Stentor needs {'.'.join(map(str, LEAST))}"
            )
        try:
            self._lock_fd = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise StorageUnusable(f"{self.path}: the folder {self.path.parent} does not exist") from None
            if error.errno == errno.ENOSPC:
                raise StorageFull(f"{self.path}: no space left on the disk") from None
            raise StorageUnusable(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            self._writer = self.connect()
            try:
                self._prepare(self._writer)
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
                self.reader = self.connect(read_only=True)
            except BaseException:
                self._writer.close()
                raise
        except BaseException as error:
            os.close(self._lock_fd)  # the lock goes with it
            if isinstance(error, sqlite3.Error):
                raise translate(error, self.path) from None
            raise
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._listen()
        self._thread = threading.Thread(target=self._write, name="stentor-sqlite", daemon=True)
        self._thread.start()

    def _prepare(self, db: sqlite3.Connection) -> None:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "stentor_meta" not in tables:
            if tables:
                shown = ", ".join(sorted(tables)[:4])
                raise StorageUnusable(
                    f"{self.path}: this SQLite file belongs to another program (tables {shown}); name a file of its own"
                )
            if db.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
                raise StorageUnusable(f"{self.path}: this file system cannot do WAL; use a local disk")
            db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";\n"):
                if statement.strip():
                    db.execute(statement)
            db.execute("INSERT INTO stentor_meta VALUES ('version', ?)", (VERSION,))
            db.execute(f"PRAGMA application_id={APPLICATION}")
            db.execute("COMMIT")
            return
        if db.execute("PRAGMA journal_mode").fetchone()[0] != "wal":  # a copy made by VACUUM INTO, say
            db.execute("PRAGMA journal_mode=WAL")
        (version,) = db.execute("SELECT value FROM stentor_meta WHERE name = 'version'").fetchone()
        if version > VERSION:
            raise StorageUnusable(
                f"{self.path}: its schema has version {version}, this Stentor knows {VERSION}; upgrade this program"
            )

    # ---- wake-ups -----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        name = f"stentor-{os.getpid()}-{id(self):x}-{time.monotonic_ns():x}"
        if sys.platform == "linux":
            self.address = f"@{name}"  # an abstract name: nothing to clean up after a kill
            self._socket.bind(f"\0{name}")
        else:
            self.address = str(Path(tempfile.gettempdir()) / name)
            self._socket.bind(self.address)
        self.loop.add_reader(self._socket, self._hear)

    def _hear(self) -> None:
        assert self._socket is not None
        regrouped = False
        try:
            while True:
                regrouped = self._socket.recv(8) == _REGROUPED or regrouped
        except OSError:
            pass  # all that was waiting is read
        if self.on_wake is not None:
            self.on_wake(regrouped)

    def _tell(self, what: bytes, addresses: list[str]) -> None:
        if self._socket is None:
            return
        for address in addresses:
            if address != self.address:
                try:
                    self._socket.sendto(what, f"\0{address[1:]}" if address[0] == "@" else address)
                except OSError:
                    continue  # it is gone, or has wake-ups enough waiting

    # ---- writing ------------------------------------------------------------------------------------------------

    def append(self, row: Row) -> asyncio.Future[int]:
        """Append one event to the log; gives its sequence number once that is durable."""
        return self.submit(row)  # type: ignore[arg-type]

    def submit(self, operation: Callable[[Tx], T]) -> asyncio.Future[T]:
        """Run an operation in the writer's next transaction; the future ends when that is durable.

        An operation that raises a StentorError must not have written before; it fails alone. Any SQLite error fails
        the whole transaction.
        """
        future: asyncio.Future[T] = self.loop.create_future()
        if self.closed:
            future.set_exception(Unavailable(f"{self.path}: closed"))
            return future
        if not self._pending:
            # What this turn of the loop submits goes into one transaction.
            self.loop.call_soon(self._hand_over)
        self._pending.append((operation, future))
        if len(self._pending) >= HAND_OVER:
            # The writer inserts these while the loop prepares the next.
            self._queue.put(self._pending)
            self._pending = [(_nothing, None)]
        return future

    def _hand_over(self) -> None:
        pending, self._pending = self._pending, []
        self._queue.put(pending)

    def _more(self) -> list[Op]:
        """What was handed over since the transaction began."""
        ops: list[Op] = []
        try:
            while True:
                got = self._queue.get_nowait()
                if got is None:
                    self._queue.put(None)  # for the writer's own loop
                    return ops
                ops += got
        except queue.Empty:
            return ops

    def _write(self) -> None:
        """The writer thread."""
        beaten = 0.0
        while True:
            wait = max(0.0, beaten + self.beat - time.monotonic())
            ops: list[Op] = []
            try:
                got = self._queue.get(timeout=wait)
                while True:
                    if got is None:
                        if ops:
                            self._transact(ops)
                        return
                    ops += got
                    got = self._queue.get_nowait()
            except queue.Empty:
                pass
            beat = time.monotonic() - beaten >= self.beat
            if beat and self.on_beat is not None:
                beaten = time.monotonic()
                ops.append((self.on_beat, None))
            elif beat:
                beaten = time.monotonic()
            if ops:
                self._transact(ops)

    def _transact(self, ops: list[Op]) -> None:
        db = self._writer
        results: list[tuple[asyncio.Future[Any] | None, Any, BaseException | None]] = []
        committing = False
        told = b""
        addresses: list[str] = []
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            db.execute("BEGIN IMMEDIATE")
            tx = Tx(db, time.time())
            more, append = ops, tx.append
            while more:
                for operation, future in more:
                    try:
                        result = append(operation) if type(operation) is tuple else operation(tx)  # type: ignore[operator]
                        results.append((future, result, None))
                    except sqlite3.Error:
                        raise
                    except Exception as error:
                        results.append((future, None, error))
                tx.flush()
                if len(ops) >= LARGEST:
                    break
                more = self._more()
                ops += more
            committing = True
            db.execute("COMMIT")
            told = _REGROUPED if tx.regrouped else _STORED if tx.told else b""
            if told:  # read each time: whoever joined a moment ago must be woken too
                addresses = [address for (address,) in db.execute("SELECT address FROM stentor_worker").fetchall()]
            self._checkpoint(db)
        except sqlite3.Error as error:
            known = translate(error, self.path)
            if committing and not isinstance(known, (StorageFull, Unavailable)):
                known = PublishUnknown([], f"the commit of {self.path} failed: {error}")
            results = [(future, None, known) for _, future in ops]
            try:
                if db.in_transaction:
                    db.execute("ROLLBACK")
            except sqlite3.Error:
                pass
        finally:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        if told:
            self._tell(told, addresses)
        try:
            self.loop.call_soon_threadsafe(_resolve, results)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    def _checkpoint(self, db: sqlite3.Connection) -> None:
        """Move the WAL into the database when it has grown; the file lock is held, so no commit is under way."""
        now = time.monotonic()
        if now - self._checked < 0.2:
            return
        self._checked = now
        try:
            size = Path(f"{self.path}-wal").stat().st_size
        except OSError:
            return
        if size > CHECKPOINT:
            try:
                db.execute(f"PRAGMA wal_checkpoint({'TRUNCATE' if size > RESTART else 'PASSIVE'})").fetchall()
            except sqlite3.OperationalError:
                return  # a reader is in the way; the next one will do it

    async def query(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Run a reading function on a connection of its own, outside the event loop. Raises BrokerError.

        All that it reads is of one moment: what is stored between two of its reads must not be in neither.
        """

        def ask() -> T:
            db = self.connect(read_only=True)
            try:
                db.execute("BEGIN")
                return question(db)
            finally:
                db.close()

        try:
            return await asyncio.to_thread(ask)
        except sqlite3.Error as error:
            raise translate(error, self.path) from None

    async def close(self) -> None:
        """Finish what is queued, then close."""
        if self.closed:
            return
        self.closed = True
        if self._pending:
            self._hand_over()
        self._queue.put(None)
        assert self._thread is not None
        # No executor and no event: at the exit of the interpreter there is none any more.
        while self._thread.is_alive():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        # Futures of the last transaction are resolved by callbacks that are queued already.
        await asyncio.sleep(0)
        if self._socket is not None:
            self.loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
            if self.address[0] != "@":
                os.unlink(self.address)  # noqa: PTH108 - quick, and at the very end
        self.reader.close()
        self._writer.close()
        os.close(self._lock_fd)


def _nothing(_: Tx) -> None:
    """Stands in a fresh pending list so that the hand-over at the end of the turn is known to be scheduled."""


def _resolve(results: list[tuple[asyncio.Future[Any] | None, Any, BaseException | None]]) -> None:
    for future, result, error in results:
        if future is None or future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
