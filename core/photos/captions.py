"""What the text encoders read about a photo."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def subject(trigger: str, class_word: str) -> str:
    """ "sks person": the trigger word makes it this person, the class word brings what the model knows of people."""
    return f"{trigger} {class_word}".strip()


def default_caption(trigger: str, class_word: str) -> str:
    """ "a photo of sks person", the instance prompt of DreamBooth (arXiv:2208.12242, section 3.1)."""
    return f"a photo of {subject(trigger, class_word)}"


def class_caption(class_word: str) -> str:
    """ "a photo of person", the class prompt of DreamBooth's prior preservation: the caption without the trigger."""
    return f"a photo of {class_word}"


def names_trigger(caption: str, trigger: str) -> bool:
    """Whether the caption has the trigger as words of its own ("sks" is not in "masks"), in any case."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE) is not None


def tag_counts(captions: Iterable[str]) -> dict[str, int]:
    """How many captions have each tag, most frequent first; tags as Kohya counts them: split at commas, lower case."""
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag).most_common())


def view_caption(trigger: str, class_word: str, framing: str, view: str) -> str:
    """ "a close-up photo of sks person, facing the camera": what varies between the photos, and nothing of the identity.

    What a caption names, the model need not learn as part of the trigger word; what it leaves out, the trigger takes on.
    """
    shown = {"close-up": "a close-up photo of", "chest-up": "a chest-up photo of", "body": "a medium shot of"}
    turned = {"front": "facing the camera", "half-turned": "head half turned", "side": "in profile"}
    return f"{shown[framing]} {subject(trigger, class_word)}, {turned[view]}"


def trigger_hint(trigger: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence where the trigger word means something to CLIP already, None where it is as rare as it should be.

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
