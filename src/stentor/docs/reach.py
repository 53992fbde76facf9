"""What is connected with a part of the picture: where its events can get to, and where they come from."""

from __future__ import annotations

from stentor.docs.overview import Link, Overview

PASSES = ("topic", "gateway")
"""Kinds that hand on the events which they get; the others make new ones."""


class Reach:
    """The links of an overview, and which of them follow each other."""

    def __init__(self, overview: Overview) -> None:
        self._parts = overview.parts
        self._links = overview.links
        self._out: dict[str, list[int]] = {name: [] for name in overview.parts}
        self._into: dict[str, list[int]] = {name: [] for name in overview.parts}
        for number, link in enumerate(overview.links):
            self._out[link.start].append(number)
            self._into[link.end].append(number)

    def of(self, part: str) -> tuple[set[str], set[int]]:
        """The parts that are connected with this one up- or downstream, and the links (by number) that connect them."""
        links = {*self._follow(self._out[part], down=True), *self._follow(self._into[part], down=False)}
        parts = {end for number in links for end in (self._links[number].start, self._links[number].end)}
        return parts | {part}, links

    def _follow(self, begin: list[int], *, down: bool) -> set[int]:
        """Links by types: what goes through a topic is what came, so that other types of the topic stay out."""
        seen: set[tuple[int, str | None]] = {(number, type) for number in begin for type in _types(self._links[number])}
        todo = list(seen)
        for number, type in todo:
            link = self._links[number]
            middle = link.end if down else link.start
            through = self._parts[middle].kind in PASSES
            for other in self._out[middle] if down else self._into[middle]:
                for next in _types(self._links[other]):
                    found = (other, next)
                    if through and None not in (type, next) and type != next:
                        continue
                    if through and next is None:  # it takes every type: what it is about stays what it was
                        found = (other, type)
                    if found not in seen:
                        seen.add(found)
                        todo.append(found)
        return {number for number, _ in seen}


def _types(link: Link) -> tuple[str | None, ...]:
    return link.types or (None,)
