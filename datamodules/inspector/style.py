"""What the inspector's page adds to the style that all pages share."""

CSS = """\
:root {
  --image: #3d6eb4; --text: #718095; --loss: #cc5a08; --padding: #e6eaef; --bar: #3d6eb4; --limit: #cc5a08;
}
@media (prefers-color-scheme: dark) {
  :root {
    --image: #5c94e6; --text: #77859a; --loss: #f29b48; --padding: #29323d; --bar: #5c94e6; --limit: #f29b48;
  }
}
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; }
.pair > section { margin: 0; min-width: 0; display: flex; flex-direction: column; }
.facts .mono { grid-column: span 2; font: inherit; }
.facts .mono dd {
  font-family: var(--mono); font-size: 15px; line-height: 29px; font-weight: 400; letter-spacing: 0;
}
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
svg .limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 5 4; }
.count { fill: var(--bar); }
.count:hover { opacity: 0.72; }
.dot { fill: var(--bar); fill-opacity: 0.55; stroke: var(--bar); stroke-width: 1; }
.dot:hover { fill-opacity: 0.9; }
.inside table { margin-top: 0; }
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
.spoken { margin-top: 6px; line-height: 1.6; white-space: pre-wrap; }
.special {
  display: inline-block; color: var(--muted); background: var(--sunken); border-radius: 3px; padding: 0 4px;
  line-height: 1.5; font-size: 0.82em; font-family: var(--mono);
}
mark { background: var(--marked-back); color: var(--marked); border-radius: 3px; padding: 1px 0; }
mark .special { background: none; color: inherit; }
@media (max-width: 900px) { .pair { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 640px) {
  .packs summary, .ruler { grid-template-columns: auto minmax(0, 1fr); }
  .packs .number { text-align: left; }
  .packs .fill { text-align: right; }
  .packs .bar { grid-column: 1 / -1; grid-row: 2; }
  .ruler svg { grid-column: 1 / -1; }
  .ruler text:nth-of-type(even) { display: none; }
  .packs .inside { padding-left: 4px; }
}
"""
