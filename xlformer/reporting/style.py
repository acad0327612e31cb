"""How a report looks: by day, by night, on paper, on a telephone."""

# Of lines in figures: by Okabe and Ito (2008), whom colour-blind readers can tell
# apart; no colour stands alone, lines differ in their dashes too.
SERIES = ("#0072b2", "#c44e00", "#007d5c", "#a8478a", "#6a5acd", "#7a5c00")
SERIES_NIGHT = ("#56b4e9", "#ff9b4a", "#3ecf9f", "#e29bcb", "#aaa0ff", "#e0c04c")
INK, PALE, RULE, PAPER = "#1a1a19", "#5c5b57", "#dcdad4", "#fffefb"
INK_NIGHT, PALE_NIGHT, RULE_NIGHT, PAPER_NIGHT = (
    "#e6e4de",
    "#a3a09a",
    "#3a3935",
    "#161614",
)


def _colours(ink, pale, rule, paper, tint, series) -> str:
    names = "".join(f"--s{i}:{colour};" for i, colour in enumerate(series))
    return f"--ink:{ink};--pale:{pale};--rule:{rule};--paper:{paper};--tint:{tint};" + (
        names
    )


_DAY = _colours(INK, PALE, RULE, PAPER, "#f5f3ed", SERIES)
_NIGHT = _colours(
    INK_NIGHT, PALE_NIGHT, RULE_NIGHT, PAPER_NIGHT, "#21201d", SERIES_NIGHT
)
_SERIF = "Charter,'Bitstream Charter','Sitka Text',Cambria,Georgia,serif"
_SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif"
_MONO = "ui-monospace,'SF Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"

CSS = f"""\
:root{{color-scheme:light dark;{_DAY}
--serif:{_SERIF};
--sans:{_SANS};
--mono:{_MONO}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_NIGHT}}}}}
*{{box-sizing:border-box}}
html{{font-size:17px;-webkit-text-size-adjust:100%;text-size-adjust:100%;
scroll-padding-top:1rem}}
body{{margin:0;color:var(--ink);background:var(--paper);
font:1rem/1.55 var(--serif);overflow-wrap:break-word;
display:grid;grid-template-columns:14rem minmax(0,47rem);
gap:0 3.5rem;justify-content:center;padding:0 1.5rem}}
main{{min-width:0;padding-bottom:4rem}}
nav{{font:.8rem/1.45 var(--sans);position:sticky;top:0;align-self:start;
max-height:100vh;overflow-y:auto;padding:4.6rem 0 2rem}}
nav ol{{list-style:none;margin:0;padding:0}}
nav li{{margin:0 0 .45rem}}
nav a{{color:var(--pale);text-decoration:none}}
nav a:hover,nav a:focus{{color:var(--ink);text-decoration:underline}}
header{{padding:4rem 0 1rem;border-bottom:1px solid var(--rule)}}
h1{{font:600 2.1rem/1.15 var(--serif);margin:0 0 .5rem;letter-spacing:-.01em}}
header p{{margin:0;color:var(--pale)}}
h2{{font:600 1.35rem/1.25 var(--serif);margin:3.2rem 0 .8rem}}
h3{{font:600 .95rem/1.35 var(--sans);margin:2rem 0 .5rem}}
h4{{font:600 .8rem/1.4 var(--sans);margin:0 0 .4rem;color:var(--pale)}}
p{{margin:0 0 .9rem;max-width:40rem}}
p.missing{{color:var(--pale);font-style:italic;font-size:.9rem;margin-bottom:.5rem}}
p.warning{{border-left:3px solid var(--s1);padding-left:.8rem}}
code{{font:.85em var(--mono)}}
.wide{{overflow-x:auto;margin:0 0 1.6rem}}
table{{border-collapse:collapse;font:.8rem/1.4 var(--sans);
font-variant-numeric:tabular-nums lining-nums}}
p.caption{{font:.8rem/1.5 var(--sans);color:var(--pale);max-width:44rem;
margin:1.2rem 0 .5rem}}
th,td{{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:baseline;
white-space:nowrap}}
thead th{{border-bottom:1.5px solid var(--ink);font-weight:600}}
tbody th{{font-weight:400;color:var(--pale);padding-right:1.4rem}}
tr>:first-child{{position:sticky;left:0;background:var(--paper)}}
tbody tr{{border-bottom:1px solid var(--rule)}}
.number{{text-align:right}}
th:last-child,td:last-child{{padding-right:0}}
figure{{margin:1.2rem 0 1.8rem}}
.panels{{display:flex;flex-wrap:wrap;gap:1rem 1.4rem}}
.panels svg{{display:block;flex:0 1 350px;width:350px;max-width:100%;height:auto}}
.panels svg *{{stroke-linejoin:round;stroke-linecap:butt}}
figcaption{{font:.8rem/1.5 var(--sans);color:var(--pale);max-width:44rem;
margin-top:.7rem}}
details{{margin:0 0 1.4rem;font:.85rem/1.5 var(--sans)}}
summary{{cursor:pointer;color:var(--pale)}}
.sample{{margin:1.1rem 0 1.6rem}}
pre{{font:.78rem/1.5 var(--mono);margin:0;padding:.9rem 1rem;background:var(--tint);
white-space:pre-wrap;overflow-wrap:anywhere;max-height:26rem;overflow:auto}}
pre b{{font-weight:400;color:var(--pale)}}
a:focus-visible,.wide:focus-visible,pre:focus-visible,summary:focus-visible{{
outline:2px solid var(--s0);outline-offset:2px}}
footer{{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--rule);
font:.78rem/1.55 var(--sans);color:var(--pale)}}
@media (max-width:62rem){{
body{{display:block;padding:0 1.1rem}}
main{{max-width:47rem;margin:0 auto}}
nav{{position:static;max-height:none;max-width:47rem;margin:0 auto;
padding:1.2rem 0 0}}
nav ol{{columns:2;column-gap:1.5rem}}
nav li{{break-inside:avoid}}
header{{padding-top:1.6rem}}
h1{{font-size:1.6rem}}}}
@media print{{
:root{{--paper:#fff}}
html{{font-size:10pt}}
body{{display:block;padding:0;background:none}}
nav{{display:none}}
header{{padding-top:0}}
.wide,pre{{overflow:visible;max-height:none}}
table{{font-size:7pt}}
th,td{{white-space:normal;overflow-wrap:anywhere;padding-right:.5rem}}
figure,.sample,tr,svg{{break-inside:avoid}}
h2,h3,h4{{break-after:avoid}}
.panels svg{{flex-basis:300px;width:300px}}}}
"""
