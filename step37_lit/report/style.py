"""What the report adds to the style of all pages."""

CSS = """\
:root {
  --c0: #3d6eb4; --c1: #c65706; --c2: #2a7a4a; --c3: #8a4fb0; --c4: #b3375f; --c5: #0d747d;
  --band0: #e9f0fa; --band1: #fcf1e3; --band2: #e8f4ec;
  --h0: #1d5aa6; --h1: #6a9ad4; --h2: #bcd3ee; --h3: #e8ebf0; --h4: #f5cda3; --h5: #e4873a; --h6: #ab4600;
}
@media (prefers-color-scheme: dark) {
  :root {
    --c0: #6aa0ee; --c1: #f29b48; --c2: #5fbf86; --c3: #c391e6; --c4: #f0839f; --c5: #4bbcc8;
    --band0: #1e2b3e; --band1: #33291d; --band2: #1d3027;
    --h0: #86bcff; --h1: #4c82c8; --h2: #2c4a70; --h3: #2b343f; --h4: #6b4526; --h5: #c3752a; --h6: #ffb36b;
  }
}
.state { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; margin-top: 10px; }
.state strong {
  font-size: 13px; font-weight: 650; border: 1px solid currentColor; border-radius: 999px; padding: 0 10px;
}
.running strong { color: var(--link); }
.finished strong { color: var(--good); }
.stopped strong { color: var(--alarm); }
.facts { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); }
.facts dd small { display: block; font-size: 13px; font-weight: 400; color: var(--muted); letter-spacing: 0; }

.legend {
  display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 8px 0 0; padding: 0; font-size: 13px;
}
.legend li { display: flex; align-items: center; gap: 6px; min-width: 0; }
.legend svg { flex: none; align-self: start; margin-top: 5px; width: 18px; height: 10px; }
.legend .value { font-weight: 600; white-space: nowrap; }
.stages { margin-top: 14px; gap: 6px 22px; font-size: 14px; }
.stages svg, .levels svg {
  width: 14px; height: 14px; margin-top: 3px; border-radius: 3px; border: 1px solid var(--line);
}

.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 30px 32px;
  margin-top: 22px;
}
.chart { min-width: 0; display: flex; flex-direction: column; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 0 8px; align-items: baseline; }
.axes { padding: 12px 14px 22px 54px; }
.axes > svg { display: block; width: 100%; height: 170px; overflow: visible; }
.chart .legend { padding-left: 54px; margin-top: 4px; }
.line { fill: none; stroke: var(--own); stroke-width: 1.75; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 4; }
.area { fill: var(--own); fill-opacity: 0.18; }
.dot { fill: var(--own); stroke: var(--panel); stroke-width: 1.5; }
.c0 { --own: var(--c0); } .c1 { --own: var(--c1); } .c2 { --own: var(--c2); }
.c3 { --own: var(--c3); } .c4 { --own: var(--c4); } .c5 { --own: var(--c5); }
.band0 { fill: var(--band0); } .band1 { fill: var(--band1); } .band2 { fill: var(--band2); }
.spot { fill: var(--ink); fill-opacity: 0; }
.spot:hover { fill-opacity: 0.1; }
.chart .alarm { font-size: 13px; padding-left: 54px; }
.more { margin-top: 26px; }

.samples { list-style: none; margin: 12px 0 0; padding: 0; }
.group { margin-top: 26px; font-size: 15px; }
.sample {
  display: grid; grid-template-columns: 160px minmax(0, 1fr); gap: 8px 20px; padding: 16px 0;
  border-top: 1px solid var(--line);
}
.pictures { display: flex; flex-wrap: wrap; gap: 6px; align-content: start; }
.pictures img { display: block; max-width: 100%; border-radius: 6px; background: var(--sunken); }
.no-picture {
  width: 100%; aspect-ratio: 1; display: grid; place-items: center; border: 1px dashed var(--line);
  border-radius: 6px; color: var(--muted); font-size: 13px; background: var(--sunken);
}
.said { min-width: 0; font-size: 14px; }
.said h4 { margin: 0; font-size: 13px; font-weight: 600; color: var(--muted); }
.said h4 .score { color: var(--ink); }
.said ul { margin: 0; padding: 0; list-style: none; color: var(--muted); }
.columns {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 165px), 1fr)); gap: 12px 20px;
  margin-top: 10px;
}
.columns > div { min-width: 0; }
.head { display: flex; flex-wrap: wrap; gap: 0 12px; align-items: baseline; margin-bottom: 8px; }
mark { background: var(--marked-back); color: var(--marked); border-radius: 3px; padding: 1px 0; }
.said .more { margin-top: 10px; }

.heat .axes { padding-left: 34px; }
.heat path { stroke: var(--panel); stroke-width: 1; vector-effect: non-scaling-stroke; }
.heat .fine path { stroke: none; }
.heat .tall { height: auto; }
.h0 { fill: var(--h0); } .h1 { fill: var(--h1); } .h2 { fill: var(--h2); } .h3 { fill: var(--h3); }
.h4 { fill: var(--h4); } .h5 { fill: var(--h5); } .h6 { fill: var(--h6); }
.levels { margin: 14px 0 0; }

pre {
  margin: 12px 0 0; padding: 14px; border-radius: 8px; background: var(--sunken); font-family: var(--mono);
  font-size: 13px; line-height: 1.45; white-space: pre-wrap;
}
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 40px; }
.pair > div { min-width: 0; }
.pair h3 { margin-top: 18px; }
.values th { font-weight: 400; width: 45%; }
.met { white-space: nowrap; }
.results th:not(:first-child) { width: 20%; }
.results small { display: inline-block; min-width: 92px; font-size: 12px; color: var(--muted); }
th { overflow-wrap: normal; }

@media (max-width: 900px) { .pair { grid-template-columns: minmax(0, 1fr); gap: 20px; } }
@media (max-width: 640px) {
  .axes > svg { height: 150px; }
  .sample { grid-template-columns: minmax(0, 1fr); }
  .no-picture { width: 160px; max-width: 100%; }
  .pictures img { max-width: 160px; }
  .stacked td.figure { text-align: left; }
  .results .key { font-size: 12px; }
  .results small { display: block; min-width: 0; }
}
"""
