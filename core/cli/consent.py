"""The command `consent`, which writes down what a person has agreed to."""

import os
from dataclasses import asdict, dataclass

from .. import photos  # Its modules load only when a name is used.
from ..errors import BadConfig
from .options import Options, argument, option
from .values import InputPath, Text


@dataclass(frozen=True)
class ConsentOptions(Options):
    place: InputPath = argument("Folder of photos of the person, or a LoRA of them", "PHOTOS|LORA")
    agreed_by: Text | None = option("Who has agreed, in your own words", "TEXT")
    agreed_on: Text | None = option("First day, such as 2026-12-31 (default: today)", "DATE")
    agreed_for: Text | None = option("What for, in your own words", "TEXT")
    agreed_until: Text | None = option("Last day, at most ten years after the first", "DATE")
    withdrawn: Text | None = option("Day of the withdrawal", "DATE")


def run(options: ConsentOptions) -> None:
    if not os.path.isdir(options.place) and options.place.suffix != ".safetensors":
        raise BadConfig(f"{options.place}: is neither a folder of photos nor a LoRA (.safetensors)")
    file = photos.person_file(options.place)
    given = {name: text for name, text in asdict(options).items() if text is not None and name != "place"}
    if given:
        photos.write_agreement(file, given)
    agreement, _ = photos.read_person_file(file)
    print(f"{file}:")
    for name, value in asdict(agreement).items():
        print(f"  {name} = {value or 'not written'}")
