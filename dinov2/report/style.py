"""The style sheet of the page: light, dark, narrow and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1c1d20; --soft: #5c6068; --rule: #dcdcd6; --faint: #f3f3ee; --edge: #b4b4ae;
  --good: #1f6b3f; --unclear: #8a5a00; --bad: #a3231f; --shade: #a3231f;
  --c0: #1d4f91; --c1: #b3480c; --c2: #2b7a4b; --c3: #7a3d92; --c4: #8a6d00; --c5: #4b5563;
  --text: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Georgia, serif;
  --figures: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --code: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #17181b; --ink: #e9e8e4; --soft: #a3a7af; --rule: #383a40; --faint: #202226; --edge: #6a6d75;
  --good: #7fcf9b; --unclear: #e2b45c; --bad: #f08b85; --shade: #f08b85;
  --c0: #86b6f4; --c1: #f3a36b; --c2: #7fcf9b; --c3: #cf9be6; --c4: #dfc45a; --c5: #b4bac4;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 var(--text); overflow-wrap: break-word; }
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 48px; }
h1, h2, h3, h4 { line-height: 1.2; font-weight: 600; margin: 0; text-wrap: balance; }
.kind { font: 14px/1.3 var(--figures); color: var(--soft); margin: 0 0 4px; }
h1 { font-size: 34px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 24px; margin: 56px 0 8px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 19px; margin: 32px 0 2px; }
h4 { font: 600 14px/1.3 var(--figures); }
p { margin: 6px 0; max-width: 44em; }
a { color: inherit; text-underline-offset: 3px; text-decoration-color: var(--soft); }
code, pre { font: 13px/1.5 var(--code); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--faint); padding: 12px 16px; margin: 8px 0; }
.soft, figcaption, caption { color: var(--soft); }
.soft { font-size: 15px; }
nav { font: 14px/1.6 var(--figures); margin-top: 18px; }
nav a { margin-right: 16px; }

.verdict { border-left: 5px solid var(--unclear); padding: 2px 0 2px 20px; margin: 28px 0; }
.verdict.good { border-color: var(--good); }
.verdict.bad { border-color: var(--bad); border-left-style: double; border-left-width: 8px; }
.verdict h2 { border: 0; padding: 0; margin: 0 0 6px; font-size: 28px; color: var(--unclear); }
.verdict.good h2 { color: var(--good); }
.verdict.bad h2 { color: var(--bad); }
.verdict p { margin: 2px 0; }
.verdict .run { font: 600 14px/1.4 var(--figures); color: var(--soft); margin-bottom: 4px; overflow-wrap: anywhere; }
.several .verdict h2 { font-size: 22px; }
@media (min-width: 820px) { .several { display: grid; grid-template-columns: 1fr 1fr; gap: 0 40px; } }

.tiles { display: flex; flex-wrap: wrap; gap: 18px 44px; margin: 24px 0 0; padding: 0; }
.tiles div { min-width: 96px; }
.tiles dt { font: 13px/1.3 var(--figures); color: var(--soft); }
.tiles dd { margin: 0; font: 500 26px/1.25 var(--figures); font-variant-numeric: tabular-nums; }
.tiles dd small { font-size: 14px; color: var(--soft); font-weight: 400; }

.alarm { border: 1px solid var(--rule); border-left: 5px solid var(--bad); padding: 12px 18px; margin: 14px 0;
  max-width: 800px; }
.alarm.over { border-left-color: var(--rule); }
.alarm h3, .alarm h4 { margin: 0 0 4px; font: 600 19px/1.2 var(--text); }
.alarm ul { margin: 4px 0; padding-left: 20px; }
.alarm small { font: 14px var(--figures); color: var(--soft); }

/* A shadow at the side where a table goes on; covers of the paper's color move with it and hide that at its end. */
.scroll { overflow-x: auto; background-image: linear-gradient(to right, var(--paper) 40%, transparent),
    linear-gradient(to left, var(--paper) 40%, transparent), linear-gradient(to right, var(--edge), transparent),
    linear-gradient(to left, var(--edge), transparent);
  background-position: left, right, left, right; background-repeat: no-repeat;
  background-size: 44px 100%, 44px 100%, 16px 100%, 16px 100%; background-attachment: local, local, scroll, scroll; }
.wide { display: none; font: 13px/1.3 var(--figures); color: var(--soft); }
table { border-collapse: collapse; margin: 12px 0; font: 14px/1.4 var(--figures); font-variant-numeric: tabular-nums; }
caption { text-align: left; font: 15px/1.4 var(--text); padding-bottom: 6px; min-width: min(28rem, 90vw); }
th, td { text-align: left; vertical-align: top; padding: 5px 22px 5px 0; border-bottom: 1px solid var(--rule);
  overflow-wrap: anywhere; }
th:first-child { min-width: 7em; }
thead th { min-width: 5.5em; font-weight: 600; border-bottom: 1.5px solid var(--ink); }
tbody th { font-weight: 400; color: var(--soft); }
.number { text-align: right; }
td.number { white-space: nowrap; }
td.other { font-weight: 600; }

.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 0 28px;
  margin: 14px 0; }
.panel { display: grid; grid-row: span 3; grid-template-rows: subgrid; gap: 4px; padding-bottom: 24px; }
figure { margin: 0; min-width: 0; }
.panel figcaption { font-size: 14px; line-height: 1.4; }
.panel > div { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; align-self: end; }
.legend { font: 13px/1.4 var(--figures); display: flex; flex-wrap: wrap; gap: 2px 16px; }
.legend span { display: inline-flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.swatch { flex: none; }
.runs { position: sticky; top: 0; background: var(--paper); padding: 8px 0; border-bottom: 1px solid var(--rule);
  z-index: 1; }
.chart { display: block; width: 100%; height: auto; font-family: var(--figures); font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: butt; }
.grid { stroke: var(--rule); stroke-width: 0.8; }
.axis { stroke: var(--soft); stroke-width: 0.8; fill: none; }
.tick { fill: var(--soft); }
.end { font-weight: 600; }
.span rect { fill: var(--shade); opacity: 0.13; }
.span path { stroke: var(--shade); stroke-width: 0.8; stroke-dasharray: 2 2; fill: none; }
.span text { fill: var(--shade); font-size: 9px; }
.line-0 { stroke: var(--c0); } .dot-0, .text-0 { fill: var(--c0); }
.line-1 { stroke: var(--c1); } .dot-1, .text-1 { fill: var(--c1); }
.line-2 { stroke: var(--c2); } .dot-2, .text-2 { fill: var(--c2); }
.line-3 { stroke: var(--c3); } .dot-3, .text-3 { fill: var(--c3); }
.line-4 { stroke: var(--c4); } .dot-4, .text-4 { fill: var(--c4); }
.line-5 { stroke: var(--c5); } .dot-5, .text-5 { fill: var(--c5); }

.gallery { margin: 16px 0 28px; max-width: 860px; }
.row { display: grid; grid-template-columns: 92px 1fr; align-items: center; gap: 12px; margin-bottom: 5px; }
.row > span { font: 13px/1.3 var(--figures); color: var(--soft); text-align: right;
  font-variant-numeric: tabular-nums; }
.images { display: grid; gap: 5px; }
.images img { width: 100%; height: auto; display: block; }
.row.features img, .row.tiny img { image-rendering: pixelated; }
.row.originals { margin-bottom: 10px; }

details { margin: 12px 0; }
summary { cursor: pointer; font: 15px var(--figures); }
footer { margin-top: 64px; padding-top: 14px; padding-bottom: 40px; color: var(--soft); font-size: 14px; }

@media (max-width: 600px) {
  body { font-size: 16px; }
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 26px; }
  h1 { font-size: 27px; }
  h2 { margin-top: 44px; }
  .verdict { padding-left: 14px; margin: 20px 0; }
  .verdict h2 { font-size: 24px; }
  .tiles { gap: 14px 30px; }
  .row { grid-template-columns: 1fr; gap: 2px; margin-bottom: 8px; }
  .row > span { text-align: left; }
  .images { gap: 3px; }
  table { font-size: 13px; }
  th, td { padding-right: 10px; }
}
@media (max-width: 400px) { .wide { display: block; } .many thead th { min-width: 7em; } }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --rule: #ccc; --faint: #fff;
    --good: #000; --unclear: #000; --bad: #000; --shade: #000;
    --c0: #123f7a; --c1: #9a3d08; --c2: #1d5e38; --c3: #66307c; --c4: #6e5700; --c5: #333; }
  @page { size: A4; margin: 14mm; }
  body { font-size: 10.5pt; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  header { padding-top: 0; }
  nav, details { display: none; }
  h1 { font-size: 20pt; } h2 { font-size: 15pt; margin-top: 22pt; } h3 { font-size: 12pt; margin-top: 14pt; }
  .verdict h2 { font-size: 17pt; }
  .tiles { gap: 8pt 20pt; }
  .tiles div { min-width: 0; }
  .tiles dd { font-size: 15pt; }
  h2, h3, caption, .question { break-after: avoid; }
  figure, .alarm, .verdict, .row, tr, pre { break-inside: avoid; }
  .panels { grid-template-columns: 1fr 1fr; gap: 0 22pt; }
  .panel { padding-bottom: 12pt; }
  .panel figcaption { font-size: 9pt; }
  .runs { position: static; }
  .scroll { overflow: visible; background: none; }
  .wide { display: none; }
  table { font-size: 9pt; max-width: 100%; }
  .span rect { opacity: 0.1; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
