"""`Folder` and `Objects`: each file once, whole, and its rows; what was read stays read."""

from __future__ import annotations

import asyncio
import logging
import uuid
from functools import partial
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest

from stentor import Event
from stentor.errors import ConfigError, DefinitionError
from stentor.source import Publish
from stentor.sources.files import Folder, Objects
from tests.command import dead, redrive
from tests.sources import reading
from tests.sources.reading import Line, Reader, until


class Sale(Event, topic="sales", key="shop", type="com.example.sale"):
    shop: str
    amount: float
    paid: bool = True


class FileCame(Event, topic="files", type="com.example.file"):
    name: str
    size: int


running = partial(reading.running, (Sale, FileCame, Line))


async def test_files_that_are_there_and_files_that_come_are_events(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("12345")
    for name in (".hidden.txt", "b.txt.part", "c.csv"):
        (tmp_path / name).write_text("not this one")
    (tmp_path / "folder.txt").mkdir()
    async with running(Folder(tmp_path / "*.txt", to=FileCame, settle="0s", every="1h")) as found:
        await until(lambda: found == [FileCame(name="a.txt", size=5)])
        (tmp_path / "b.txt.part").rename(tmp_path / "b.txt")  # the kernel tells: nobody waits for an hour
        await until(lambda: len(found) == 2)
        assert found[1] == FileCame(name="b.txt", size=12)


async def test_a_file_that_is_written_slowly_is_read_when_it_is_whole(tmp_path: Path) -> None:
    async with running(Folder(tmp_path / "*", to=Line, format="jsonl", settle="500ms", every="1h")) as found:
        for n in range(5):
            with open(tmp_path / "slow", "a") as file:  # noqa: ASYNC230
                file.write(f'{{"n": {n}}}\n')
            await asyncio.sleep(0.1)
            assert found == []
        await until(lambda: [line.n for line in found] == [0, 1, 2, 3, 4])


async def test_rows_of_csv_are_events_and_bad_ones_dead_letters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sales.csv").write_text(
        '\ufeffshop,amount,paid,note\nnorth,1.5,true,"two\nlines"\nsouth,much,true,\nsouth,2\nwest,3,0,x\n'
    )
    async with running(Folder(tmp_path / "*.csv", to=Sale, format="csv", settle="0s")) as found:
        await until(lambda: len(found) == 2)
        assert {repr(sale) for sale in found} == {
            "Sale(shop='north', amount=1.5, paid=True)", "Sale(shop='west', amount=3.0, paid=False)",
        }  # fmt: skip
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("cannot read sales.csv:4: Expected `float`, got `str`" in line for line in said)
    assert any("sales.csv:5: 2 fields under 4 names: south,2" in line for line in said)


async def test_a_row_that_could_not_be_read_is_an_event_when_its_reader_is_mended(tmp_path: Path) -> None:
    """And the rows that could be read are no events again."""
    broker = f"sqlite:///{tmp_path}/events.db"
    (tmp_path / "sales.csv").write_text("shop,amount\nnorth,1.5\nsouth,2 EUR\nwest,x\n")

    def mended(row: dict[str, str]) -> Sale:
        return Sale(shop=row["shop"], amount=float(row["amount"].removesuffix(" EUR")))

    async with running(Folder(tmp_path / "*.csv", to=Sale, format="csv", settle="0s"), url=broker) as found:
        await until(lambda: [sale.shop for sale in found] == ["north"])
        await dead("reading.folder", 2, broker=broker)
    async with running(Folder(tmp_path / "*.csv", to=mended, format="csv", settle="0s"), url=broker) as found:
        await redrive("reading.folder", 2, broker=broker)
        await until(lambda: found == [Sale(shop="south", amount=2.0)])
        await dead("reading.folder", 2, broker=broker, status="redriven")
        await dead("reading.folder", 1, broker=broker)  # what still cannot be read is dead again


async def test_what_changed_is_read_again_and_what_is_durable_may_be_deleted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text('{"n": 1}\n')
    async with running(Folder(tmp_path / "*", to=Line, format="jsonl", settle="0s", every="50ms")) as found:
        await until(lambda: len(found) == 1)
        path.write_text('{"n": 1}\n{"n": 2}\n')
        await until(lambda: len(found) == 3)
    async with running(Folder(tmp_path / "*", to=Line, format="jsonl", settle="0s", after="delete")) as found:
        await until(lambda: len(found) == 2 and not path.exists())


@pytest.mark.parametrize(("form", "text"), [("file", ""), ("jsonl", '{"n": 1}\n{"n": 2}\n'), ("jsonl", "")])
async def test_many_small_files_are_few_writes(
    tmp_path: Path, form: Literal["file", "jsonl"], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The position tells of each file that is there: written for each of them, it would be written in squares."""
    for n in range(1200):
        (tmp_path / f"{n}").write_text(text)
    positions = []
    publish = Publish.__call__

    async def counted(self: Publish, *args: Any, position: Any = None, **options: Any) -> None:
        positions.append(len(position["seen"]))
        await publish(self, *args, position=position, **options)

    monkeypatch.setattr(Publish, "__call__", counted)
    to = FileCame if form == "file" else Line
    async with running(Folder(tmp_path / "*", to=to, format=form, settle="0s", after="delete")) as found:
        await until(lambda: list(tmp_path.iterdir()) == [])
        await until(lambda: len(found) == 1200 * (1 if form == "file" else text.count("n")))
    assert len(positions) <= 6
    assert positions[-1] == 1200


async def test_a_file_that_cannot_be_read_or_removed_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(f'{{"n": {ord(name)}}}\n')
    opened, removed = Folder.open, Folder.remove

    def open(self: Folder, name: str) -> Any:
        if name == "a" and denied:
            raise PermissionError("not now")
        return opened(self, name)

    def remove(self: Folder, name: str) -> None:
        if name == "b":
            raise PermissionError("never")
        removed(self, name)

    denied = True
    monkeypatch.setattr(Folder, "open", open)
    monkeypatch.setattr(Folder, "remove", remove)
    source = Folder(tmp_path / "*", to=Line, format="jsonl", settle="0s", every="50ms", after="delete")
    async with running(source) as found:
        await until(lambda: [line.n for line in found] == [98, 99] and not (tmp_path / "c").exists())
        denied = False
        await until(
            lambda: [line.n for line in found] == [98, 99, 97] and [path.name for path in tmp_path.iterdir()] == ["b"]
        )


@pytest.mark.slow
async def test_each_row_once_over_kills_of_the_reader(tmp_path: Path) -> None:
    folder, count, each = tmp_path / "in", 30_000, 3_000
    folder.mkdir()
    arguments = f"{str(folder / '*.jsonl')!r}, to=Line, format='jsonl', settle='0s', every='100ms'"
    reader = Reader(tmp_path, "stentor.sources.files", "Folder", arguments)
    try:
        reader.start()
        for start in range(0, count, each):
            part = folder / f"{start}.part"
            part.write_text("".join(f'{{"n": {n}}}\n' for n in range(start, start + each)))
            part.replace(folder / f"{start:06}.jsonl")
            if start % (3 * each) == 0:
                await reader.published(start + 1)  # in the middle of a file, or so
                reader.kill()
                reader.start()
        await reader.published(count)
    finally:
        reader.kill()
    assert reader.stored() == list(range(count))


async def test_objects_of_a_store_are_listed_and_read(tmp_path: Path) -> None:
    store, place = fsspec.filesystem("memory"), uuid.uuid4().hex
    store.pipe(f"/{place}/a.jsonl", b'{"n": 1}\n{"n": 2}\n')
    async with running(Objects(f"memory://{place}/*.jsonl", to=Line, format="jsonl", every="50ms")) as found:
        await until(lambda: sorted(line.n for line in found) == [1, 2])
        store.pipe(f"/{place}/b.jsonl", b'{"n": 3}\n')
        await until(lambda: sorted(line.n for line in found) == [1, 2, 3])
        await asyncio.sleep(0.2)
        assert len(found) == 3


async def test_compressed_objects_of_local_files(tmp_path: Path) -> None:
    with fsspec.open(str(tmp_path / "a.csv.gz"), "wb", compression="gzip") as file:
        file.write(b"shop,amount\nnorth,1\n")
    source = Objects(f"file://{tmp_path}/*.csv.gz", to=Sale, format="csv", after="delete")
    async with running(source) as found:
        await until(lambda: found == [Sale(shop="north", amount=1.0)] and not list(tmp_path.iterdir()))


def test_what_makes_no_sense_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="source folder: to must be an event class or a function"):
        Folder(tmp_path / "*", to=int)
    with pytest.raises(DefinitionError, match="source folder: format must be"):
        Folder(tmp_path / "*", to=Line, format="xml")  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="source folder: after must be"):
        Folder(tmp_path / "*", to=Line, after="burn")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="source objects: Protocol not known: nowhere"):
        Objects("nowhere://bucket/*", to=Line)
