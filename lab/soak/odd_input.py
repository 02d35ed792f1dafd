"""Trials with input that is whole but odd: values of options, names of files, TOML, texts, sizes and numbers of people."""

import io
import json
import os
import struct
import zlib
from random import Random

import torch
from PIL import Image, PngImagePlugin

from core.cli.command import command_parser
from core.cli.values import WrittenFile, WrittenFolder
from core.config import config_from, parse_toml
from core.models import load_base
from core.models.recipe import RECIPES, RECIPES_KEY
from core.photos import prepare, read_photos
from core.pictures import find_style_packs
from core.storage.safetensors_file import SafetensorsFile, copy_with_metadata
from core.studio import Terms, make_people, plan_people, read_people

from .damage import ODD
from .desk import Desk, names_in, run

VALUES = (
    "", " ", "-", "--", ".", "/", "..", "0", "-1", "1", "3", "1e999", "nan", "1" * 5000, str(2**64), "0x10", "½", "a" * 300,
    "a" * 100_000, "a\udcff", "\x1b[2J", "a\nb", "../../a", "/dev/null", "/dev/zero", "a=b", "a=1", "=", ":", "a:b:c",
    "512x512", "none", "cpu", "cuda:99", "demo", "list", "%s", "{subject}", "'", '"',
)  # fmt: skip


def odd_option(desk: Desk, draw: Random) -> None:
    """An odd value for any option of any command that neither trains nor draws; no file but the output is changed."""
    lora = desk.put("a.safetensors", draw.choice(desk.loras))
    photos = desk.put("photos/1.png", desk.pictures["png"]).parent
    output = desk.room / "out.safetensors"
    given = {
        "verify": [lora], "resize": [lora, "--rank", "1", "--output", output],
        "convert": [lora, "--to", "comfy", "--output", output], "merge": [lora, "--output", output],
        "metadata": [lora, "--title", "a"], "publish": [lora, "--output", desk.room / "out", "--agreed"],
        "check": [photos], "score": [photos, "--reference", photos], "forget": ["anna", "--output", desk.room],
        "train": [photos, "--base", desk.base, "--output", output, "--recipe", "none", "--no-check-photos", "--dry-run"],
        "generate": ["--style-pack", "list"],
    }  # fmt: skip
    command = draw.choice(list(given))
    actions = [one for one in command_parser(command)._actions if one.option_strings and one.nargs != 0]
    action = draw.choice(actions)
    places = {
        WrittenFile: ["a.safetensors", "photos/1.png", "pipe", "photos"],
        WrittenFolder: ["photos", "a.safetensors"],
    }
    os.mkfifo(desk.room / "pipe")
    own = [str(desk.room / name) for name in places.get(type(action.type), ["pipe", "photos", "a.safetensors"])]  # pyright: ignore
    value = draw.choice((*VALUES, *own))
    if isinstance(action.type, (WrittenFile, WrittenFolder)) and value[:1] != "/":
        value = str(desk.room / value)  # nothing is written outside of the room
    before = {path: path.read_bytes() for path in (lora, photos / "1.png")}
    option_ = draw.choice(action.option_strings)
    words = [command, *given[command], *([f"{option_}={value}"] if draw.random() < 0.7 else [option_, value])]
    _run(*words)
    changed = command == "metadata" and lora  # in place
    assert all(path == changed or path.read_bytes() == data for path, data in before.items()), "an input is changed"


def _run(*words: object) -> None:
    """Runs a command; wrong usage is an answer too."""
    try:
        run(*words)
    except SystemExit as end:
        assert end.code in (0, 2), end.code


NAMES = (
    "a" * 251, "é" * 120, "a\udcff", "\x1b[2J", "a\nb", "-a", "--help", "a:b", "a:0.5", "a=b", " a ", "a'b\"c", "%s", "{a}",
    "~", "$HOME", "a.b.c", "\u202egpj", "con", "*", "?", "[a]", "<b>", "&amp;", "10_a", "demo",
)  # fmt: skip


def odd_name(desk: Desk, draw: Random) -> None:
    """A LoRA, a photo, a folder or a caption with an odd name."""
    odd = draw.choice(NAMES)
    lora = desk.put(f"{odd[:200]}.safetensors", draw.choice(desk.loras))
    photo = desk.put(f"photos/{odd}.png", desk.pictures["png"])
    folder = desk.put(f"{odd[:200]}/{odd[:200]}.png", desk.pictures["png"]).parent
    output = desk.room / "out.safetensors"
    _run(*draw.choice((
        ["inspect", lora], ["inspect", desk.room], ["verify", lora], ["convert", lora, "--to", "comfy", "--output", output],
        ["merge", f"{lora}:0.5", "--output", output], ["check", photo.parent, "--sheet", desk.room / "a.html"],
        ["check", folder], ["score", folder, "--reference", photo.parent], ["publish", lora, "--agreed", "--output", output],
        ["train", folder, "--base", desk.base, "--output", lora.with_name(f"{odd}.safetensors"), "--dry-run"],
        ["convert", desk.loras[0], "--to", "comfy", "--output", desk.room / f"{odd}.safetensors", "--overwrite"],
    )))  # fmt: skip
    assert not [left for left in names_in(desk.room) if left.endswith(".tmp")], "a temporary file is left"


def odd_toml(desk: Desk, draw: Random) -> None:
    """A TOML text that is long, deep, or has long keys and numbers."""
    size = int(10 ** draw.uniform(0, 6))
    text = draw.choice((
        f"{'a.' * size}a = 1", f"[{'a.' * size}a]", "a = " + "[" * size, "a = " + "{a = " * size, "a = " + "1" * size,
        f'trigger_word = "{"a" * size}"', "\n".join(f"a{number} = 1" for number in range(size // 10)), f"# {'.' * size}",
        "\n".join(f"a{number}{'.a' * 90} = 1" for number in range(size // 200)), f"rank = 0x{'f' * size}", "a = 1\n" * size,
    ))  # fmt: skip
    if draw.random() < 0.5:
        config_from(parse_toml(text))
    path = desk.put("people/anna/person.toml", text.encode()).parent
    desk.put("people/anna/1.png", desk.pictures["png"])
    (person,) = read_people(path.parent)
    assert not person.agreed


def long_text(desk: Desk, draw: Random) -> None:
    """A caption, a prompt or a trigger word of any length."""
    text = draw.choice(("a ", "a", "é", "(", "a, ", "🙂", "sks ")) * int(10 ** draw.uniform(0, 6))
    desk.put("photos/1.png", desk.pictures["png"])
    desk.put("photos/1.txt", text.encode())
    photos = read_photos(desk.room / "photos", on_warning=lambda warning: None)
    config = config_from({"trigger_word": text, "sample_prompts": (text,), "sample_every": 1})
    prepare(photos, resolution=32, size_multiple=8, trigger=config.trigger_word, class_word="man", upscale=True)


def odd_size(desk: Desk, draw: Random) -> None:
    """A photo of an odd shape in any mode, or a folder with any number of repeats."""
    width = int(10 ** draw.uniform(0, 4.81))  # a JPEG's sides have at most 65,500 pixels
    height = max(1, min(int(10 ** draw.uniform(0, 4.81)), 12_000_000 // width))
    folder = desk.room / draw.choice(("", "1_a", "10000_a", "10001_a", f"{10**9}_a", f"{'1' * 200}_a"))
    folder.mkdir(exist_ok=True)
    mode, ending = draw.choice(
        (("RGB", "png"), ("RGBA", "png"), ("I;16", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("1", "tif"))
    )
    Image.new(mode, (width, height)).save(folder / f"1.{ending}")
    for photo in read_photos(desk.room, on_warning=lambda warning: None):
        photo.image(shorter_side=draw.choice((None, 100)))
        photo.mask()


def many_people(desk: Desk, draw: Random) -> None:
    """Hundreds of people, none of whom can be made: each fails alone, and is in the report."""
    rows = ["name,photos,agreed,count", *(f"p{number},{draw.choice(('a', '', 'p'))},{draw.choice(('yes', 'no', '?'))},"
            f"{draw.choice(('', '0', '5', '1' * 5000))}" for number in range(draw.randrange(1, 400)))]  # fmt: skip
    everyone = read_people(desk.put("people.csv", "\n".join(rows).encode()))
    terms = Terms(find_style_packs().packs, "corporate")
    base, output = load_base(desk.base), desk.room / "out"
    assert not plan_people(everyone, base, output, terms).to_make
    results = list(make_people(everyone, base, output, terms, device=torch.device("cpu")))
    assert len(results) == len(rows) - 1 and {result.status for result in results} == {"failed"}


def greedy_file(desk: Desk, draw: Random) -> None:
    """A GGUF file, a header or a picture that claims more than it has, or has more beside its content than anyone reads."""
    size = int(10 ** draw.uniform(1, 7))
    count, name, items = draw.choice((1, size, 2**40)), struct.pack("<Q", draw.choice((1, size, 2**30))), bytes(size)
    deep = struct.pack("<IQ", 9, 1) * (size // 12)  # a list in a list
    gguf = draw.choice((name, struct.pack("<QcI", 1, b"a", 9) + deep, struct.pack("<QcIIQ", 1, b"a", 9, 8, count), b""))
    head = b"GGUF" + struct.pack("<IQQ", 3, *draw.sample((count, 0), 2))
    header = draw.choice(
        (b'{"a":' + b"[" * size, b'{"__metadata__":{"a":"' + b"x" * size + b'"}}', b'{"a":' + b"1" * size)
    )
    png, jpg = desk.pictures["png"], desk.pictures["jpg"]
    text = draw.choice((b"iTXta" + bytes(5), b"prVt", b"eXIfII*\0")) + bytes(draw.choice((0, size)))
    part = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    at, segment = draw.choice((33, len(png) - 12)), draw.choice((b"\xff", b"\xff\xe1\xff\x02Exif\0\0" + bytes(65_274)))
    files = {
        "a.gguf": head + gguf + items, "a.safetensors": struct.pack("<Q", len(header)) + header,
        "photos/a.png": png[:at] + part * draw.choice((1, 3, size // len(part))) + png[at:],
        "photos/a.jpg": jpg[:2] + segment * (3 * size // len(segment)) + jpg[2:],
    }  # fmt: skip
    path = desk.put(*draw.choice(list(files.items())))
    run(*{
        ".gguf": ["train", desk.photos, "--base", path, "--output", desk.room / "out.safetensors", "--dry-run"],
        ".safetensors": ["inspect", path, *draw.choice(([], ["--fast"]))],
    }.get(path.suffix, draw.choice((["inspect", path], ["check", path.parent]))))  # fmt: skip


def long_parameters(desk: Desk, draw: Random) -> None:
    """A picture to publish whose parameters are long and repeat what their patterns look for."""
    times = int(10 ** draw.uniform(0, 5))
    odd = draw.choice((" ", "<lora:", ":1", "<lora:a>:1", "1", "a: ", ", ", ": f", "<", "a: {", "\\", "/a")) * times
    start = draw.choice(("", "<lora:", "<lora:a:", "Steps: 1, Lora hashes: "))
    info = PngImagePlugin.PngInfo()
    settings = draw.choice(("", f", Lora hashes: {json.dumps('a: 12, ' + odd)}", f", Regions: {odd}"))
    info.add_text("parameters", f"{start}{odd}\nNegative prompt: \nSteps: 1{settings}")
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png", pnginfo=info)
    picture, lora = desk.put("a.png", stream.getvalue()), desk.put("a.safetensors", desk.loras[0])
    run("publish", lora, "--pictures", picture, "--agreed", "--title", "a", "--output", desk.room / "out")


def odd_recipe(desk: Desk, draw: Random) -> None:
    """A base model whose recipes are absurd: the family's are taken instead, with a warning, or they are kept within limits."""
    values = (*ODD, 10**12, 10**9, 10**400, 1e-300, 1e300)
    recipe = {"photos": 10, "rate": 1e-3, "rank": 4, "settings": {}}
    owner = draw.choice((recipe, recipe["settings"]))
    names = ("photos", "rate", "rank", "batch_size", "resolution", "alpha", "warmup_steps", "class_images", "x" * 5000)
    owner[draw.choice(names)] = draw.choice(values)
    base, text = SafetensorsFile.open(desk.base), json.dumps({draw.choice(RECIPES): recipe})
    copy_with_metadata(base, desk.room / "base.safetensors", {**base.metadata, RECIPES_KEY: text})
    output = desk.room / "out.safetensors"
    command = ["train", desk.photos, "--base", desk.room / "base.safetensors", "--output", output, "--recipe", "fast"]
    run(*command, "--no-check-photos", "--device", "cpu", "--dry-run")


def odd_place(desk: Desk, draw: Random) -> None:
    """An output that is one of the folders that are read, in one of them, or leads there: no photo is changed."""
    photos = {name: desk.put(f"{name}/1.png", desk.pictures["png"]).parent for name in ("drawn", "real")}
    (desk.room / "link").symlink_to(photos["real"])
    (desk.room / "out").mkdir()
    (desk.room / "out/1.png").symlink_to(photos["real"] / "1.png")
    places = ("drawn", "real", "link", "real/1.png", "real/inside", "link/inside", "out")
    output, model = desk.room / draw.choice(places), ["--base", desk.base, "--device", "cpu", "--dry-run"]
    run(*draw.choice((
        ["check", photos["drawn"], "--like", photos["real"], "--output", output],
        ["headshots", photos["real"], "--output", output, *model, "--no-check-photos"],
        ["headshots", photos["real"], "--output", output, "--drawn-photos", photos["drawn"], *model, "--no-check-photos"],
        ["publish", desk.loras[0], "--agreed", "--title", "a", "--output", output],
    )))  # fmt: skip
    assert all((folder / "1.png").read_bytes() == desk.pictures["png"] for folder in photos.values()), (
        "a photo is changed"
    )
