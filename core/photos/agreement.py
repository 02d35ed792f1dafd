"""Whether the person in a folder of photos has agreed, as the `person.toml` in it says."""

import os
from pathlib import Path

from ..errors import BadConfig, FaceLoraError, one_line
from ..storage.files import read_bytes
from ..storage.plain_values import parse_toml

PERSON_FILE = "person.toml"
"""The file in a person's folder with that person's settings and agreement."""
MAX_BYTES = 2**24
"""The largest list of people, and file about one, in bytes."""
YES = ("true", "yes", "1")
"""The texts that mean agreement where a file has no other values than texts."""


def check_agreed(*folders: str | os.PathLike[str]) -> None:
    """Raise BadConfig if a folder has a `person.toml` that says the person has not agreed, or that can't be read."""
    for file in (Path(folder) / PERSON_FILE for folder in folders):
        if not os.path.lexists(file):
            continue
        try:
            agreed = parse_toml(read_bytes(file, MAX_BYTES, name=PERSON_FILE)).get("agreed", True)
        except FaceLoraError as error:
            raise BadConfig(one_line(f"{file}: {error}")) from None
        if agreed is not True and str(agreed).strip().lower() not in YES:
            raise BadConfig(
                f"{file}: the person has not agreed (agreed = {agreed!r}); train only people who have agreed to it"
            )
