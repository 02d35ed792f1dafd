"""The gallery page of a batch of headshots: an HTML file beside the pictures that needs no server and no internet."""

import html
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence

from ..photos import Thresholds
from .generate import Job
from .headshot import Headshot

SAME_PERSON, SOMEONE_ELSE = Thresholds.likeness_review, Thresholds.likeness_reject
"""The SFace likeness above which a picture mostly shows the same person, and below which mostly someone else."""


VARIATIONS = 4
"""How many pictures the command for similar ones draws: the picture itself, and others with the next seeds."""
Models = Callable[[Job], Sequence[str]]
"""Returns the `facelora generate` options for a job's base model and LoRAs, or none."""


def gallery_page(shots: Sequence[Headshot], summary: str, compared: bool, models: Models = lambda job: ()) -> str:
    """Return the page's HTML, with the pictures in the order given, kept ones first.

    `summary` is shown below the title. Likeness is shown only if it was measured (`compared`). Pictures with `models` get a
    command that draws more like them.
    """
    styles = list(dict.fromkeys(shot.job.style for shot in shots if shot.job.style))
    kept, others = [shot for shot in shots if shot.kept], [shot for shot in shots if not shot.kept]
    sections = [("Kept", kept), ("The others" if kept else "All pictures", others)]
    main = "\n".join(
        f'<section><h2>{title} <small>{len(group)}</small></h2><div class="grid">\n'
        + "\n".join(_card(shot, compared, models) for shot in group)
        + "\n</div></section>"
        for title, group in sections
        if group
    )
    parts = {
        "SUMMARY": html.escape(summary),
        "STRIP": _strip(shots) if compared else "",
        "STYLES": _style_buttons(styles if len(styles) > 1 else []),
        "MAIN": main,
    }
    page = _PAGE
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def _card(shot: Headshot, compared: bool, models: Models) -> str:
    job, name = shot.job, html.escape(shot.path.name)
    badge = ""
    if compared:
        text, kind = ("no face", "low") if shot.likeness is None else (f"{shot.likeness:.2f}", _kind(shot.likeness))
        badge = f'<b class="{kind}" title="likeness: cosine to the photos">{text}</b>'
    facts = [("prompt", job.prompt), ("negative prompt", job.negative), ("seed", str(job.seed))]
    facts += [("LoRA strength", f"× {job.strength:g}"), ("file", shot.path.name)]
    if shot.face_pass:
        change = f"{shot.face_pass.before:.2f} → {_number(shot.face_pass.after)}"
        facts.append(("face redrawn", f"likeness {change}, {'used' if shot.face_pass.kept else 'not used'}"))
    rows = "".join(f"<dt>{what}</dt><dd>{html.escape(value)}</dd>" for what, value in facts if value)
    title = html.escape(job.style or job.prompt)
    copies = [("Copy prompt", job.prompt)]
    if named := models(job):
        copies.append(("Copy command for more like this", _command(shot, named)))
    buttons = "".join(f'<button data-copy="{html.escape(text)}">{what}</button>' for what, text in copies)
    return (
        f'<figure data-style="{html.escape(job.style)}" data-file="{name}"><a href="{name}"><img src="{name}" loading="lazy" '
        f'alt="{title}, seed {job.seed}"></a>{badge}<button class="star" aria-pressed="false" aria-label="favourite"></button>'
        f"<figcaption><details><summary>{title}</summary>{buttons}<dl>{rows}</dl></details></figcaption></figure>"
    )


def _command(shot: Headshot, models: Sequence[str]) -> str:
    """Return a shell command that draws the picture again, and variations of it with other seeds."""
    job = shot.job
    settings = {
        "prompt": job.prompt,
        "negative": job.negative,
        "seed": job.seed,
        "count": VARIATIONS,
        "steps": job.steps,
    }
    settings |= {"guidance": f"{job.guidance:g}", "output": f"more/{shot.path.stem}"}
    if job.size:
        settings["size"] = f"{job.size[0]}x{job.size[1]}"
    # With "=", a text that begins with a dash is not read as an option.
    words = ["facelora", "generate", *models, *(f"--{name}={value}" for name, value in settings.items() if value != "")]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _style_buttons(styles: Sequence[str]) -> str:
    names = ["", *styles] if styles else []
    buttons = "".join(
        f'<button data-style="{html.escape(name)}" aria-pressed="{str(not name).lower()}">'
        f"{html.escape(name) or 'All styles'}</button>"
        for name in names
    )
    return (
        f'<nav>{buttons}<button data-favourites aria-pressed="false">★ Favourites <span>0</span></button>'
        "<button data-names disabled>Copy names of favourites</button></nav>"
    )


def _strip(shots: Sequence[Headshot]) -> str:
    """Return an SVG chart of the pictures between "someone else" and "the same person"."""
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


_PAGE = r"""<!doctype html>
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
button:disabled { opacity: .5; cursor: default }
nav button[aria-pressed=true] { background: var(--ink); color: var(--paper); border-color: var(--ink) }
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
.star { position: absolute; top: .5rem; left: .5rem; padding: 0; width: 2rem; height: 2rem; border: 0;
  background: #0006; color: #fff; font-size: 1.05rem }
.star::before { content: "☆" }
.star[aria-pressed=true] { background: #0009; color: #ffd257 }
.star[aria-pressed=true]::before { content: "★" }
figcaption { padding: .5rem .8rem }
figcaption button { display: block; margin-top: .4rem; font-size: 13px }
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
let wanted = () => true;
function filter() {
  for (const figure of figures) figure.hidden = !wanted(figure);
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector("figure:not([hidden])");
}
const filters = document.querySelectorAll("nav [aria-pressed]");
for (const button of filters)
  button.addEventListener("click", () => {
    for (const other of filters) other.setAttribute("aria-pressed", other === button);
    const { style } = button.dataset;
    if (style === undefined) wanted = (figure) => favourites.has(figure.dataset.file);
    else wanted = (figure) => style === "" || figure.dataset.style === style;
    filter();
  });

// Favourites are saved in the address, so a bookmark keeps them, and in local storage where the browser allows it.
const place = `favourites of ${location.pathname}`;
function stored() {
  try { return localStorage.getItem(place) ?? ""; } catch { return ""; }
}
const known = new Set(figures.map((figure) => figure.dataset.file));
const favourites = new Set((location.hash.slice(1) || stored()).split(",").filter((name) => known.has(name)));
const namesButton = document.querySelector("[data-names]");
function showFavourites() {
  for (const figure of figures)
    figure.querySelector(".star").setAttribute("aria-pressed", favourites.has(figure.dataset.file));
  document.querySelector("[data-favourites] span").textContent = favourites.size;
  namesButton.disabled = !favourites.size;
}
for (const figure of figures)
  figure.querySelector(".star").addEventListener("click", () => {
    const { file } = figure.dataset;
    if (!favourites.delete(file)) favourites.add(file);
    const names = [...favourites].sort().join(",");
    history.replaceState(null, "", `#${names}`);
    try { localStorage.setItem(place, names); } catch { /* The address keeps them. */ }
    showFavourites();
    filter();
  });
showFavourites();

function copy(button, text) {
  // navigator.clipboard is not available on all pages opened from a file.
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}
function folder() {
  const path = decodeURIComponent(location.pathname).replace(/[^/]*$/, "");
  return /^\/[A-Za-z]:/.test(path) ? `cd /d "${path.slice(1)}"` : `cd '${path.replaceAll("'", "'\\''")}'`;
}
for (const button of document.querySelectorAll("[data-copy]"))
  button.addEventListener("click", () => {
    const text = button.dataset.copy, isCommand = text.startsWith("facelora ");
    copy(button, isCommand && location.protocol === "file:" ? `${folder()} && ${text}` : text);
  });
namesButton.addEventListener("click", () => copy(namesButton, [...favourites].sort().join("\n")));
</script>
</body></html>
"""
