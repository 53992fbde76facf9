"""The picture as SVG for a page: links below, then boxes, then the types of the links. The page brings the style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil

from stentor.docs.graph import (
    BAR,
    CAP,
    HEAD,
    LABEL,
    LINE,
    MARGIN,
    NAME,
    SMALL,
    URL,
    Box,
    Layout,
    Path,
    anchor,
    layout,
)
from stentor.docs.overview import Link, Overview, Part
from stentor.docs.reach import Reach

ROUND = 12.0


def svg(overview: Overview, drawn: Layout | None = None) -> str:
    """The picture. Each part is a link to its place on the page, each type one to its event's."""
    drawn = drawn if drawn is not None else layout(overview)
    reach = Reach(overview)
    numbers = {name: number for number, name in enumerate(overview.parts)}
    width, height = ceil(drawn.width), ceil(drawn.height)
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="Which events go where" style="--wide:{width}px">'
    ]
    if drawn.bands:
        out.append(_broker(drawn))
    out += [_line(overview.links[path.number], path) for path in drawn.paths]
    for box in drawn.boxes:
        parts, links = reach.of(box.part)
        names = [f"p{numbers[name]}" for name in parts] + [f"l{number}" for number in links]
        out.append(_box(overview.parts[box.part], box, numbers[box.part], " ".join(sorted(names))))
    out += [_label(overview, path) for path in drawn.paths if path.label is not None]
    out.append("</svg>")
    return "\n".join(out)


def service_parts(overview: Overview, service: str) -> str:
    """What to show of a service: its parts, and the links from and to them, as ``data-with`` has it."""
    numbers = {name: number for number, name in enumerate(overview.parts)}
    own = {part.id for part in overview.parts.values() if part.service == service}
    found = [f"p{numbers[name]}" for name in own]
    for number, link in enumerate(overview.links):
        if link.start in own or link.end in own:
            found += [f"l{number}", f"p{numbers[link.start]}", f"p{numbers[link.end]}"]
    return " ".join(sorted(set(found)))


def part_anchor(part: Part) -> str:
    """Where on the page a part is described."""
    return anchor("part", part.id)


def _class(kind: str, colour: int | None, *more: str) -> str:
    return " ".join([kind, f"s{colour}" if colour is not None else "all", *(word for word in more if word)])


def _broker(drawn: Layout) -> str:
    """A bar with the broker's name, from which what it holds hangs in columns."""
    top, low, end = MARGIN, MARGIN + BAR, drawn.height - MARGIN / 2
    text = f"broker {drawn.broker.whole or drawn.broker.lines[0]}".strip()
    left, right = drawn.bands[0][0], drawn.bar
    r = ROUND
    d = [f"M{left + r:.1f} {top:.1f}H{right - r:.1f}q{r} 0 {r} {r}"]
    for index, (start, stop) in enumerate(reversed(drawn.bands)):
        if index == 0 and right > stop:
            d.append(f"V{low - r:.1f}q0 {r} {-r} {r}")
        if index or right > stop:
            d.append(f"H{stop + r:.1f}q{-r} 0 {-r} {r}")
        d.append(f"V{end - r:.1f}q0 {r} {-r} {r}H{start + r:.1f}q{-r} 0 {-r} {-r}")
        if index < len(drawn.bands) - 1:
            d.append(f"V{low + r:.1f}q0 {-r} {-r} {-r}")
    d.append(f"V{top + r:.1f}q0 {-r} {r} {-r}Z")
    words = f'<tspan class="caps">broker</tspan> <tspan dx="6">{escape(drawn.broker.lines[0])}</tspan>'
    return (
        f'<g class="broker"><title>{escape(text)}</title><path d="{"".join(d)}"/>'
        f'<text x="{left + 18:.1f}" y="{top + BAR / 2 + 4.5:.1f}">{words}</text></g>'
    )


def _line(link: Link, path: Path) -> str:
    points = [f"{x:.1f} {y:.1f}" for x, y in path.points]
    d = f"M{points[0]}C{' '.join(points[1:])}"
    heads = "".join(
        f"M{x:.1f} {y:.1f}L{x - way * HEAD:.1f} {y - HEAD / 2:.1f}V{y + HEAD / 2:.1f}Z" for x, y, way in path.heads
    )
    kind = _class("link", path.colour, "" if link.sure else "code", "back" if path.back else "")
    return (
        f'<g class="{kind}" data-id="l{path.number}"><path class="line" d="{d}"/><path class="head" d="{heads}"/></g>'
    )


def _box(part: Part, box: Box, number: int, connected: str) -> str:
    title = "\n".join([f"{part.kind} {part.name}", *(f"{name}: {value}" for name, value in part.facts)])
    if part.service:
        title = title.replace("\n", f"\nof {part.service}\n", 1) if part.facts else f"{title}\nof {part.service}"
    said = f"{part.kind} {part.name}" + (f" of {part.service}" if part.service else "")
    middle = box.x + box.width / 2 + (-CAP / 2 if box.kind == "topic" else 0)
    below = box.below
    size = NAME if not (part.kind == "target" and "://" in part.name) else URL
    tall = LINE * len(box.name.lines) + (17 if below else 0)
    y = box.y + box.height / 2 - tall / 2 + 16
    lines = [
        f'<text class="name" x="{middle:.1f}" y="{y + LINE * index:.1f}" font-size="{size:g}">{escape(line)}</text>'
        for index, line in enumerate(box.name.lines)
    ]
    if below:
        y += LINE * len(box.name.lines) - 3
        lines.append(f'<text class="below" x="{middle:.1f}" y="{y:.1f}" font-size="{SMALL:g}">{escape(below)}</text>')
    return (
        f'<a class="{_class("part " + part.kind, box.colour)}" href="#{part_anchor(part)}" data-id="p{number}" '
        f'data-with="{connected}" aria-label="{escape(said)}"><title>{escape(title)}</title>'
        f"{_shape(box)}{''.join(lines)}</a>"
    )


def _shape(box: Box) -> str:
    x, y, w, h = box.x, box.y, box.width, box.height
    if box.kind == "source":  # round where nothing comes in
        r = min(h / 2, 24)
        d = f"M{x + w - 6:.1f} {y:.1f}q6 0 6 6v{h - 12:.1f}q0 6 -6 6H{x + r:.1f}"
        d += f"a{r:.1f} {r:.1f} 0 0 1 {-r:.1f} {-r:.1f}v{2 * r - h:.1f}a{r:.1f} {r:.1f} 0 0 1 {r:.1f} {-r:.1f}Z"
    elif box.kind == "topic":  # a pipe that lies
        r, half = CAP, h / 2
        right = x + w - r
        d = f"M{x + r:.1f} {y:.1f}H{right:.1f}a{r} {half:.1f} 0 0 1 0 {h:.1f}"
        d += f"H{x + r:.1f}a{r} {half:.1f} 0 0 1 0 {-h:.1f}Z"
        lid = f'<path class="lid" d="M{right:.1f} {y:.1f}a{r} {half:.1f} 0 0 0 0 {h:.1f}"/>'
        return f'<path class="shape" d="{d}"/>{lid}'
    elif box.kind == "target":  # a corner is cut
        c = 12
        d = f"M{x:.1f} {y:.1f}H{x + w - c:.1f}l{c} {c}V{y + h:.1f}H{x + c:.1f}l{-c} {-c}Z"
    elif box.kind == "gateway":
        c = 20
        d = f"M{x:.1f} {y + c:.1f}L{x + w / 2:.1f} {y:.1f}L{x + w:.1f} {y + c:.1f}V{y + h - c:.1f}"
        d += f"L{x + w / 2:.1f} {y + h:.1f}L{x:.1f} {y + h - c:.1f}Z"
    else:
        return (
            f'<rect class="shape" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="7"/>'
            f'<path class="stripe" d="M{x + 7:.1f} {y:.1f}q-7 0 -7 7v{h - 14:.1f}q0 7 7 7Z"/>'
        )
    return f'<path class="shape" d="{d}"/>'


def _label(overview: Overview, path: Path) -> str:
    link, label = overview.links[path.number], path.label
    assert label is not None
    frame = (
        f'<rect x="{label.x:.1f}" y="{label.y:.1f}" width="{label.width:.1f}" height="{label.height:.1f}" '
        f'rx="{min(label.height / 2, 10):.1f}"/>'
    )
    title = "\n".join(link.types) + ("" if link.sure else "\nread from the code")
    lines: Sequence[str] = label.text.lines
    middle = label.x + label.width / 2
    texts = []
    for index, line in enumerate(lines):
        text = (
            f'<text x="{middle:.1f}" y="{label.y + 15.2 + 16 * index:.1f}" font-size="{LABEL:g}">{escape(line)}</text>'
        )
        type = link.types[index]
        if len(lines) == len(link.types) and type in overview.events:
            text = f'<a href="#{anchor("event", type)}" aria-label="event {escape(type)}">{text}</a>'
        texts.append(text)
    return (
        f'<g class="{_class("label", path.colour)}" data-id="l{path.number}"><title>{escape(title)}</title>'
        f"{frame}{''.join(texts)}</g>"
    )
