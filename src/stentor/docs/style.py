"""How the page looks and what it does: one style sheet and one script, both inside the page."""

from __future__ import annotations

LIGHT = ("#0b6fb8", "#c8500a", "#068a63", "#b0468c", "#9a6a00", "#4a55c9", "#b3262e", "#4f7a16")
DARK = ("#58b0ee", "#f58b4c", "#36c79b", "#e58cc5", "#e3b341", "#9aa3ff", "#ff7b80", "#9ccb55")
"""Colours of services, by hue far apart for all kinds of sight as long as there are few of them; names say it too."""


def _colours(colours: tuple[str, ...]) -> str:
    return " ".join(f"--s{number}: {colour};" for number, colour in enumerate(colours))


STYLE = (
    f""":root {{ color-scheme: light dark; --line: #8885; --back: #fff; --ink: #16181d; --soft: #5b6270;
  --wash: #eef0f4; --edge: #c9ced8; --lid: #fff9; {_colours(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #14161b; --ink: #eceef2; --soft: #a2a9b8; --wash: #1f232b;
  --edge: #3a4150; --lid: #fff2; {_colours(DARK)} }} }}
"""
    + "".join(f".s{number} {{ --own: var(--s{number}); }}\n" for number in range(len(LIGHT)))
    + """.all { --own: var(--soft); }
html { scroll-behavior: smooth; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem 1rem; background: var(--back); color: var(--ink); }
header, main, .legend { max-width: 84rem; margin: 0 auto; }
h1, h2, h3, li { overflow-wrap: anywhere; }
h1 { margin: 0; line-height: 1.2; } h2 { margin: 2.5rem 0 .5rem; } h3 { margin: 1.5rem 0 .3rem; }
a { color: inherit; text-decoration-color: var(--edge); text-underline-offset: .2em; }
a:hover { text-decoration-color: currentColor; }
:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; border-radius: 3px; }
.told, small { color: var(--soft); } .told { margin: .2rem 0 1rem; }
code, pre { font: .9em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; background: var(--wash); padding: .7rem 1rem; border-radius: .4rem; margin: .6rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: .9em; white-space: nowrap; }
td:first-child { min-width: 8rem; } td small { display: inline-block; line-height: 1.35; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
section, tr { scroll-margin-top: 1rem; } tr:target { background: color-mix(in srgb, var(--s0) 14%, transparent); }
section:target > :first-child { text-decoration: underline; text-underline-offset: .25em; }
.pair { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 0 2.5rem; align-items: start; }
@media (max-width: 60rem) { .pair { grid-template-columns: minmax(0, 1fr); } }
.chip { display: inline-block; width: .8em; height: .8em; border-radius: .2em; background: var(--own);
  margin-right: .4em; }
figure { margin: 1rem 0; overflow-x: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; font-size: .9em; color: var(--soft); padding: 0;
  list-style: none; align-items: center; }
.legend svg { width: 34px; height: 20px; vertical-align: -5px; margin-right: .4em; }
.legend .all { --own: var(--soft); }
figure svg { display: block; width: 100%; min-width: calc(var(--wide) * .4); max-width: calc(var(--wide) * 1.5);
  height: auto; margin: auto; }
svg text { fill: var(--ink); text-anchor: middle; font-family: system-ui, sans-serif; }
svg a { text-decoration: none; outline: none; }
svg .name { font-weight: 600; }
svg .below, svg .caps { fill: var(--own); text-transform: uppercase; letter-spacing: .06em; font-weight: 500; }
.broker path { fill: var(--wash); }
.broker text { text-anchor: start; font-size: 13px; font-weight: 600; }
.broker .caps { fill: var(--soft); font-size: 10.5px; }
.shape { fill: color-mix(in srgb, var(--own) 14%, var(--back)); stroke: var(--own); stroke-width: 1.6; }
.stripe { fill: var(--own); }
.topic.all .shape { fill: var(--back); } .lid { fill: none; stroke: var(--own); stroke-width: 1.2; }
.source .shape { stroke-width: 2.4; }
.target .shape { fill: var(--back); stroke-dasharray: none; }
.gateway .shape { fill: var(--wash); stroke: var(--ink); stroke-width: 3; }
.line { fill: none; stroke: var(--own); stroke-width: 1.8; stroke-linecap: round; }
.head { fill: var(--own); stroke: none; }
.code .line { stroke-dasharray: 4 3.5; stroke-linecap: butt; }
.back .line { stroke-width: 1.3; }
.label rect { fill: var(--back); stroke: color-mix(in srgb, var(--own) 45%, var(--back)); stroke-width: 1; }
.part, .link, .label { transition: opacity .12s; }
.part:hover .shape, .part:focus-visible .shape { stroke-width: 3.2; }
.label a:hover text, .label a:focus-visible text { text-decoration: underline; }
.some .part:not(.on), .some .label:not(.on) { opacity: .13; } .some .link:not(.on) { opacity: .08; }
.some .link.on .line { stroke-width: 2.6; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } .part, .link, .label { transition: none; } }
@media print {
  @page { size: landscape; margin: 10mm; }
  :root { color-scheme: light; --back: #fff; --ink: #000; --soft: #444; --wash: #eef0f4; --edge: #bbb;
    """
    + _colours(LIGHT)
    + """ }
  body { margin: 0; font-size: 11px; print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  figure { margin: .5rem 0; overflow: visible; }
  figure svg { min-width: 0; max-width: 100%; max-height: 165mm; }
  .legend { break-after: page; }
  section, tr { break-inside: avoid; } .wide { overflow: visible; } a { text-decoration: none; }
}
"""
)

SCRIPT = """
for (const part of document.querySelectorAll("[data-with]")) {
  const svg = document.querySelector("figure svg");
  const show = () => {
    const names = new Set(part.dataset.with.split(" "));
    for (const one of svg.querySelectorAll("[data-id]")) one.classList.toggle("on", names.has(one.dataset.id));
    svg.classList.add("some");
  };
  const hide = () => { if (!part.matches(":hover, :focus-visible")) svg.classList.remove("some"); };
  part.addEventListener("pointerenter", show);
  part.addEventListener("focus", show);
  part.addEventListener("pointerleave", hide);
  part.addEventListener("blur", hide);
}
"""
