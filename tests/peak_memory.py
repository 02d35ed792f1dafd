"""`python -m tests.peak_memory COMMAND ...`: runs `facelora COMMAND ...` and prints the most memory it had at a time.

In bytes, beside the pages of files; Linux says it.
"""

import sys
import threading
from pathlib import Path

from core.cli import main


def anonymous_memory() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def watch(done: threading.Event, seen: list[int]) -> None:
    while not done.wait(0.005):
        seen.append(anonymous_memory())


if __name__ == "__main__":
    done, seen = threading.Event(), []
    watcher = threading.Thread(target=watch, args=(done, seen))
    watcher.start()
    code = main(sys.argv[1:])
    done.set()
    watcher.join()
    print(max(seen))
    sys.exit(code)
