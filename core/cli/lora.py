"""The commands that work on LoRA files: inspect, verify, convert, merge, resize, extract, metadata."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ..device import PRECISIONS
from ..errors import BadConfig, one_line
from ..training.job import check_output
from .common import Command, print_warning, split_strength, unicode_text


def _progress(name: str) -> Callable[[int, int], None]:
    from tqdm import tqdm

    bar = tqdm(desc=name, dynamic_ncols=True, delay=1)

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update


_SCHEMES_HELP = (
    "naming of the tensors: kohya is read by nearly everything, diffusers by its pipelines and peft, comfy (the original "
    "model's names) by ComfyUI"
)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUT.safetensors", help="the file to write, or to write over")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp16", help="of the tensors (default: fp16)")


def _save(lora, error: float, options: argparse.Namespace) -> None:
    lora.save(options.output, PRECISIONS[options.precision], on_progress=_progress("writing"))
    size = options.output.stat().st_size / 1e6
    lost = f"; largest relative error of a module's change: {error:.2g}" if error else ""
    print(f"{options.output}  ({lora.family}, {lora.scheme} names, {size:.1f} MB){lost}")


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a LoRA")
    parser.add_argument("--fast", action="store_true", help="read no tensors: without the norms of the blocks")
    parser.add_argument("--json", action="store_true", help="as JSON, with everything that is known")


def run_inspect(options: argparse.Namespace) -> None:
    from ..lora.inspect import format_inspection, inspect_lora

    found = inspect_lora(options.file, read_tensors=not options.fast, on_progress=_progress("reading"))
    print(json.dumps(found, indent=1) if options.json else format_inspection(found))


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a LoRA")
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help="the model that it should fit")


def run_verify(options: argparse.Namespace) -> int:
    from ..lora.inspect import verify_lora

    faults = verify_lora(options.file, options.base, on_progress=_progress("reading"))
    for fault in faults:
        print(f"{'error' if fault.is_error else 'odd'}: {one_line(fault.text)}")
    if not faults:
        print("nothing wrong with it")
    return int(any(fault.is_error for fault in faults))


def add_convert(parser: argparse.ArgumentParser) -> None:
    from ..lora.modules import SCHEMES

    parser.add_argument("file", type=Path, metavar="IN", help="a LoRA of any naming")
    _add_output(parser)
    parser.add_argument("--to", choices=SCHEMES, required=True, help=_SCHEMES_HELP)
    parser.add_argument("--plain-rank", type=int, metavar="N", help="make LoHa, LoKr, ... a plain LoRA of that rank")
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help="what a DoRA or OFT was trained on, to do that")


def run_convert(options: argparse.Namespace) -> None:
    from ..lora.convert import convert_lora
    from ..lora.file import LoraFile, fit
    from ..models.base_weights import BaseWeights

    check_output(options.output)
    lora = LoraFile.read(options.file)
    weight = None
    if options.base is not None:
        base = BaseWeights.open(options.base)
        fit(lora, base.family, base.shapes).check(lora.name)
        weight = base.read
    converted, error = convert_lora(lora, options.to, options.plain_rank, weight, _progress("converting"))
    _save(converted, error, options)
    if options.to == "diffusers":
        _save_words(lora, options)


def _save_words(lora, options: argparse.Namespace) -> None:
    from ..lora.embeddings import embedding_files, file_word, word_of

    files = embedding_files(lora)
    for word in sorted({word_of(lora, key) for key in lora.embedding_keys} - files.keys()):
        print_warning(f"the vectors of {word!r} are left out: there are no files of words for {lora.family}")
    for word, embedding in files.items():
        beside = options.output.with_name(f"{options.output.stem}-{file_word(word)}{options.output.suffix}")
        embedding.save(beside, PRECISIONS[options.precision])
        print(f"{beside}  (the vectors of {word!r}, which a LoRA in {options.to} names does not hold)")


def add_merge(parser: argparse.ArgumentParser) -> None:
    from ..lora.modules import SCHEMES

    parser.add_argument("files", nargs="+", metavar="FILE[:STRENGTH]", help="the LoRAs; without a strength it is 1")
    _add_output(parser)
    parser.add_argument("--to", choices=SCHEMES, default="kohya", help=f"{_SCHEMES_HELP} (default: kohya)")
    parser.add_argument("--rank", type=int, metavar="N", help="of the result; default: exact, the ranks add up")
    parser.add_argument(
        "--into", type=Path, metavar="CHECKPOINT", help="merge into a copy of this checkpoint instead, in its own types"
    )


def run_merge(options: argparse.Namespace) -> None:
    from ..lora.checkpoints import merge_into_checkpoint
    from ..lora.convert import merge_loras
    from ..lora.file import LoraFile

    check_output(options.output)
    loras = [(LoraFile.read(path), strength) for path, strength in map(split_strength, options.files)]
    if options.into is None:
        _save(*merge_loras(loras, options.rank, options.to, on_progress=_progress("merging")), options)
        for lora, _ in loras if options.to == "diffusers" else ():
            _save_words(lora, options)
        return
    if options.rank is not None:
        raise BadConfig("--rank and --into are both given: a checkpoint has no rank")
    count = merge_into_checkpoint(
        options.into, loras, options.output, on_progress=_progress("merging"), on_warning=print_warning
    )
    print(f"{options.output}  ({count} tensors of {options.into.name} changed)")


def add_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="IN", help="a LoRA")
    _add_output(parser)
    parser.add_argument("--rank", type=int, metavar="N", help="the most that a module may have")
    parser.add_argument(
        "--energy", type=float, metavar="X", help="or: share of the squared singular values to keep, to 1"
    )


def run_resize(options: argparse.Namespace) -> None:
    from ..lora.convert import resize_lora
    from ..lora.file import LoraFile

    check_output(options.output)
    resized = resize_lora(LoraFile.read(options.file), options.rank, options.energy, on_progress=_progress("resizing"))
    _save(*resized, options)


def add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("original", type=Path, metavar="ORIGINAL", help="checkpoint")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="checkpoint that was trained from it")
    _add_output(parser)
    parser.add_argument("--rank", type=int, default=64, metavar="N", help="of the LoRA (default: 64)")


def run_extract(options: argparse.Namespace) -> None:
    from ..lora.checkpoints import extract_lora

    check_output(options.output)
    extracted = extract_lora(
        options.original, options.tuned, options.rank, on_progress=_progress("extracting"), on_warning=print_warning
    )
    _save(*extracted, options)


_EDITABLE = ("title", "author", "description", "trigger_phrase", "license", "usage_hint")


def add_metadata(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a LoRA, changed in place unless --output is given")
    parser.add_argument("--output", type=Path, metavar="FILE.safetensors", help="the file to write instead")
    for name in _EDITABLE:
        parser.add_argument("--" + name.replace("_", "-"), type=unicode_text, metavar="TEXT", help='"" deletes it')
    parser.add_argument(
        "--tag", action="append", type=unicode_text, metavar="TEXT", help="may be repeated; replaces all tags"
    )
    parser.add_argument("--thumbnail", type=Path, metavar="PICTURE", help="a small copy of it is put into the file")
    parser.add_argument(
        "--remove", action="append", default=[], metavar="KEY", help="a metadata key to remove; may be repeated"
    )


def run_metadata(options: argparse.Namespace) -> None:
    from ..lora.inspect import edit_metadata

    if options.output is not None:
        check_output(options.output)
    texts = {name: getattr(options, name) for name in _EDITABLE}
    edit_metadata(
        options.file,
        options.output,
        tags=options.tag,
        thumbnail=options.thumbnail,
        remove=options.remove,
        on_progress=_progress("hashing"),
        **texts,
    )
    print(options.output or options.file)


LORA_COMMANDS: tuple[Command, ...] = (
    ("inspect", "say what is in a LoRA file", add_inspect, run_inspect),
    ("verify", "look for what is wrong with a LoRA file", add_verify, run_verify),
    ("convert", "write a LoRA with the names that another tool wants", add_convert, run_convert),
    ("merge", "add LoRAs up, to one LoRA or into a checkpoint", add_merge, run_merge),
    ("resize", "make the rank of a LoRA smaller", add_resize, run_resize),
    ("extract", "make a LoRA of the difference of two checkpoints", add_extract, run_extract),
    ("metadata", "change title, author, trigger phrase, thumbnail, ... of a LoRA file", add_metadata, run_metadata),
)
