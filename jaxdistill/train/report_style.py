"""The style sheet of the report: system fonts, two colour schemes, eight series colours."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1a1f2b; --soft: #5b6474; --rule: #e3e6eb;
  --series-1: #2a66d9; --series-2: #d1660a; --series-3: #0a8a6a; --series-4: #b03aa0;
  --series-5: #8a6d00; --series-6: #d03a4b; --series-7: #2b8fb8; --series-8: #6a55c9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1b2029; --ink: #e8ebf0; --soft: #98a2b3; --rule: #2d3440;
    --series-1: #6ea2ff; --series-2: #f59e4b; --series-3: #3ccfa5; --series-4: #e07fd2;
    --series-5: #d9b93b; --series-6: #ff7d8a; --series-7: #63c5ea; --series-8: #a898ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 72px; }
header p { max-width: 68ch; margin: 0 0 10px; font-size: 17px; }
h1 { margin: 0 0 14px; font-size: 32px; line-height: 1.2; letter-spacing: -0.02em; }
h2 { margin: 44px 0 14px; font-size: 20px; letter-spacing: -0.01em; }
h3 { margin: 0 0 8px; font-size: 15px; }
.card, .scroll {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
.card { padding: 18px 20px; }
.card + .card { margin-top: 16px; }
.scroll { overflow-x: auto; }
.muted { color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-size: 15px; }
th, td { padding: 10px 16px; text-align: left; vertical-align: top; }
th { color: var(--soft); font-size: 13px; font-weight: 600; }
td { border-top: 1px solid var(--rule); }
.config tr:first-child td { border-top: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child { font-weight: 600; white-space: nowrap; }
.config td { padding: 6px 16px; font-size: 14px; font-weight: 400; }
.config td:last-child { overflow-wrap: anywhere; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.charts {
  display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
}
.charts .card { margin: 0; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 6px; font-size: 14px; }
.key::before {
  content: ""; display: inline-block; width: 16px; height: 3px; margin-right: 7px;
  border-radius: 2px; background: var(--series); vertical-align: middle;
}
.rule { stroke: var(--rule); }
.tick { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.line { fill: none; stroke: var(--series); stroke-width: 2; stroke-linejoin: round; }
.line { stroke-linecap: round; }
.faint { stroke-width: 1; opacity: 0.3; }
.spot { fill: var(--series); opacity: 0; }
.spot:hover { opacity: 1; }
.series-1 { --series: var(--series-1); } .series-2 { --series: var(--series-2); }
.series-3 { --series: var(--series-3); } .series-4 { --series: var(--series-4); }
.series-5 { --series: var(--series-5); } .series-6 { --series: var(--series-6); }
.series-7 { --series: var(--series-7); } .series-8 { --series: var(--series-8); }
.prompt { margin: 0 0 12px; padding-left: 12px; border-left: 3px solid var(--rule); }
.prompt { color: var(--soft); white-space: pre-wrap; }
dl { margin: 0; }
dt { font-size: 13px; font-weight: 600; color: var(--soft); }
dd { margin: 2px 0 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
dd:last-child { margin-bottom: 0; }
summary { cursor: pointer; font-size: 20px; font-weight: 700; padding: 8px 0 14px; }
details { margin-top: 36px; }
@media print { body { background: none; } .card, .scroll { break-inside: avoid; } }
"""
