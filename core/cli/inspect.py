"""The command `inspect`. With --fast it works without torch, for programs that inspect thousands of files."""

import argparse
import json
import os
from functools import partial

from .. import lora  # Its modules load only when a name is used.
from ..errors import BadFile
from .common import progress_bar


def run_inspect(options: argparse.Namespace) -> None:
    """Print what is in the files. Raises BadFile for refused files, after all others have been printed."""
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
        raise BadFile(f"{first}: this folder has no .safetensors file")
    if refused:
        raise BadFile(
            refused[0] if is_one else f"{len(refused)} of {count} files were refused; the first: {refused[0]}"
        )
