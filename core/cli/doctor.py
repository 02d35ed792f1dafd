"""The command `doctor`, which reports what the machine has."""

import json
from dataclasses import dataclass

from .computing import named_or_best
from .options import Options
from .shared_options import DEVICE, JSON


@dataclass(frozen=True)
class DoctorOptions(Options):
    device: str | None = DEVICE
    json: bool = JSON


def run(options: DoctorOptions) -> None:
    from ..device import stay_within_free_memory
    from ..doctor import examine, format_doctor

    device = named_or_best(options.device)
    stay_within_free_memory(device)
    report = examine(device)
    print(json.dumps(report.as_dict(), indent=1) if options.json else format_doctor(report))
