"""The gallery page of a batch of headshots: an HTML file beside the pictures that needs no server and no internet."""

import html
import os
import shlex
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ..faces import LIKENESS
from ..photos import Thresholds
from ..storage.files import fill_page
from .generate import PictureJob
from .headshot import Headshot

SAME_PERSON, SOMEONE_ELSE = Thresholds.likeness_review, Thresholds.likeness_reject
"""The SFace likeness above which a picture mostly shows the same person, and below which mostly someone else."""

Models = Callable[[PictureJob], Sequence[str]]
"""Returns the `facelora generate` options for a job's base model and LoRAs, or none."""


def gallery_page(
    shots: Sequence[Headshot], summary: str, compared: bool, models: Models = lambda job: (), measure: str = LIKENESS
) -> str:
    """Return the page's HTML, with the pictures in the order given, kept ones first.

    `summary` is shown below the title. Likeness, or what `measure` calls it, is shown only if it was measured (`compared`).
    Pictures with `models` get a command that draws more like them.
    """
    styles = list(dict.fromkeys(shot.job.style for shot in shots if shot.job.style))
    kept, others = [shot for shot in shots if shot.kept], [shot for shot in shots if not shot.kept]
    sections = [("Kept", kept), ("The others" if kept else "All pictures", others)]
    main = "\n".join(
        f'<section><h2>{title} <small>{len(group)}</small></h2><div class="grid">\n'
        + "\n".join(_card(shot, compared, models, measure) for shot in group)
        + "\n</div></section>"
        for title, group in sections
        if group
    )
    parts = {
        "SUMMARY": html.escape(summary),
        "STRIP": _strip(shots, measure) if compared else "",
        "STYLES": _style_buttons(["", *styles] if len(styles) > 1 else []),
        "MAIN": main,
    }
    return fill_page(Path(__file__).with_name("gallery.html"), parts)


def _card(shot: Headshot, compared: bool, models: Models, measure: str) -> str:
    job, name = shot.job, html.escape(shot.path.name)
    badge = ""
    if compared:
        score = 0.0 if shot.likeness is None else shot.likeness
        kind = "high" if score >= SAME_PERSON else "middle" if score >= SOMEONE_ELSE else "low"
        text = "no face" if shot.likeness is None else f"{shot.likeness:.2f}"
        badge = f'<b class="{kind}" title="{measure} (cosine)">{text}</b>'
    facts = [("prompt", job.prompt), ("negative prompt", job.negative), ("seed", str(job.seed))]
    facts += [("LoRA strength", f"× {job.strength:g}"), ("file", shot.path.name)]
    if shot.face_pass:
        before, after = shot.face_pass.before, shot.face_pass.after
        change = f"{before:.2f} → {'no face' if after is None else f'{after:.2f}'}"
        facts.append(("face redrawn", f"{measure} {change}, {'used' if shot.face_pass.kept else 'not used'}"))
    rows = "".join(f"<dt>{what}</dt><dd>{html.escape(value)}</dd>" for what, value in facts if value)
    title = html.escape(job.style or job.prompt)
    buttons = f'<button data-copy="{html.escape(job.prompt)}">Copy prompt</button>'
    if named := models(job):
        command = html.escape(_command(shot, named))
        buttons += f'<button data-copy="{command}" data-command>Copy command for more like this</button>'
    made = f"{zlib.crc32(shot.path.read_bytes()):08x}"  # Another batch has other pictures of the same names.
    return (
        f'<figure data-style="{html.escape(job.style)}" data-file="{name}" data-made="{made}"><a href="{name}">'
        f'<img src="{name}" loading="lazy" alt="{title}, seed {job.seed}"></a>{badge}'
        '<button class="star" aria-pressed="false" aria-label="favourite"></button>'
        f"<figcaption><details><summary>{title}</summary>{buttons}<dl>{rows}</dl></details></figcaption></figure>"
    )


def _command(shot: Headshot, models: Sequence[str]) -> str:
    """Return a shell command that draws the picture again, and variations of it with other seeds."""
    job = shot.job
    # The picture itself, and three others with the next seeds.
    settings = {"prompt": job.prompt, "negative": job.negative, "seed": job.seed, "count": 4, "steps": job.steps}
    settings |= {"guidance": f"{job.guidance:g}", "output": f"more/{shot.path.stem}"}
    if job.size:
        settings["size"] = f"{job.size[0]}x{job.size[1]}"
    # With "=", a text that begins with a dash is not read as an option.
    given = [f"--{name}={value}" for name, value in settings.items() if value != "" or name == "prompt"]
    words = ["facelora", "generate", *models, *given]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _style_buttons(names: Sequence[str]) -> str:
    buttons = "".join(
        f'<button data-style="{html.escape(name)}" aria-pressed="{str(not name).lower()}">'
        f"{html.escape(name) or 'All styles'}</button>"
        for name in names
    )
    return (
        f'<nav>{buttons}<button data-favourites aria-pressed="false">★ Favourites <span>0</span></button>'
        "<button data-names disabled>Copy names of favourites</button></nav>"
    )


def _strip(shots: Sequence[Headshot], measure: str) -> str:
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
    return f'<svg viewBox="0 0 600 52" role="img" aria-label="{measure}, of each picture">{marks}{dots}</svg>'
