"""Where everything in the picture stands: see ``svg.py`` for how it looks."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from msgspec import Struct

from stentor.docs.layers import Cell, Columns, Side, Wire
from stentor.docs.overview import Kind, Link, Overview, Part

NAME, SMALL, LABEL = 17.0, 11.0, 12.5
"""Sizes of text: of a name, of what stands below it, of a link's types."""
LINE, URL = 20.0, 13.5
WIDEST = 190.0
"""Of a name, before it is broken into lines."""
SHOWN = 3
"""How many types a link names."""
MARGIN = 22.0
BAR = 34.0
"""The height of the broker's name."""
CAP = 9.0
"""How far the ends of a topic bulge."""
HEAD = 9.0
COLOURS = 8


class Text(Struct, frozen=True):
    """Lines that fit; ``whole`` if they had to be shortened, else ""."""

    lines: tuple[str, ...]
    width: float
    whole: str = ""


class Box(Struct, frozen=True):
    """A part in its place: left, top, width, height."""

    part: str
    kind: Kind
    x: float
    y: float
    width: float
    height: float
    name: Text
    below: str
    """The small line, which fits too."""
    colour: int | None
    """Of the service; None for what is everybody's."""


class Label(Struct, frozen=True):
    """The types of a link, in their place."""

    x: float
    y: float
    width: float
    height: float
    text: Text


class Path(Struct, frozen=True):
    """A link: points of cubic Bézier curves (three a piece), and its arrow heads (the last: 1 to the right)."""

    number: int
    """Which of the overview's links."""
    points: tuple[tuple[float, float], ...]
    heads: tuple[tuple[float, float, int], ...]
    back: bool
    label: Label | None
    colour: int | None


class Layout(Struct, frozen=True):
    """The whole picture; ``bands`` are the left and right ends of what stands for the broker that all share."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    paths: tuple[Path, ...]
    bands: tuple[tuple[float, float], ...]
    bar: float
    """Where the broker's name ends."""
    broker: Text
    prefix: str


# ---- text -----------------------------------------------------------------------------------------------------------

_WIDTHS = {char: width for chars, width in (
    ("ijl|'", 0.32), ("ftrI.,:;!()[]/\\- \"", 0.42), ("mwMW@%…", 1.0)) for char in chars}  # fmt: skip


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """About as wide as the widest of the usual fonts would make it."""
    width = 0.0
    for char in text:
        if unicodedata.combining(char):
            continue
        wide = 1.05 if unicodedata.east_asian_width(char) in "WF" else 0.82 if char.isupper() else 0.64
        width += _WIDTHS.get(char, wide if char.isascii() else max(wide, 0.75))
    return width * size * (1.1 if bold else 1.0)


def fit(text: str, size: float, widest: float, lines: int = 2, *, bold: bool = False) -> Text:
    """The text in so many lines, broken after punctuation or before a capital, and shortened if need be."""
    pieces, made = re.findall(r"[^\s./_:-]*?(?:[\s./_:-]+|(?<=[a-z])(?=[A-Z])|$)", text), [""]
    for piece in filter(None, pieces):
        if made[-1] and len(made) < lines and text_width(made[-1] + piece.rstrip(), size, bold=bold) > widest:
            made.append("")
        made[-1] += piece
    cut = False
    for index, line in enumerate(made):
        short = line.strip() or line
        while text_width(short, size, bold=bold) > widest and len(short) > 1:
            short, cut = short.removesuffix("…")[:-1] + "…", True
        made[index] = short
    return Text(tuple(made), max(text_width(line, size, bold=bold) for line in made), text if cut else "")


def common_prefix(types: Iterable[str]) -> str:
    """The longest dotted prefix that all types have, with its dot; each keeps a word of its own."""
    parts = [type.split(".")[:-1] for type in types]
    shared = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared) + "." if shared else ""


def anchor(kind: str, name: str) -> str:
    """The id on the page of an event, a service or a part."""
    return kind + "-" + re.sub(r"[^A-Za-z0-9._-]", lambda found: f"~{ord(found[0]):x}~", name)


# ---- layout ---------------------------------------------------------------------------------------------------------


def layout(overview: Overview) -> Layout:
    """Where everything stands."""
    prefix = common_prefix(overview.events)
    texts = {part.id: _text(part) for part in overview.parts.values()}
    sizes = {name: _size(overview, overview.parts[name], text) for name, text in texts.items()}
    links = [(number, link) for number, link in enumerate(overview.links) if link.start != link.end]
    labels = [_label(link, prefix) for _, link in links]
    wires = [
        Wire(link.start, link.end, (text.width + 14, 16.0 * len(text.lines) + 6) if text is not None else None)
        for (_, link), text in zip(links, labels, strict=True)
    ]
    kinds = {part.id: part.kind for part in overview.parts.values()}
    odd = [name for name, kind in kinds.items() if kind == "topic"]
    entered = {link.end for _, link in links}
    first = sorted((name for name in kinds if name not in entered), key=lambda name: kinds[name] != "source")
    columns = Columns(sizes, wires, odd, first, [name for name, kind in kinds.items() if kind == "gateway"])

    cells = [cell for column in columns.columns for cell in column]
    shared = overview.gateway is None and bool(odd)
    high = MARGIN + (BAR + 22 if shared else 0)
    bands = sorted({columns.spans[columns.cells[name].column] for name in odd}) if shared else []
    left = MARGIN + (18 if bands or any(wire.back for wire in wires) else 0)
    for cell in cells:
        cell.x, cell.y = cell.x + left, cell.y + high
    columns.spans = [(one + left, two + left) for one, two in columns.spans]
    boxes = []
    for part in overview.parts.values():
        cell = columns.cells[part.id]
        x, y = cell.x - cell.width / 2, cell.y - cell.height / 2
        boxes.append(Box(part.id, part.kind, x, y, cell.width, cell.height, texts[part.id], _below(part),
                         colour(overview, part.service)))  # fmt: skip
    paths = [
        _path(overview, columns, number, link, wire, text)
        for (number, link), wire, text in zip(links, wires, labels, strict=True)
    ]
    wide = tuple((one + left - 18, two + left + 18) for one, two in bands)
    ends = [columns.spans[-1][1], *(x for path in paths for x, _ in path.points), *(end for _, end in wide)]
    room = wide[-1][1] - wide[0][0] if wide else 0.0
    broker = fit(str(overview.broker) if overview.broker is not None else "", 13, max(room - 110, 400), 1, bold=True)
    bar = _bar(wide, broker, max(ends)) if wide else 0.0
    ends.append(bar)
    height = max((cell.y + cell.height / 2 for cell in cells), default=high) + MARGIN + (8 if shared else 0)
    return Layout(max(ends) + MARGIN, height, tuple(boxes), tuple(paths), wide, bar, broker, prefix)


def _bar(bands: Sequence[tuple[float, float]], broker: Text, right: float) -> float:
    """How far the broker's name goes: over all columns, to the end of the picture where there is but one."""
    needed = max(bands[0][0] + broker.width + 110, right if len(bands) == 1 else 0)
    end = bands[-1][1]
    return end if needed <= end else max(needed, end + 30)


def colour(overview: Overview, service: str) -> int | None:
    """The number of a service's colour."""
    return overview.services.index(service) % COLOURS if service in overview.services else None


def _text(part: Part) -> Text:
    size = URL if part.kind == "target" and "://" in part.name else NAME
    return fit(part.name, size, WIDEST, bold=True)


def _below(part: Part) -> str:
    """The small line: whose it is, and what."""
    known = (part.name, part.kind, f"of {part.service}")
    note = "" if part.kind in ("handler", "topic") or part.note in known else part.note
    text = " · ".join(word for word in (part.service, note) if word)
    short = text
    while _caps(short) > WIDEST:
        short = short.removesuffix("…")[:-1] + "…"
    return short


def _caps(text: str) -> float:
    """The width of the small line, which is in capitals and spaced."""
    return text_width(text.upper(), SMALL) + 0.7 * len(text)


def _size(overview: Overview, part: Part, name: Text) -> tuple[float, float]:
    below = _below(part)
    width = max(max(name.width, _caps(below)) + 30 + (CAP if part.kind == "topic" else 0), 84)
    ends = [sum(link.start == part.id for link in overview.links), sum(link.end == part.id for link in overview.links)]
    if part.kind == "gateway":
        return width + 12, max(150.0, 60 + 22.0 * sum(ends))
    return width, max(LINE * len(name.lines) + (17 if below else 0) + 18, 14 + 13.0 * (max(ends) - 1), 46)


def _label(link: Link, prefix: str) -> Text | None:
    if not link.types:
        return None
    if len(link.types) > SHOWN:
        return fit(f"{len(link.types)} types", LABEL, 170, 1)
    texts = [fit(type.removeprefix(prefix), LABEL, 170, 1) for type in link.types]
    return Text(tuple(text.lines[0] for text in texts), max(text.width for text in texts))


def _edge(overview: Overview, cell: Cell, port: float, side: Side) -> tuple[float, float]:
    """Where a link touches a box."""
    inset = 0.0
    if overview.parts[cell.name].kind == "topic":
        inset = CAP * (1 - math.sqrt(max(1 - (port / (cell.height / 2)) ** 2, 0)))
    half = cell.width / 2 - inset
    return cell.x + (half if side == "right" else -half), cell.y + port


def _path(
    overview: Overview, columns: Columns, number: int, link: Link, wire: Wire, text: Text | None
) -> Path:  # fmt: skip
    pen = _Pen()
    heads: list[tuple[float, float, int]] = []
    low, high = columns.cells[wire.cells[0].name or wire.end], columns.cells[wire.cells[-1].name or wire.start]
    if wire.back:
        x, y = _edge(overview, high, wire.ports["right"], "right")
        pen.move(x, y)
        right = columns.spans[high.column][1]
        pen.line(right, y)
        pen.turn(right, wire.cells[-1].y, 1)
        for step in reversed(wire.steps):
            here, there = step.end.column, step.start.column
            pen.line(columns.spans[here][0], pen.y)
            if here % 2 == 0:
                heads.append((sum(columns.spans[here]) / 2 - HEAD / 2, pen.y, -1))
            pen.curve(columns.spans[there][1], step.start.y + step.start_port)
        if wire.cells[0].name:
            x, y = _edge(overview, low, wire.steps[0].start_port, "right")
            pen.line(x + HEAD - 1, y)
            heads.append((x, y, -1))
        else:
            x, y = _edge(overview, low, wire.ports["left"], "left")
            edge = columns.spans[low.column][0] - HEAD
            pen.line(edge, pen.y)
            pen.turn(edge, y, -1)
            pen.line(x - HEAD + 1, y)
            heads.append((x, y, 1))
    else:
        pen.move(*_edge(overview, low, wire.steps[0].start_port, "right"))
        for step in wire.steps:
            pen.line(columns.spans[step.start.column][1], pen.y)
            last = bool(step.end.name)
            pen.curve(columns.spans[step.end.column][0] - (HEAD if last else 0), step.end.y + step.end_port)
        x, y = _edge(overview, high, wire.steps[-1].end_port, "left")
        pen.line(x - HEAD + 1, y)
        heads.append((x, y, 1))
    label = None
    if text is not None:
        cell = next(cell for cell in wire.cells if cell.width and not cell.name)
        label = Label(cell.x - cell.width / 2, cell.y - cell.height / 2, cell.width, cell.height, text)
    ends = [overview.parts[link.start], overview.parts[link.end]]
    ends.sort(key=lambda part: (part.kind == "topic", not part.service))
    whose = next((part.service for part in ends if part.service), "")
    return Path(number, tuple(pen.points), tuple(heads), wire.back, label, colour(overview, whose))


class _Pen:
    """Draws with cubic curves only."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    @property
    def y(self) -> float:
        return self.points[-1][1]

    def move(self, x: float, y: float) -> None:
        self.points.append((x, y))

    def _to(self, *points: tuple[float, float]) -> None:
        self.points += [(round(x, 1), round(y, 1)) for x, y in points]

    def line(self, x: float, y: float) -> None:
        old, y_old = self.points[-1]
        if abs(x - old) > 0.05:
            self._to((old + (x - old) / 3, y_old), (x - (x - old) / 3, y), (x, y))

    def curve(self, x: float, y: float) -> None:
        """Level at both ends."""
        old, y_old = self.points[-1]
        middle = (old + x) / 2
        self._to((middle, y_old), (middle, y), (x, y))

    def turn(self, x: float, y: float, way: int) -> None:
        """Around to another height at the same place."""
        old, y_old = self.points[-1]
        out = way * min(14 + abs(y - y_old) * 0.06, 24)
        self._to((old + out, y_old), (x + out, y), (x, y))
