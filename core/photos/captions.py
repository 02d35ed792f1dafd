"""What the text encoders read about a photo."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


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
