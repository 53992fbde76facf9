"""A directed graph in columns, left to right: cycles broken, columns chosen, order and coordinates found.

Boxes stand in the even columns and the labels of links in the odd ones, so that a label has a place of its own as a box
has. A link that goes back passes beside its own two boxes, around which it turns. Everything is deterministic.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

Side = Literal["left", "right"]
SWEEPS = 24
RELAXATIONS = 60
STRAIGHT = 8.0
"""How much more a bend in the middle of a link weighs than one at its end."""
PORT = 18.0
"""The distance between two links at one side of a box, where there is room."""


class Cell:
    """What has a place in a column: a box, a label, or a link that passes (``end`` is the box that it turns around)."""

    __slots__ = ("column", "end", "ends", "gap", "height", "index", "name", "weight", "width", "x", "y")

    def __init__(self, column: int, width: float, height: float, gap: float, name: str = "") -> None:
        self.column = column
        self.width = width
        self.height = height
        self.gap = gap
        self.name = name
        self.index = 0
        self.x = 0.0
        self.y = 0.0
        """Of its middle, as ``x``."""
        self.end: tuple[Cell, Side] | None = None
        self.weight = 1.0
        self.ends: dict[Side, list[Step]] = {"left": [], "right": []}


class Step:
    """A piece of a link between cells of adjacent columns; the ports are offsets from their middles."""

    __slots__ = ("end", "end_port", "start", "start_port", "weight")

    def __init__(self, start: Cell, end: Cell, weight: float) -> None:
        self.start = start
        self.end = end
        self.start_port = 0.0
        self.end_port = 0.0
        self.weight = weight


class Wire:
    """A link in the drawing: the cells that it passes, in the direction of the columns; ``back`` if it goes against."""

    __slots__ = ("back", "cells", "end", "label", "ports", "start", "steps")

    def __init__(self, start: str, end: str, label: tuple[float, float] | None) -> None:
        self.start = start
        self.end = end
        self.label = label
        self.back = False
        self.cells: list[Cell] = []
        self.steps: list[Step] = []
        self.ports: dict[Side, float] = {"left": 0.0, "right": 0.0}
        """Of a link that goes back: where it meets the boxes that it turns around."""


class Columns:
    """The drawing: ``cells`` by the name of a box, ``wires`` as they were given, and the columns."""

    def __init__(
        self, sizes: dict[str, tuple[float, float]], wires: Sequence[Wire], odd: Iterable[str], first: Iterable[str],
        open: Iterable[str],
    ) -> None:  # fmt: skip
        """``odd``: what stands in every second column only; ``first``: where the links begin to be followed;
        ``open``: boxes that links going back enter from the right.
        """
        self._odd = set(odd)
        self._open = set(open)
        self.wires = [wire for wire in wires if wire.start != wire.end]
        seen = self._break(list(dict.fromkeys([*first, *sizes])))
        layers = self._layers(list(sizes))
        last = max(layers.values(), default=0)
        self.columns: list[list[Cell]] = [[] for _ in range(2 * last + 1)]
        self.cells = {name: Cell(2 * layers[name], *sizes[name], 20, name) for name in sizes}
        for name in sorted(sizes, key=seen.__getitem__):
            self.columns[2 * layers[name]].append(self.cells[name])
        for wire in self.wires:
            self._string(wire)
        self._order()
        self._ports()
        self._heights()
        self._widths()

    # ---- columns ----------------------------------------------------------------------------------------------------

    def _break(self, order: Sequence[str]) -> dict[str, int]:
        """Turn the links that close a cycle; in which order the boxes were seen."""
        out: dict[str, list[Wire]] = {name: [] for name in order}
        for wire in self.wires:
            out[wire.start].append(wire)
        seen: dict[str, int] = {}
        done: set[str] = set()
        for root in order:
            if root in seen:
                continue
            seen[root] = len(seen)
            stack = [(root, iter(out[root]))]
            while stack:
                name, rest = stack[-1]
                for wire in rest:
                    if wire.end in seen:
                        wire.back = wire.end not in done
                    else:
                        seen[wire.end] = len(seen)
                        stack.append((wire.end, iter(out[wire.end])))
                        break
                else:
                    done.add(name)
                    stack.pop()
        return seen

    def _layers(self, names: Sequence[str]) -> dict[str, int]:
        """The longest way to each box, with those that must be in the odd ones there."""
        ins: dict[str, list[str]] = {name: [] for name in names}
        outs: dict[str, list[str]] = {name: [] for name in names}
        for wire in self.wires:
            start, end = (wire.end, wire.start) if wire.back else (wire.start, wire.end)
            ins[end].append(start)
            outs[start].append(end)
        layers: dict[str, int] = {}
        open = {name: len(ins[name]) for name in names}
        ready = [name for name in names if not open[name]]
        for name in ready:
            layers[name] = max(
                (layers[one] + self._far(one, name) for one in ins[name]), default=int(name in self._odd)
            )
            for end in outs[name]:
                open[end] -= 1
                if not open[end]:
                    ready.append(end)
        for name in reversed(ready):  # what nothing leads to stands beside what it leads to, but in the first column
            if not ins[name] and outs[name] and name in self._odd:
                layers[name] = min(layers[end] - self._far(name, end) for end in outs[name])
        return layers

    def _far(self, start: str, end: str) -> int:
        return 1 if (start in self._odd) != (end in self._odd) else 2

    def _string(self, wire: Wire) -> None:
        """The cells of a link, and its steps."""
        low, high = (self.cells[name] for name in ((wire.end, wire.start) if wire.back else (wire.start, wire.end)))
        label = high.column - 1 if wire.start in self._odd and not wire.back else low.column + 1
        cells: list[Cell] = []
        columns = range(low.column + 1, high.column)
        if wire.back:
            columns = range(low.column + (wire.end in self._open), high.column + 1)
            label = high.column - 1 if wire.start not in self._odd else low.column + 1
        for column in columns:
            shown = wire.label is not None and column == label
            width, height = wire.label if shown and wire.label is not None else (0.0, 4.0)
            cell = Cell(column, width, height, 8 if shown else 10)
            cells.append(cell)
            self.columns[column].append(cell)
        if not wire.back or wire.end in self._open:
            cells.insert(0, low)
        else:
            cells[0].end = (low, "left")
        if wire.back:
            cells[-1].end = (high, "right")
        else:
            cells.append(high)
        wire.cells = cells
        for start, end in pairwise(cells):
            step = Step(start, end, 2.0 if start.name or end.name else STRAIGHT)
            start.ends["right"].append(step)
            end.ends["left"].append(step)
            wire.steps.append(step)

    # ---- order ------------------------------------------------------------------------------------------------------

    def _order(self) -> None:
        """Sweep over the columns, to and fro, and keep the order with the fewest crossings."""
        self._number()
        best, kept = self._crossings(), [list(column) for column in self.columns]
        for sweep in range(SWEEPS):
            sides: tuple[Side, Side] = ("left", "right") if sweep % 2 == 0 else ("right", "left")
            for column in self.columns if sweep % 2 == 0 else reversed(self.columns):
                self._sort(column, sides[0])
            self._swap()
            if (found := self._crossings()) < best:
                best, kept = found, [list(column) for column in self.columns]
            if best == 0:
                break
        self.columns = kept
        self._number()

    def _number(self) -> None:
        for column in self.columns:
            for index, cell in enumerate(column):
                cell.index = index

    def _sort(self, column: list[Cell], side: Side) -> None:
        """By the middle of what each leads to on this side."""
        values: dict[Cell, float] = {}
        for cell in column:
            others = [step.start if side == "left" else step.end for step in cell.ends[side]]
            places = [(other.index + 0.5) / len(self.columns[other.column]) for other in others]
            values[cell] = sum(places) / len(places) if places else (cell.index + 0.5) / len(column)
        for cell in column:
            if cell.end is not None:  # it would like to be next to the box that it turns around
                home = values[cell.end[0]]
                values[cell] = home + (1e-4 if values[cell] >= home else -1e-4)
        column.sort(key=values.__getitem__)
        for index, cell in enumerate(column):
            cell.index = index

    def _swap(self) -> None:
        """Exchange neighbours as long as that takes crossings away."""
        for _ in range(6):
            better = False
            for column in self.columns:
                for index in range(len(column) - 1):
                    one, two = column[index : index + 2]
                    if self._between(one, two) > self._between(two, one):
                        column[index : index + 2] = [two, one]
                        one.index, two.index = two.index, one.index
                        better = True
            if not better:
                return

    @staticmethod
    def _between(upper: Cell, lower: Cell) -> float:
        """The crossings of the links of two neighbours."""
        found = 0.0
        for side in ("left", "right"):
            ours = [step.start.index if side == "left" else step.end.index for step in upper.ends[side]]
            theirs = [step.start.index if side == "left" else step.end.index for step in lower.ends[side]]
            found += sum(one > two for one in ours for two in theirs)
        for cell, other, below in ((upper, lower, False), (lower, upper, True)):
            if cell.end is not None and cell.end[0] is not other and (cell.end[0].index < cell.index) == below:
                found += len(other.ends[cell.end[1]])  # the turn around the box crosses what leaves there
        return found

    def _crossings(self) -> float:
        found = 0.0
        for column in self.columns:
            seen: list[int] = []
            for cell in column:
                places = sorted(step.end.index for step in cell.ends["right"])
                found += sum(len(seen) - bisect_right(seen, place) for place in places)
                for place in places:
                    insort(seen, place)
                if cell.end is not None:
                    box, side = cell.end
                    low, high = sorted((box.index, cell.index))
                    found += sum(max(len(other.ends[side]), 0.5) for other in column[low + 1 : high])
        return found

    # ---- coordinates ------------------------------------------------------------------------------------------------

    def _ports(self) -> None:
        """Where at the sides of a box its links begin and end: in the order of their other ends."""
        turns: dict[tuple[Cell, Side], list[tuple[Cell, Wire]]] = {}
        for wire in self.wires:
            for cell in wire.cells:
                if cell.end is not None:
                    turns.setdefault(cell.end, []).append((cell, wire))
        for box in self.cells.values():
            for side in ("left", "right"):
                ends: list[tuple[tuple[int, int], Step | Wire]] = [
                    ((0, (step.start if side == "left" else step.end).index), step) for step in box.ends[side]
                ]
                ends += [  # the nearest one has the shortest turn
                    ((1 if cell.index > box.index else -1, -cell.index), wire)
                    for cell, wire in turns.get((box, side), ())
                ]
                ends.sort(key=lambda end: end[0])
                room = min(PORT, (box.height - 14) / max(len(ends) - 1, 1))
                for index, (_, one) in enumerate(ends):
                    port = (index - (len(ends) - 1) / 2) * room
                    if isinstance(one, Wire):
                        one.ports[side] = port
                    elif side == "left":
                        one.end_port = port
                    else:
                        one.start_port = port

    def _heights(self) -> None:
        """Let each cell be drawn to where its links would be straight, as far as its neighbours let it."""
        for column in self.columns:
            top = -sum(cell.height + cell.gap for cell in column) / 2
            for cell in column:
                cell.y = top + (cell.gap + cell.height) / 2
                top += cell.height + cell.gap
        for turn in range(RELAXATIONS):
            forward = turn % 2 == 1
            for column in self.columns if forward else reversed(self.columns):
                self._relax(column, forward=forward, straight=turn >= RELAXATIONS * 2 // 3)
        for column in self.columns[1::2]:
            self._settle(column)
        for column in self.columns[2::4]:
            self._relax(column, forward=True, straight=True)
        top = min((cell.y - cell.height / 2 for column in self.columns for cell in column), default=0.0)
        for column in self.columns:
            for cell in column:
                cell.y -= top

    def _relax(self, column: list[Cell], *, forward: bool, straight: bool) -> None:
        wanted: list[float] = []
        for cell in column:
            sides: tuple[Side, ...] = ("left", "right") if forward else ("right", "left")
            places: list[tuple[float, float]] = []
            for side in sides:
                for step in cell.ends[side]:
                    if side == "left":
                        places.append((step.start.y + step.start_port - step.end_port, step.weight))
                    else:
                        places.append((step.end.y + step.end_port - step.start_port, step.weight))
            if cell.end is not None:
                box = cell.end[0]
                away = (box.height + cell.height) / 2 + cell.gap
                places.append((box.y + (away if cell.index > box.index else -away), 1.0))
            if not places:
                places.append((cell.y, 0.1))
            cell.weight = sum(weight for _, weight in places)
            wanted.append(_middle(places) if straight else sum(y * w for y, w in places) / cell.weight)
        for cell, y in zip(column, spread(column, wanted), strict=True):
            cell.y = y

    def _settle(self, column: list[Cell]) -> None:
        """Labels beside what handles or sends, not beside a topic, so that links fan out and in at topics."""
        wanted = []
        for cell in column:
            y, cell.weight = cell.y, STRAIGHT
            near = [(step.start, step.start_port) for step in cell.ends["left"]]
            near += [(step.end, step.end_port) for step in cell.ends["right"]]
            hub = any(other.name in self._open for other, _ in near)
            for other, port in near:
                if other.name not in self._open and (hub or (other.name and other.name not in self._odd)):
                    y, cell.weight = other.y + port, 2.0
            wanted.append(y)
        for cell, y in zip(column, spread(column, wanted), strict=True):
            cell.y = y

    def _widths(self) -> None:
        """The columns side by side, farther apart where links are steep."""
        left = 0.0
        self.spans: list[tuple[float, float]] = []
        """From where to where each column goes."""
        for number, column in enumerate(self.columns):
            width = max((cell.width for cell in column), default=0.0)
            self.spans.append((left, left + width))
            for cell in column:
                cell.x = left + width / 2
            steep = max((abs(step.end.y + step.end_port - step.start.y - step.start_port)
                         for cell in column for step in cell.ends["right"]), default=0.0)  # fmt: skip
            turns = sum(cell.end is not None for near in self.columns[number : number + 2] for cell in near)
            left += width + min(20 + steep * 0.16 + 8 * min(turns, 5), 84)


def _middle(places: list[tuple[float, float]]) -> float:
    """The weighted median; of two equal halves the one that stands first."""
    half = sum(weight for _, weight in places) / 2
    if len(places) == 2 and places[0][1] == places[1][1]:
        return places[0][0]
    passed = 0.0
    for y, weight in sorted(places):
        passed += weight
        if passed >= half:
            return y
    return places[-1][0]


def spread(column: Sequence[Cell], wanted: Sequence[float]) -> list[float]:
    """The middles nearest to the wanted ones (least squares, by weight) at which no two cells overlap."""
    offsets: list[float] = []
    for index, cell in enumerate(column):
        before = column[index - 1] if index else None
        step = (before.height + cell.height) / 2 + max(before.gap, cell.gap) if before is not None else 0.0
        offsets.append((offsets[-1] if offsets else 0.0) + step)
    blocks: list[tuple[float, float, int]] = []  # middle, weight, cells
    for index, cell in enumerate(column):
        place, weight, many = wanted[index] - offsets[index], cell.weight, 1
        while blocks and blocks[-1][0] > place:
            other, heavy, more = blocks.pop()
            place = (place * weight + other * heavy) / (weight + heavy)
            weight, many = weight + heavy, many + more
        blocks.append((place, weight, many))
    found = [place for place, _, many in blocks for _ in range(many)]
    return [place + offset for place, offset in zip(found, offsets, strict=True)]
