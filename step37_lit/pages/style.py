"""Style that all pages share. A string and not a file, so that it is there wherever the package is."""

BASE_CSS = """\
:root {
  color-scheme: light dark;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --page: #f5f6f8; --panel: #ffffff; --sunken: #eef1f5; --line: #d5dbe3; --ink: #1a222d; --muted: #556272;
  --link: #0a58a8; --alarm: #b02318; --good: #1d6b3a; --marked: #7d3600; --marked-back: #fdeede;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10151b; --panel: #191f27; --sunken: #222a34; --line: #343e4b; --ink: #e5eaf0; --muted: #a2aebd;
    --link: #7fb8ff; --alarm: #ff9c92; --good: #7fd69b; --marked: #ffc48f; --marked-back: #38291a;
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
.key { white-space: pre-wrap; }
.meta { color: var(--muted); font-size: 13px; }
.good { color: var(--good); font-weight: 600; margin-top: 12px; }
.alarm { color: var(--alarm); }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 20px; font-size: 14px; }
nav a { text-decoration: none; padding: 4px 0; }
nav a:hover { text-decoration: underline; }
section {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 24px; margin: 20px 0;
  scroll-margin-top: 12px;
}
.lead { color: var(--muted); margin-top: 6px; max-width: 76ch; }
details > summary { cursor: pointer; }
.more > summary { color: var(--link); width: fit-content; font-size: 14px; }

.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); gap: 16px 24px; margin-top: 20px;
}
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { font-size: 22px; line-height: 1.3; font-weight: 600; letter-spacing: -0.01em; }
.facts .alarm dd { color: var(--alarm); }
.small { display: flex; flex-wrap: wrap; gap: 4px 24px; margin-top: 16px; font-size: 14px; }
.small > div { display: flex; flex-wrap: wrap; gap: 0 8px; min-width: 0; }
.small dt { color: var(--muted); }

svg text { fill: var(--muted); font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; shape-rendering: crispEdges; }
svg .axis { stroke: var(--muted); stroke-width: 1; shape-rendering: crispEdges; }

table { border-collapse: collapse; width: 100%; font-size: 14px; margin-top: 12px; }
th { text-align: left; color: var(--muted); font-weight: 600; font-size: 13px; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.figure { text-align: right; white-space: nowrap; }

@media (max-width: 640px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  header { padding-top: 20px; }
  section { padding: 16px 14px; }
  h1 { font-size: 23px; }
  .facts { gap: 12px 16px; }
  .facts dd { font-size: 19px; }
  th, td { padding-right: 8px; }
  .stacked thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .stacked tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .stacked td { display: grid; grid-template-columns: 72px minmax(0, 1fr); padding: 2px 0; border: 0; }
  .stacked td::before { content: attr(data-name); color: var(--muted); font-size: 13px; }
}
"""
