"""The command inspect. With --fast it answers without torch, for programs that ask about thousands of files."""

import argparse
import json
import os
from functools import partial

from .. import lora  # the package loads its modules only when a name is used
from ..errors import BadFile
from .common import progress_bar


def run_inspect(options: argparse.Namespace) -> None:
    """Prints what is found. Raises BadFile where a file is refused, after all others are looked at."""
    first, *others = options.files
    is_one = not others and not os.path.isdir(first)
    if is_one and not options.fast:
        inspect = partial(lora.inspect_lora, on_progress=progress_bar("reading"))
    else:
        inspect = lora.inspect_header if options.fast else lora.inspect_lora
    if is_one and not options.json:
        print(lora.format_inspection(inspect(first)))
        return
    count, refused = 0, []
    for report in lora.inspect_files(options.files, inspect):
        count += 1
        refused += [f"{report['file']}: {report['error']}"] if "error" in report else []
        text = json.dumps(report, indent=1 if is_one else None) if options.json else lora.format_line(report)
        print(text, flush=True)
    if not count:
        raise BadFile(f"{first}: there is no .safetensors file in it")
    if refused:
        raise BadFile(
            refused[0] if is_one else f"{len(refused)} of {count} files are refused, the first is {refused[0]}"
        )
