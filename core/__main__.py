"""Run the command line as `python -m core` in a clone."""

import sys

from .cli import main

sys.exit(main())
