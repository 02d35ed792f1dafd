"""The errors that users see. Each message is one line that names the file, the value and the choices."""

import unicodedata

MOST_CHARACTERS = 4000
"""The most characters of a caption, prompt, text setting or message: text encoders take a few hundred words."""


def one_line(text: str) -> str:
    """Replace unprintable characters in a text: file names may contain line breaks and terminal commands."""
    # macOS uses narrow spaces in times.
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def counted(number: int, one: str, more: str = "") -> str:
    """Return a number with its noun, such as "1 photo" or "12 photos". `more` is an irregular plural."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


class FaceLoraError(Exception):
    """The base class of all errors that the user can fix. The command line prints the message and exits with code 1."""

    def __str__(self) -> str:
        text = super().__str__()
        return one_line(text if len(text) <= MOST_CHARACTERS else f"{text[:3000]} ... {text[-900:]}")


class BadFile(FaceLoraError):
    """A weights file that cannot be read: missing, truncated, damaged, or a pickle."""


class InUse(BadFile):
    """A file that another run is writing."""


class UnknownFamily(FaceLoraError):
    """No supported model family matches the tensors, or the named family is not supported."""


class NoLora(UnknownFamily):
    """A file without any tensor of an adapter."""


class UnmatchedKeys(FaceLoraError):
    """Tensors that have no place in the model, or places without a tensor."""


class LoraMisfit(FaceLoraError):
    """A LoRA that does not fit the base model that it would be applied to."""


class BadPhoto(FaceLoraError):
    """A photo that cannot be used, or a set of too few photos."""


class BadConfig(FaceLoraError):
    """A setting with an invalid value, or settings that contradict each other."""


class TrainingDiverged(FaceLoraError):
    """The loss or the adapter became NaN or infinite."""


class OutOfMemory(FaceLoraError):
    """The device does not have enough memory for the settings."""


class MissingPackage(FaceLoraError):
    """A missing optional package that the requested feature requires."""


class BadStylePack(FaceLoraError):
    """A style pack or style that cannot be used, or an unknown name of one."""


def check_length(what: str, text: str, error: type[FaceLoraError] = BadConfig) -> None:
    """Raise `error` for a text of more than MOST_CHARACTERS; `what` names it in the message."""
    if len(text) > MOST_CHARACTERS:
        raise error(f"{what}: {len(text):,} characters; the limit is {MOST_CHARACTERS:,}")
