"""The report's style sheet; light and dark by the reader's preference."""

CSS = """
:root { --bg:#fbfbfa; --card:#fff; --ink:#1d2329; --soft:#667080; --rule:#e3e6ea; --s0:#2f6fde; --s1:#d9822b;
  --s2:#0f9d7a;
  --s3:#8a5cd6; --good:#1a7f4b; --bad:#c0362c; --warn:#9a6700; --warnbg:#fff6dd; --badbg:#fdecea; }
@media (prefers-color-scheme: dark) { :root { --bg:#14171b; --card:#1c2026; --ink:#e6e9ed; --soft:#98a2b0;
  --rule:#2c323a;
  --s0:#6ea3ff; --s1:#f0a65a; --s2:#43c7a3; --s3:#b693f5; --good:#52c98a; --bad:#ff8177; --warn:#e6b94d;
  --warnbg:#2e2817;
  --badbg:#351c1a; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--bg); color:var(--ink);
  font:15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width:1180px; margin:0 auto; padding:28px 20px 60px; }
h1 { font-size:24px; margin:0 0 2px; } h2 { font-size:17px; margin:34px 0 10px; } h3 { font-size:14px; margin:0 0
  6px; }
p { margin:4px 0; } .soft { color:var(--soft); } .small { font-size:13px; }
.banner { padding:9px 14px; border-radius:8px; margin:10px 0; background:var(--warnbg); color:var(--warn); }
.banner.bad { background:var(--badbg); color:var(--bad); font-weight:600; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(128px,1fr)); gap:12px; margin:18px 0; }
.tile, .card { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:12px 14px; }
.tile b { display:block; font-size:20px; white-space:nowrap; font-weight:650;
  line-height:1.25; font-variant-numeric:tabular-nums; }
.tile b.good { color:var(--good); } .tile b.bad { color:var(--bad); } .tile span { color:var(--soft);
  font-size:13px; }
.two { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr)); gap:14px; }
.wide { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:14px; }
th, td { text-align:right; padding:5px 10px; border-bottom:1px solid var(--rule); white-space:nowrap; }
th { color:var(--soft); font-weight:500; } th:first-child, td:first-child { text-align:left; } td.left {
  text-align:left; }
td i { font-style:normal; color:var(--soft); font-size:12px; }
svg { display:block; width:100%; height:auto; } svg text { fill:var(--soft); font-size:11px; font-family:inherit; }
svg text.name, svg text.value { fill:var(--ink); font-size:12px; }
.grid { stroke:var(--rule); stroke-width:1; } .axis { stroke:var(--soft); stroke-width:1; }
.line { fill:none; stroke-width:1.8; stroke-linejoin:round; } .fill { stroke:none; opacity:.13; }
.line.s0 { stroke:var(--s0); } .line.s1 { stroke:var(--s1); } .line.s2 { stroke:var(--s2); } .line.s3 {
  stroke:var(--s3); }
.fill.s0 { fill:var(--s0); } .fill.s1 { fill:var(--s1); } .fill.s2 { fill:var(--s2); } .fill.s3 { fill:var(--s3); }
.line.thin { stroke-width:1; opacity:.45; }
.slo { stroke:var(--bad); stroke-dasharray:4 3; stroke-width:1.3; }
.load { stroke:var(--s2); stroke-width:1.3; } .reload { stroke:var(--s3); stroke-width:1.3; }
.unload { stroke:var(--s1); stroke-width:1.3; } .wrong { stroke:var(--bad); stroke-width:2.4; }
.bar { fill:var(--s0); } .whisker { stroke:var(--ink); stroke-width:1.2; }
.key { display:inline-block; width:14px; height:3px; vertical-align:middle; margin:0 5px 0 12px; }
.none { color:var(--soft); padding:40px 0; text-align:center; }
details { margin:10px 0; } summary { cursor:pointer; color:var(--soft); }
code { font-family:ui-monospace, Menlo, "DejaVu Sans Mono", monospace; font-size:13px; }
"""
