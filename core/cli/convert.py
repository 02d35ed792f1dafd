"""The command `convert`, which writes a LoRA with the tensor names that another program needs."""

from collections import Counter
from dataclasses import dataclass

from .. import lora  # Its modules load only when a name is used.
from ..errors import counted
from ..tensor_names import NAME_TABLES, SCHEMES
from .common import checkpoint, print_warning, progress_bar
from .new_lora import SCHEMES_HELP, NewLoraOptions, read_source, save
from .options import OneOf, argument, option
from .values import InputPath

NAMING = OneOf(required=True)


@dataclass(frozen=True)
class ConvertOptions(NewLoraOptions):
    file: InputPath = argument("LoRA with any tensor names", "IN")
    to: str | None = option(SCHEMES_HELP, choices=SCHEMES, one_of=NAMING)
    readers: str | None = option(
        "Instead of --to: names that all of these programs load (comfyui, diffusers, peft, sd-scripts, invokeai, a1111, "
        "forge, sd.next, stable-diffusion.cpp, mflux, onetrainer, ai-toolkit, musubi-tuner)",
        "PROGRAM,...", flag="--for", one_of=NAMING,
    )  # fmt: skip
    family: str | None = option(
        f"Model family, if the LoRA fits several, as text encoders do: {', '.join(NAME_TABLES)}",
        "NAME", choices=NAME_TABLES,
    )  # fmt: skip
    plain_rank: int | None = option("Turn LoHa, LoKr, ... into a plain LoRA of this rank", "N")
    base: InputPath | None = option("For --plain-rank: the base model that a DoRA or OFT was trained on", "CHECKPOINT")


def run(options: ConvertOptions) -> None:
    source = read_source(options.file, options.family)
    weight = None
    if options.base is not None:
        base = lora.BaseWeights.open(checkpoint(options.base))
        lora.fit(source, base.family, base.shapes).check(source.name)
        weight = base.read
    elif options.to and source.entries and not source.is_known:
        print_warning(f"{options.file}: no published model has most of its modules; programs may not load the result")
    details = options.plain_rank, weight, progress_bar("converting")
    if options.to is not None:
        made = lora.convert_lora(source, options.to, *details)
    else:
        assert options.readers is not None, "argparse asks for one of the two"
        made = lora.convert_for(source, options.readers.split(","), *details)
    scheme = options.to or made.lora.scheme
    save(made, options, [source] if scheme == "diffusers" else [])
    for other, count in Counter(one.scheme for one in source.entries if one.scheme and one.scheme != scheme).items():
        print(f"  {counted(count, 'module')} had {other} names")
