"""The page that shows a batch of headshots: an HTML file beside the pictures, which needs no server and no internet."""

import html
from collections.abc import Sequence

from ..photos import Thresholds
from .headshot import Headshot

SAME_PERSON, SOMEONE_ELSE = Thresholds.likeness_review, Thresholds.likeness_reject
"""The likeness by SFace above which is mostly the same person, and that below which is mostly someone else."""


def gallery_page(shots: Sequence[Headshot], summary: str, compared: bool) -> str:
    """The page's HTML, with the pictures in the order given, the kept ones first.

    `summary` stands below the title. `compared` says whether likeness was measured: only then is it shown.
    """
    styles = list(dict.fromkeys(shot.job.style for shot in shots if shot.job.style))
    kept, others = [shot for shot in shots if shot.kept], [shot for shot in shots if not shot.kept]
    sections = [("Kept", kept), ("The others" if kept else "All pictures", others)]
    main = "\n".join(
        f'<section><h2>{title} <small>{len(group)}</small></h2><div class="grid">\n'
        + "\n".join(_card(shot, compared) for shot in group)
        + "\n</div></section>"
        for title, group in sections
        if group
    )
    parts = {
        "SUMMARY": html.escape(summary),
        "STRIP": _strip(shots) if compared else "",
        "STYLES": _style_buttons(styles) if len(styles) > 1 else "",
        "MAIN": main,
    }
    page = _PAGE
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def _card(shot: Headshot, compared: bool) -> str:
    job, name = shot.job, html.escape(shot.path.name)
    badge = ""
    if compared:
        text, kind = ("no face", "low") if shot.likeness is None else (f"{shot.likeness:.2f}", _kind(shot.likeness))
        badge = f'<b class="{kind}" title="likeness: cosine to the photos">{text}</b>'
    facts = [("prompt", job.prompt), ("negative prompt", job.negative), ("seed", str(job.seed))]
    facts += [("LoRA strength", f"× {job.strength:g}"), ("file", shot.path.name)]
    if shot.face_pass:
        change = f"{shot.face_pass.before:.2f} → {_number(shot.face_pass.after)}"
        facts.append(("face drawn anew", f"likeness {change}, {'taken' if shot.face_pass.kept else 'not taken'}"))
    rows = "".join(f"<dt>{what}</dt><dd>{html.escape(value)}</dd>" for what, value in facts if value)
    title = html.escape(job.style or job.prompt)
    return (
        f'<figure data-style="{html.escape(job.style)}"><a href="{name}"><img src="{name}" loading="lazy" '
        f'alt="{title}, seed {job.seed}"></a>{badge}<figcaption><details><summary>{title}</summary>'
        f"<dl>{rows}</dl></details></figcaption></figure>"
    )


def _style_buttons(styles: Sequence[str]) -> str:
    names = ["", *styles]
    buttons = "".join(
        f'<button data-style="{html.escape(name)}" aria-pressed="{str(not name).lower()}">'
        f"{html.escape(name) or 'All styles'}</button>"
        for name in names
    )
    return f"<nav>{buttons}</nav>"


def _strip(shots: Sequence[Headshot]) -> str:
    """An SVG drawing of where the pictures lie between "someone else" and "the same person"."""
    scores = [(shot.likeness, shot.kept) for shot in shots if shot.likeness is not None]
    low = min([0.0, *(score for score, _ in scores)])

    def x(score: float) -> float:
        return round(10 + 580 * (score - low) / (1 - low), 1)

    marks = "".join(
        f'<line x1="{x(value)}" x2="{x(value)}" y1="4" y2="34"/><text x="{x(value) + side * 4}" y="47" '
        f'text-anchor="{anchor}">{text}</text>'
        for value, text, anchor, side in (
            (SOMEONE_ELSE, f"someone else, below {SOMEONE_ELSE:.2f}", "end", -1),
            (SAME_PERSON, f"the same person, above {SAME_PERSON:.2f}", "start", 1),
        )
    )
    dots = "".join(
        f'<circle cx="{x(score)}" cy="19" r="6" class="{"kept" if kept else ""}"><title>{score:.2f}</title></circle>'
        for score, kept in reversed(scores)
    )
    return f'<svg viewBox="0 0 600 52" role="img" aria-label="likeness of each picture">{marks}{dots}</svg>'


def _kind(likeness: float) -> str:
    return "high" if likeness >= SAME_PERSON else "middle" if likeness >= SOMEONE_ELSE else "low"


def _number(value: float | None) -> str:
    return "no face" if value is None else f"{value:.2f}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Headshots</title>
<style>
:root { color-scheme: light dark; --paper: #f4f2ee; --card: #fff; --ink: #23211e; --soft: #77726a; --line: #e2ded6;
  --accent: #20705a }
@media (prefers-color-scheme: dark) { :root { --paper: #191816; --card: #24221f; --ink: #eceae5; --soft: #9d978d;
  --line: #38352f; --accent: #6fc3a6 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 4rem); max-width: 1600px;
  background: var(--paper); color: var(--ink) }
h1 { font: 600 2.1rem/1.2 Georgia, "Times New Roman", serif; margin: 0 }
header p { margin: .3rem 0 1.2rem; color: var(--soft); font-size: 1.05rem }
svg { width: 100%; max-width: 760px; display: block; margin-bottom: 1.2rem }
svg line { stroke: var(--soft); stroke-dasharray: 3 3 }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft) }
circle { fill: var(--soft); fill-opacity: .35 }
circle.kept { fill: var(--accent); fill-opacity: .8 }
nav { display: flex; flex-wrap: wrap; gap: .5rem }
button { font: inherit; color: inherit; padding: .25rem .9rem; border: 1px solid var(--line); border-radius: 99px;
  background: var(--card); cursor: pointer }
button[aria-pressed=true] { background: var(--ink); color: var(--paper); border-color: var(--ink) }
h2 { font: 600 1.3rem Georgia, "Times New Roman", serif; margin: 2rem 0 .8rem }
h2 small { color: var(--soft); font-weight: 400 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 1.1rem; align-items: start }
figure { margin: 0; position: relative; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  overflow: hidden }
figure[hidden] { display: none }
img { width: 100%; display: block }
figure b { position: absolute; top: .6rem; right: .6rem; padding: .05rem .55rem; border-radius: 99px; color: #fff;
  font-size: 13px; font-variant-numeric: tabular-nums; background: #57534dcc }
figure b.high { background: #1c7a4fe6 } figure b.middle { background: #a86a10e6 }
figcaption { padding: .5rem .8rem }
summary { cursor: pointer }
dl { margin: .5rem 0 .2rem; font-size: 13px; overflow-wrap: anywhere }
dt { color: var(--soft) } dd { margin: 0 0 .35rem }
dialog { border: 0; padding: 0; background: none; max-width: 96vw; max-height: 96vh }
dialog img { width: auto; min-width: min(70vw, 56vh); max-width: 96vw; max-height: 94vh; border-radius: 8px }
dialog::backdrop { background: #000c }
</style></head>
<body>
<header><h1>Headshots</h1><p><!--SUMMARY--></p>
<!--STRIP-->
<!--STYLES--></header>
<main>
<!--MAIN-->
</main>
<dialog><img alt=""></dialog>
<script>
const figures = [...document.querySelectorAll("figure")];
const dialog = document.querySelector("dialog");
const shown = () => figures.filter((figure) => !figure.hidden);
let current;
function show(figure) {
  current = figure;
  const { src, alt } = figure.querySelector("img");
  Object.assign(dialog.firstChild, { src, alt });
  if (!dialog.open) dialog.showModal();
}
for (const figure of figures)
  figure.querySelector("a").addEventListener("click", (event) => { event.preventDefault(); show(figure); });
dialog.addEventListener("click", () => dialog.close());
document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!dialog.open || !step) return;
  const all = shown();
  show(all[(all.indexOf(current) + step + all.length) % all.length]);
});
for (const button of document.querySelectorAll("button"))
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    for (const figure of figures)
      figure.hidden = button.dataset.style !== "" && figure.dataset.style !== button.dataset.style;
    for (const section of document.querySelectorAll("section"))
      section.hidden = !section.querySelector("figure:not([hidden])");
  });
</script>
</body></html>
"""
