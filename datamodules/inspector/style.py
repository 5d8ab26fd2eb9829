"""Style of the inspector's page. A string and not a file, so that it is there wherever the package is."""

CSS = """\
:root {
  color-scheme: light dark;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --page: #f5f6f8; --panel: #ffffff; --sunken: #eef1f5; --line: #d5dbe3; --ink: #1a222d; --muted: #556272;
  --link: #0a58a8; --alarm: #b02318; --good: #1d6b3a;
  --image: #3d6eb4; --text: #718095; --loss: #cc5a08; --padding: #e6eaef; --bar: #3d6eb4; --limit: #cc5a08;
  --learnt: #7d3600; --learnt-back: #fdeede;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10151b; --panel: #191f27; --sunken: #222a34; --line: #343e4b; --ink: #e5eaf0; --muted: #a2aebd;
    --link: #7fb8ff; --alarm: #ff9c92; --good: #7fd69b;
    --image: #5c94e6; --text: #77859a; --loss: #f29b48; --padding: #29323d; --bar: #5c94e6; --limit: #f29b48;
    --learnt: #ffc48f; --learnt-back: #38291a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
header, main, footer { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
footer { padding-top: 8px; padding-bottom: 40px; color: var(--muted); font-size: 13px; }
h1, h2, h3, p, dl, dd, figure { margin: 0; }
h1 { font-size: 28px; line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 18px; line-height: 1.3; font-weight: 650; }
h3 { font-size: 14px; font-weight: 650; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
code, .key, .mono { font-family: var(--mono); font-size: 0.88em; }
.eyebrow { color: var(--muted); font-size: 13px; font-weight: 600; }
.path { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 20px; font-size: 14px; }
nav a { text-decoration: none; padding: 4px 0; }
nav a:hover { text-decoration: underline; }
section {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 24px; margin: 20px 0;
  scroll-margin-top: 12px;
}
.lead { color: var(--muted); margin-top: 6px; max-width: 76ch; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.pair > section { margin: 0; min-width: 0; display: flex; flex-direction: column; }

.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); gap: 16px 24px; margin-top: 20px;
}
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { font-size: 22px; line-height: 1.3; font-weight: 600; letter-spacing: -0.01em; }
.facts .mono { grid-column: span 2; font: inherit; }
.facts .mono dd {
  font-family: var(--mono); font-size: 15px; line-height: 29px; font-weight: 400; letter-spacing: 0;
}
.facts .alarm dd { color: var(--alarm); }
.small { display: flex; flex-wrap: wrap; gap: 4px 24px; margin-top: 16px; font-size: 14px; }
.small > div { display: flex; flex-wrap: wrap; gap: 0 8px; min-width: 0; }
.small dt { color: var(--muted); }
details.settings { margin-top: 16px; font-size: 14px; }
details.settings > summary { color: var(--link); cursor: pointer; width: fit-content; }

.legend {
  display: flex; flex-wrap: wrap; gap: 6px 22px; list-style: none; margin: 24px 0 10px; padding: 0; font-size:
  14px;
}
.legend li { display: flex; align-items: center; gap: 8px; }
.legend svg { flex: none; width: 14px; height: 14px; border-radius: 3px; }
.legend span { color: var(--muted); }
rect.image { fill: var(--image); }
rect.text { fill: var(--text); }
rect.loss { fill: var(--loss); }
rect.padding { fill: var(--padding); }
rect.padding.swatch { stroke: var(--line); stroke-width: 2; }

.packs { list-style: none; margin: 0; padding: 0; }
.packs summary, .ruler {
  display: grid; grid-template-columns: 46px minmax(0, 1fr) 168px; gap: 0 12px; align-items: center; padding: 3px 4px;
}
.packs summary { cursor: pointer; border-radius: 6px; list-style: none; font-size: 13px; color: var(--muted); }
.packs summary::-webkit-details-marker { display: none; }
.packs summary:hover, .packs details[open] > summary { background: var(--sunken); color: var(--ink); }
.packs .number { text-align: right; }
.packs .number::before { content: "+"; float: left; margin-right: 6px; }
.packs details[open] .number::before { content: "\\2212"; }
.packs .bar { display: block; width: 100%; height: 20px; border-radius: 3px; background: var(--padding); }
.bar rect { shape-rendering: crispEdges; }
.bar .border { stroke: var(--panel); stroke-width: 2px; vector-effect: non-scaling-stroke; }
.bar g:hover rect { opacity: 0.72; }
.ruler svg { grid-column: 2; display: block; width: 100%; height: 22px; overflow: visible; }
.packs .inside { padding: 8px 4px 16px 62px; }

.axes { flex: 1; display: flex; padding: 40px 14px 50px 46px; }
.axes svg { flex: 1; min-width: 0; min-height: 230px; overflow: visible; }
svg text { fill: var(--muted); font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; shape-rendering: crispEdges; }
svg .axis { stroke: var(--muted); stroke-width: 1; shape-rendering: crispEdges; }
svg .limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 5 4; }
.count { fill: var(--bar); }
.count:hover { opacity: 0.72; }
.dot { fill: var(--bar); fill-opacity: 0.55; stroke: var(--bar); stroke-width: 1; }
.dot:hover { fill-opacity: 0.9; }

table { border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 12px; }
.inside table { margin-top: 0; }
th { text-align: left; color: var(--muted); font-weight: 600; font-size: 13px; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.figure { text-align: right; white-space: nowrap; }

.cards {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px; margin:
  18px 0 0; padding: 0; list-style: none;
}
.card {
  border: 1px solid var(--line); border-radius: 8px; padding: 12px; display: flex; flex-wrap: wrap; gap: 12px;
  align-content: start; min-width: 0; overflow: hidden;
}
.pictures { display: flex; flex-wrap: wrap; gap: 6px; max-width: 100%; align-content: start; }
.pictures img { display: block; width: 112px; height: 112px; border-radius: 4px; background: var(--sunken); }
.says { flex: 1 1 170px; min-width: 0; font-size: 14px; }
.card h3 { font-weight: 600; line-height: 1.4; }
.meta { color: var(--muted); font-size: 13px; }
.spoken { margin-top: 6px; line-height: 1.6; white-space: pre-wrap; }
.special {
  display: inline-block; color: var(--muted); background: var(--sunken); border-radius: 3px; padding: 0 4px;
  line-height: 1.5; font-size: 0.82em; font-family: var(--mono);
}
mark { background: var(--learnt-back); color: var(--learnt); border-radius: 3px; padding: 1px 0; }
mark .special { background: none; color: inherit; }
.good { color: var(--good); font-weight: 600; margin-top: 12px; }
.key { white-space: pre-wrap; }

@media (max-width: 900px) { .pair { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 640px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  header { padding-top: 20px; }
  section { padding: 16px 14px; }
  h1 { font-size: 23px; }
  .facts { gap: 12px 16px; }
  .facts dd { font-size: 19px; }
  .packs summary, .ruler { grid-template-columns: auto minmax(0, 1fr); }
  .packs .number { text-align: left; }
  .packs .fill { text-align: right; }
  .packs .bar { grid-column: 1 / -1; grid-row: 2; }
  .ruler svg { grid-column: 1 / -1; }
  .ruler text:nth-of-type(even) { display: none; }
  .packs .inside { padding-left: 4px; }
  th, td { padding-right: 8px; }
  .stacked thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .stacked tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .stacked td { display: grid; grid-template-columns: 72px minmax(0, 1fr); padding: 2px 0; border: 0; }
  .stacked td::before { content: attr(data-name); color: var(--muted); font-size: 13px; }
}
"""
