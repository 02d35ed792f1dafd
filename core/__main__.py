"""`python -m core` in a clone: the command line."""

import sys

from .cli import main

sys.exit(main())
