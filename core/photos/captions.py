"""Captions: the texts about a photo that the text encoders read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def subject(trigger: str, class_word: str) -> str:
    """Return the words for the person, e.g. "sks person".

    The trigger word stands for this person; the class word adds what the model has learned about people.
    """
    return f"{trigger} {class_word}".strip()


def default_caption(trigger: str, class_word: str) -> str:
    """Return the usual caption, e.g. "a photo of sks person": DreamBooth's instance prompt (arXiv:2208.12242, section 3.1)."""
    return f"a photo of {subject(trigger, class_word)}"


def class_caption(class_word: str) -> str:
    """Return the caption without the trigger word, e.g. "a photo of person": DreamBooth's class prompt."""
    return f"a photo of {class_word}"


def names_trigger(caption: str, trigger: str) -> bool:
    """Return whether the caption has the trigger word as a whole word ("sks" is not in "masks"), in any case."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE) is not None


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """Return the number of captions that have each tag, most frequent first.

    Tags are counted as in Kohya's scripts: captions are split at commas and converted to lower case.
    """
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag).most_common())


def view_caption(trigger: str, class_word: str, framing: str, view: str) -> str:
    """Return a caption that names framing and view, e.g. "a close-up photo of sks person, facing the camera".

    It names what varies between the photos, and nothing of the identity: the trigger word takes on whatever the caption
    leaves out. `framing` is one of report.FRAMINGS, `view` one of report.VIEWS.
    """
    shown = {"close-up": "a close-up photo of", "chest-up": "a chest-up photo of", "body": "a medium shot of"}
    turned = {"front": "facing the camera", "half-turned": "head half turned", "side": "in profile"}
    return f"{shown[framing]} {subject(trigger, class_word)}, {turned[view]}"


def trigger_hint(trigger: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a warning when the trigger word already means something to CLIP; None for a rare word.

    CLIP's vocabulary is sorted by frequency. A piece of three or more letters among its first 20,000 entries is a common
    word or name with many pictures behind it ("anna", "smith", "umbrella"). "sks" and "ohwx" are at about 48,000.
    """
    ids = tokenizer(trigger, add_special_tokens=False).input_ids
    words = [str(piece).removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]
    known = [word for word, rank in zip(words, ids, strict=True) if len(word) >= 3 and word.isalpha() and rank < 20_000]
    if not known:
        return None
    read = f"is read as {' + '.join(map(repr, words))}" if len(words) > 1 else "is one word"
    return (
        f"the trigger word {trigger!r} {read}, and the model has pictures for {' and '.join(map(repr, known))}; "
        "a rare word such as 'ohwx' leaves its meaning to your photos"
    )
