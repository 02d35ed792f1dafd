"""The errors that users see. Each message is one line that names the file, the value and the choices."""

import unicodedata

MOST_CHARACTERS = 4000
"""The most characters of a caption, a prompt, the text of a setting, and a message: text encoders take a few hundred words."""


def one_line(text: str) -> str:
    """The text with unprintable characters replaced: names in files may hold line breaks and terminal commands."""
    return "".join(character if _is_shown(character) else "\N{REPLACEMENT CHARACTER}" for character in text)


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # macOS writes times with narrow spaces


def counted(number: int, one: str, more: str = "") -> str:
    """The number and what it counts, such as "1 photo" or "12 photos". `more` is for what does not just get an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


class FaceLoraError(Exception):
    """The base of all errors that the user can fix. The command line prints the message and exits with code 1."""

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
    """A file without a single tensor of an adapter."""


class UnmatchedKeys(FaceLoraError):
    """Tensors that have no place in the model, or places without a tensor."""


class LoraMisfit(FaceLoraError):
    """A LoRA that does not fit the base model it is to be applied to."""


class BadPhoto(FaceLoraError):
    """A photo that cannot be used, or a set of photos that is not enough."""


class BadConfig(FaceLoraError):
    """An option with a value that cannot work, or options that contradict each other."""


class TrainingDiverged(FaceLoraError):
    """The loss or the adapter became NaN or infinite."""


class OutOfMemory(FaceLoraError):
    """The device does not have enough memory for the settings."""


class MissingPackage(FaceLoraError):
    """An optional package that the requested feature needs is not installed."""


class BadStylePack(FaceLoraError):
    """A style pack or a style that cannot be used, or a name that no pack or style has."""


def check_length(what: str, text: str, error: type[FaceLoraError] = BadConfig) -> None:
    """Raises `error` for a text of more than MOST_CHARACTERS, which `what` names in the message."""
    if len(text) > MOST_CHARACTERS:
        raise error(f"{what}: has {len(text):,} characters, and at most {MOST_CHARACTERS:,} are read")
