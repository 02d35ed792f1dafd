"""The command inspect. With --fast it answers without torch, for programs that ask about thousands of files."""

import argparse
import json
import os
from functools import partial

from .. import lora  # the package loads its modules only when a name is used
from .common import progress_bar


def run_inspect(options: argparse.Namespace) -> None:
    if os.path.isdir(options.file):
        for report in lora.inspect_folder(options.file, lora.inspect_header if options.fast else lora.inspect_lora):
            print(json.dumps(report) if options.json else lora.format_line(report), flush=True)
        return
    inspect = lora.inspect_header if options.fast else partial(lora.inspect_lora, on_progress=progress_bar("reading"))
    found = inspect(options.file)
    print(json.dumps(found, indent=1) if options.json else lora.format_inspection(found))
