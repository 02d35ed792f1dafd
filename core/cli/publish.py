"""The command `publish`, which makes a folder to upload."""

import argparse

from ..pictures import publish
from .common import print_warning, progress_bar


def run_publish(options: argparse.Namespace) -> None:
    made = publish(
        options.file,
        options.output,
        options.pictures,
        agreed=options.agreed,
        title=options.title,
        description=options.description,
        on_progress=progress_bar("hashing"),
        on_warning=print_warning,
    )
    for path in (made.lora, made.page, *made.pictures):
        print(path)
    print(f"{len(made.left_out)} metadata entries were left out; {options.file} is unchanged")
    print("Before you upload, read the page and the prompts in the pictures: they contain your own texts.")
