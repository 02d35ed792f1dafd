"""Captions: the texts about a photo that the text encoders read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def subject(trigger: str, class_word: str) -> str:
    """The words for the person, e.g. "sks person".

    The trigger word makes it this person, the class word brings what the model knows of people.
    """
    return f"{trigger} {class_word}".strip()


def default_caption(trigger: str, class_word: str) -> str:
    """The usual caption, e.g. "a photo of sks person": DreamBooth's instance prompt (arXiv:2208.12242, section 3.1)."""
    return f"a photo of {subject(trigger, class_word)}"


def class_caption(class_word: str) -> str:
    """The caption without the trigger word, e.g. "a photo of person": the class prompt of DreamBooth's prior preservation."""
    return f"a photo of {class_word}"


def names_trigger(caption: str, trigger: str) -> bool:
    """Whether the caption has the trigger word as a word of its own ("sks" is not in "masks"), in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE) is not None


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """The number of captions that have each tag, most frequent first.

    Tags are counted as Kohya's scripts count them: split at commas, in lower case.
    """
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag).most_common())


def view_caption(trigger: str, class_word: str, framing: str, view: str) -> str:
    """A caption that names framing and view, e.g. "a close-up photo of sks person, facing the camera".

    It names what varies between the photos, and nothing of the identity: what a caption names, the model need not learn
    as part of the trigger word; what it leaves out, the trigger word takes on. `framing` is one of report.FRAMINGS,
    `view` one of report.VIEWS.
    """
    shown = {"close-up": "a close-up photo of", "chest-up": "a chest-up photo of", "body": "a medium shot of"}
    turned = {"front": "facing the camera", "half-turned": "head half turned", "side": "in profile"}
    return f"{shown[framing]} {subject(trigger, class_word)}, {turned[view]}"


def trigger_hint(trigger: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A warning when the trigger word means something to CLIP already; None when it is as rare as it should be.

    CLIP's vocabulary is in order of frequency: a piece of three letters and more among its first 20,000 entries is a
    word or name with many pictures behind it ("anna", "smith", "umbrella"); "sks" and "ohwx" are about number 48,000.
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
