"""The trials: each damages something, runs what reads it, and looks at what came of it.

A trial may raise FaceLoraError, which is a clear refusal; anything else that it raises is a fault that the soak has found.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from PIL import Image

from core.cli.settings import read_toml
from core.config import config_from
from core.errors import BadPhoto
from core.lora.apply import apply
from core.lora.file import LoraFile
from core.models import load_base
from core.photos import prepare, read_photos
from core.pictures.style_pack import Subject, find_style_packs, long_prompts, read_style_pack
from core.storage import files, safetensors_file
from core.studio import read_people
from core.training.encode import encode
from core.training.job import TrainingJob
from core.training.store import LoraFolders, find_or_train
from core.training.trained_file import RunFolder
from tests.kills import child
from tests.tooling import nodes_module

from .damage import ODD, damaged_bytes, damaged_json, damaged_safetensors
from .desk import Desk, cache_in, check_written, names_in, run, same, tensors_of
from .odd_input import (
    greedy_file,
    long_parameters,
    long_text,
    many_people,
    odd_name,
    odd_option,
    odd_place,
    odd_recipe,
    odd_size,
    odd_toml,
)
from .surroundings import (
    another_user,
    closed_streams,
    full_disk_forget,
    killed_forget,
    killed_report,
    killed_studio,
)

Trial = Callable[[Desk, Random], None]


# --- damaged files


def lora(desk: Desk, draw: Random) -> None:
    """A damaged LoRA in a command, beside a good one, onto an output that may be there."""
    good = draw.choice(desk.loras)
    path = desk.put("a.safetensors", damaged_safetensors(good.read_bytes(), draw))
    if draw.random() < 0.1:
        path = path.rename(desk.room / "adapter_model.safetensors")
        config = {"base_model.lora_alpha": 4, "r": 2, "lora_alpha": 4, "alpha_pattern": {"to_q": 1}, "use_rslora": True}
        desk.put("adapter_config.json", damaged_json(json.dumps(config).encode(), draw))
    before = path.read_bytes()
    ending = draw.choice(list(desk.pictures))
    picture = desk.put(f"picture.{ending}", damaged_bytes(desk.pictures[ending], draw))
    os.mkfifo(desk.room / "pipe.safetensors")
    output = desk.room / "out.safetensors"
    earlier = draw.choice(desk.loras).read_bytes() if draw.random() < 0.3 else None
    if earlier:
        desk.put(output.name, earlier)
    command = draw.choice((
        ["inspect", path], ["inspect", path, "--json"], ["inspect", path, "--fast"], ["inspect", desk.room],
        ["verify", path], ["verify", path, "--base", desk.base],
        ["convert", path, "--output", output, "--to", draw.choice(("kohya", "diffusers", "comfy"))],
        ["convert", path, "--output", output, "--to", "kohya", "--base", desk.base, "--plain-rank", draw.choice("139")],
        ["merge", path, f"{draw.choice(desk.loras)}:0.5", "--output", output],
        ["merge", f"{path}:{draw.choice(('-1', '1e9', '0'))}", "--output", output, "--into", desk.base],
        ["merge", path, path, "--output", output, "--rank", "2"],
        ["resize", path, "--output", output, "--rank", "1"], ["resize", path, "--output", output, "--energy", "0.5"],
        ["metadata", path, "--title", "b", "--output", output],
        ["metadata", desk.loras[0], "--thumbnail", picture, "--output", output],
    ))  # fmt: skip
    if "--output" in command and draw.random() < 0.8:
        command.append("--overwrite")
    code, _ = run(*command)
    assert path.read_bytes() == before, "the input is changed"
    _check_output(desk, output, code, earlier)
    if (
        code == 0
        and output.exists()
        and output.read_bytes() != earlier
        and command[0] in ("convert", "merge", "resize")
    ):
        check_written(output)


def _check_output(desk: Desk, output: Path, code: int, earlier: bytes | None) -> None:
    if code and earlier:
        assert output.read_bytes() == earlier, "the output is gone or changed, though the command failed"
    elif code:
        assert not output.exists(), "there is an output, though the command failed"
    assert not [name for name in names_in(desk.room) if name.endswith(".tmp")], "a temporary file is left"


def applied_lora(desk: Desk, draw: Random) -> None:
    """A damaged LoRA on a model in memory, which is afterwards as it was."""
    path = desk.put("a.safetensors", damaged_safetensors(draw.choice(desk.loras).read_bytes(), draw))
    model = torch.nn.Module()
    for name, inputs in (("attn1.to_q", 32), ("attn2.to_k", 64)):
        inner = model
        *folders, last = f"down_blocks.0.attentions.0.transformer_blocks.0.{name}".split(".")
        for folder in folders:
            if not hasattr(inner, folder):
                inner.add_module(folder, torch.nn.Module())
            inner = inner.get_submodule(folder)
        inner.add_module(last, torch.nn.Linear(inputs, 32, dtype=draw.choice((torch.float32, torch.float16))))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    try:
        applied = apply(LoraFile.read(path), {"family": "sd15", "denoiser": model}, draw.choice((1.0, -0.5, 1e5)))
        assert all(tensor.isfinite().all() for tensor in model.parameters()), "NaN is on the model"
        applied.remove()
    finally:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters()), (
            "the model is changed"
        )


def checkpoint(desk: Desk, draw: Random) -> None:
    """A damaged checkpoint as a base."""
    path = desk.put("base.safetensors", damaged_safetensors(desk.tuned.read_bytes(), draw))
    output = desk.room / "out.safetensors"
    plain = desk.loras[0]
    if draw.random() < 0.4:
        base = load_base(path)
        base.load(draw.choice(("denoiser", "vae", "text_encoder")), torch.device("cpu"), torch.float32)
        return
    command = draw.choice((
        ["extract", desk.base, path, "--output", output, "--rank", "1"], ["verify", plain, "--base", path],
        ["merge", plain, "--into", path, "--output", output], ["inspect", path],
        ["convert", desk.loras[-3], "--base", path, "--output", output, "--to", "kohya", "--plain-rank", "1"],
    ))  # fmt: skip
    code, _ = run(*command)
    _check_output(desk, output, code, None)


def diffusers_folder(desk: Desk, draw: Random) -> None:
    """A diffusers folder with a damaged file."""
    good = desk.folder / "diffusers"
    if not good.exists():
        load_base(desk.base).pipeline(dtype=torch.float16).save_pretrained(good)
    folder = shutil.copytree(good, desk.room / "base", copy_function=os.link)
    damaged = draw.choice([path for path in folder.rglob("*.json") if "tokenizer" not in path.parts])
    if draw.random() < 0.3:
        damaged = draw.choice(list(folder.rglob("*.safetensors")))
    data = damaged.read_bytes()
    damaged.unlink()  # it is the good file too
    damaged.write_bytes(damaged_json(data, draw) if damaged.suffix == ".json" else damaged_safetensors(data, draw))
    base = load_base(folder)
    base.load(draw.choice(("denoiser", "vae", "text_encoder")), torch.device("cpu"), torch.float32)


def photo(desk: Desk, draw: Random) -> None:
    """Damaged photos beside a good one, with captions and masks."""
    for number in range(3):
        ending = draw.choice(list(desk.pictures))
        desk.put(f"{number}.{ending}", damaged_bytes(desk.pictures[ending], draw))
    if draw.random() < 0.3:
        desk.put("0.txt", damaged_bytes(b"a photo of sks person, smiling", draw))
        desk.put("good-masklabel.png", damaged_bytes(desk.pictures["png"], draw))
    desk.put("good.png", desk.pictures["png"])
    warnings: list[str] = []
    photos = read_photos(desk.room, on_warning=warnings.append)
    assert all("\n" not in warning for warning in warnings), warnings
    for one in photos:
        try:
            assert one.image(shorter_side=draw.choice((None, 64))).mode == "RGB" and len(one.fingerprint) == 64
            prepared = prepare([one], resolution=32, size_multiple=8, trigger="sks", class_word="person", upscale=True)
            assert prepared.images[0].pixels().isfinite().all()
            prepared.images[0].mask()
        except BadPhoto as problem:
            assert one.name in str(problem)
    if photos[-1].name == "good.png" and (changed := damaged_bytes(desk.pictures["png"], draw)) != desk.pictures["png"]:
        desk.put("good.png", changed)
        with suppress(BadPhoto):  # what would be encoded under its digest is another picture
            photos[-1].image()
            raise AssertionError("a photo that has changed is taken for what it was")
    if draw.random() < 0.01:
        command = draw.choice(
            (["check", desk.room, "--resolution", "64"], ["score", desk.room, "--reference", desk.photos])
        )
        run(*command)


def style_pack(desk: Desk, draw: Random) -> None:
    """A damaged style pack, read by itself and in a folder."""
    path = desk.put("pack.json", damaged_json(draw.choice(desk.packs), draw))
    if draw.random() < 0.2:
        assert all("\n" not in problem for problem in find_style_packs([desk.room]).problems)
    pack, _ = read_style_pack(path)
    prompts = pack.prompts(Subject("sks"), draw.choice(("sd15", "sdxl", "flux1")), 5, 1)
    assert len(prompts) == 5 and isinstance(long_prompts(prompts, len), list)
    style = draw.choice(pack.styles)
    assert pack.picture(style) is None and nodes_module("style_picture", "nodes").style_picture(style)


_TOML = (
    "steps = 800\nlearning-rate = 1e-4\nrank = 16\nalpha = 8.0\nmethod = 'lora'\ntargets = 'attention'\n"
    "trigger_word = 'sks'\nresolution = 512\nrank_pattern = { attn1 = 4 }\noptimizer = 'adamw'\nseed = 1\n"
    "sample_prompt = ['a photo of sks person']\ncaption_dropout = 0.1\nmin-snr-gamma = 5.0\n"
)


def settings(desk: Desk, draw: Random) -> None:
    """Damaged settings: by themselves, and in a training that has no photos."""
    if draw.random() < 0.5:
        text = damaged_bytes(_TOML.encode(), draw)
    else:
        lines = _TOML.splitlines()
        number = draw.randrange(len(lines))
        odd = draw.choice(ODD)
        text = f"{lines[number].partition('=')[0]}= {json.dumps(odd).replace('null', '{}').replace('NaN', 'nan')}"
        text = "\n".join([*lines[:number], text.replace("Infinity", "inf"), *lines[number + 1 :]]).encode()
    path = desk.put("settings.toml", text)
    if draw.random() < 0.2:
        (desk.room / "nobody").mkdir()
        arguments = ["train", desk.room / "nobody", "--base", desk.base, "--output", desk.room / "a.safetensors"]
        assert run(*arguments, "--config", path)[0] == 1
        return
    config_from(read_toml(path))


def state(desk: Desk, draw: Random) -> None:
    """A training that goes on from a damaged state says so and leaves it, or comes to what it would have come to."""
    good = desk.folder / "good.state.safetensors"
    if not good.exists():
        assert desk.trained  # so that everything is in the cache, and nothing but states is saved
        output = desk.room / "good.safetensors"
        child(lambda: (_die_at(2), run(*desk.training(output))))
        output.with_name(good.name).rename(good)
    path = desk.put("a.state.safetensors", damaged_safetensors(good.read_bytes(), draw))
    before, output = path.read_bytes(), desk.room / "a.safetensors"
    code, _ = run(*desk.training(output, "--resume"))
    if code:
        assert path.read_bytes() == before and names_in(desk.room) == [path.name], "the state is gone or changed"
    else:
        assert same(tensors_of(output), desk.trained), "wrong tensors from a damaged state"


def continued(desk: Desk, draw: Random) -> None:
    """A training that begins with a damaged LoRA."""
    path = desk.put("a.safetensors", damaged_safetensors(draw.choice(desk.loras).read_bytes(), draw))
    output = desk.room / "out.safetensors"
    if run(*desk.training(output, "--continue-from", str(path)))[0] == 0:
        check_written(output)
    else:
        assert names_in(desk.room) == [path.name], "a training that has not begun leaves something"


def stored(desk: Desk, draw: Random) -> None:
    """A LoRA that the store has kept is damaged, or what its run has noted: it is found as it was, or trained again."""
    photos, base, config = desk.materials
    desk.put("good.safetensors", desk.kept_lora)  # so that there is another file to look at
    path = desk.put("me.safetensors", damaged_safetensors(desk.kept_lora.read_bytes(), draw))
    before = path.read_bytes()
    found = find_or_train(TrainingJob.of(photos, base, config), LoraFolders("me", [desk.room]), device="cpu")
    assert path == found.path or path.read_bytes() == before, "a file that is somebody else's is written over"
    assert same(tensors_of(found.path), tensors_of(desk.kept_lora)), "wrong tensors from the store"
    found.likenesses()


def run_folder(desk: Desk, draw: Random) -> None:
    """What a run has kept for its node is damaged: history, samples, the hash of what it made."""
    desk.put("history.json", damaged_json(b"[[1, 0.5], [2, 0.25]]", draw))
    desk.put("sample-000001-0.png", damaged_bytes(desk.pictures["png"], draw))
    desk.put("made.txt", damaged_bytes(b"0123456789abcdef", draw))
    kept = RunFolder(desk.room)
    assert all(len(point) == 2 for point in kept.history())
    kept.add(3, 0.1)
    kept.save_history()
    kept.made()
    kept.sample_sheet()


def panel(desk: Desk, draw: Random) -> None:
    """The state of the panels that a server finds when it starts is damaged."""
    runs = nodes_module("app.runs")
    run_ = runs.QueuedRun("anna", "p", "w", "5")
    with cache_in(desk.room / "cache"):
        first = runs.Runs()
        first.begin(run_)
        first.add(run_, {"begin": True, "phase": "training", "step": 1, "loss": 0.5, "photos": ["data:"]})
        (file,) = (desk.room / "cache" / "panels").iterdir()
        file.write_bytes(damaged_json(file.read_bytes(), draw))
        second = runs.Runs()
        json.dumps(second.of("anna"))
        second.stop("anna", "p", "5")
        second.begin(run_)
        second.add(run_, {"begin": True, "phase": "training", "step": 1, "loss": 0.5})


def cache_entry(desk: Desk, draw: Random) -> None:
    """A damaged entry of the cache is made anew, and never trained on."""
    photos, base, config = desk.materials
    dataset = prepare(
        photos, resolution=32, size_multiple=base.size_multiple, trigger="sks", class_word="person", upscale=True
    )

    def encoded() -> list[torch.Tensor]:
        found = encode(dataset, base, config, device=torch.device("cpu"))
        texts = [tensor for text in sorted(found.text) for tensor in found.text[text].values()]
        return [tensor for image in found.images for tensor in (image.mean, image.deviation)] + texts

    cache = desk.room / "cache"
    with cache_in(cache):
        if not desk.entries:
            good = encoded()
            desk.entries = {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*.safetensors")}
            desk.encoded = good
        for name, data in desk.entries.items():
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_bytes(data)
        name = draw.choice(list(desk.entries))
        path, others = cache / name, [other for other in desk.entries if other != name]
        match draw.choice(("damage", "damage", "damage", "another", "folder", "pipe", "none")):
            case "damage":
                path.write_bytes(damaged_safetensors(desk.entries[name], draw))
            case "another":
                path.write_bytes(desk.entries[draw.choice(others)])
            case kind:
                path.unlink()
                if kind == "folder":
                    path.mkdir()
                elif kind == "pipe":
                    os.mkfifo(path)
        for one, other in zip(encoded(), desk.encoded, strict=True):
            assert torch.allclose(one, other, atol=1e-5), "a damaged entry is trained on"


def cleared_cache(desk: Desk, draw: Random) -> None:
    """clear-cache in a folder that holds other things too deletes what is ours, and nothing else."""
    cache, outside = desk.room / "cache", desk.put("outside/photo.png", b"a photo")
    names = (
        "notes.txt",
        "f" * 63,
        "f" * 65,
        ".git/config",
        "latents/readme",
        "runs/mine/a",
        "panels/a.json",
        "deep/class/" + "e" * 64,
    )
    theirs = [desk.put(f"cache/{name}", b"somebody's") for name in draw.sample(names, draw.randrange(1, 6))]
    links = [cache / "latents" / "elsewhere", cache / "elsewhere"]
    ours = [
        f"{kind}/{'0123456789abcdef'[draw.randrange(16)] * 64}"
        for kind in ("latents", "text", "class", "runs", "panels")
    ]
    for number, name in enumerate(ours):
        desk.put(
            f"cache/{name}" + draw.choice(("", ".safetensors", ".json") if number < 2 else ("/00000.png",)), b"ours"
        )
    for link in links:
        link.symlink_to(outside.parent)
    (cache / "runs" / ("0d" * 32)).symlink_to(outside.parent)
    with cache_in(cache):
        assert run("clear-cache")[0] == 0
    assert outside.read_bytes() == b"a photo" and all(link.is_symlink() for link in links), "what is outside is lost"
    assert all(path.read_bytes() == b"somebody's" for path in theirs), "a file of somebody else's is lost"
    assert not any((cache / name).exists() for name in ours), "a file of ours is left"


def drawn(desk: Desk, draw: Random) -> None:
    """Pictures with a damaged LoRA or style pack, into a folder where earlier ones are damaged: none of those is lost."""
    folder = desk.room / "pictures"
    options = ["--size", "32x32", "--steps", "1", "--count", "2", "--device", "cpu", "--output", folder]
    good = ["generate", "--base", desk.base, "--lora", desk.loras[0], *options]
    assert run(*good)[0] == 0
    path = folder / "001-1.png"
    before = damaged_bytes(path.read_bytes(), draw)
    path.write_bytes(before)
    if draw.random() < 0.5:
        lora_ = desk.put("a.safetensors", damaged_safetensors(draw.choice(desk.loras).read_bytes(), draw))
        code, _ = run("generate", "--base", desk.base, "--lora", lora_, "--prompt", "a", *options)
    else:
        desk.put("packs/pack.json", damaged_json(draw.choice(desk.packs), draw))
        packs = ["--style-pack", "pack", "--style-folder", desk.room / "packs"]
        code, _ = run("generate", "--base", desk.base, "--lora", desk.loras[0], *packs, *options)
    kept = [file.read_bytes() for file in folder.rglob("*.png")]
    assert before in kept, "a picture is lost"
    if code == 0:
        for file in folder.glob("*.png"):
            with Image.open(file) as image:
                image.load()


def people(desk: Desk, draw: Random) -> None:
    """A damaged list of people, or a damaged word of one of them, is read or refused."""
    for name in ("anna", "ben"):
        desk.put(f"people/{name}/1.png", desk.pictures["png"])
        desk.put(f"people/{name}/person.toml", b"agreed = true\ntrigger = 'sks'\n")
    rows = [
        {"name": name, "photos": f"people/{name}", "agreed": "yes", "class_word": "man"} for name in ("anna", "ben")
    ]
    match draw.choice(("csv", "jsonl", "folder")):
        case "csv":
            lines = [",".join(line) for line in (list(rows[0]), *(list(row.values()) for row in rows))]
            place = desk.put("people.csv", damaged_bytes("\n".join(lines).encode(), draw))
        case "jsonl":
            place = desk.put("people.jsonl", b"\n".join(damaged_json(json.dumps(row).encode(), draw) for row in rows))
        case _:
            place = desk.room / "people"
            desk.put("people/ben/person.toml", damaged_bytes(b"agreed = true\ntrigger = 'sks'\n", draw))
    for person in read_people(place):
        assert person.name and "/" not in person.name and "\n" not in person.name


def studio(desk: Desk, draw: Random) -> None:
    """Two people, of one of whom something is damaged, before or between two runs: the other has her pictures both times."""
    place, output = desk.room / "people", desk.room / "made"
    for name in ("anna", "ben"):
        desk.put(f"people/{name}/person.toml", b"agreed = true\n")
        for photo_ in sorted(desk.photos.glob("*.png")):
            desk.put(f"people/{name}/{photo_.name}", photo_)
    command = desk.studio(place, output)

    def damage(folder: Path) -> None:
        path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        data = path.read_bytes()
        damaged = {".safetensors": damaged_safetensors, ".json": damaged_json}.get(path.suffix, damaged_bytes)
        path.write_bytes(damaged(data, draw))

    if draw.random() < 0.5:
        damage(place / "ben")
    theirs = [desk.put("made/mine.txt", b"somebody's")]
    photos = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for is_first in (True, False):
        run(*command)
        made = {one["name"]: one for one in json.loads((output / "report.json").read_text())["people"]}
        assert made["anna"]["status"] in ("made", "found"), made["anna"]
        check_written(output / made["anna"]["lora"])
        for name in made["anna"]["pictures"]:
            with Image.open(output / name) as image:
                image.load()
        assert all(path.read_bytes() == b"somebody's" for path in theirs), "a file of somebody else's is lost"
        assert all(path.read_bytes() == data for path, data in photos.items()), "a photo is changed"
        if is_first:
            damage(output / draw.choice([name for name in ("anna", "ben") if (output / name).exists()]))
            theirs += [desk.put(f"made/anna/{name}", b"somebody's") for name in ("mine.txt", "001-9.png")]


# --- kills


def _die_at(count: int, at: str = "after") -> None:
    """This process dies in its `count`th save: in the middle of the data, before the file has its name, or after it."""
    replace, data, calls = os.replace, safetensors_file.tensor_bytes, [0]

    def die_when_due() -> None:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def replaced(source: Any, target: Any) -> None:
        if at == "before":
            die_when_due()
        replace(source, target)
        if at == "after":
            die_when_due()

    def written(tensor: torch.Tensor) -> memoryview:
        if at == "data":
            die_when_due()
        return data(tensor)

    files.os.replace, safetensors_file.tensor_bytes = replaced, written


def killed_command(desk: Desk, draw: Random) -> None:
    """A command that is killed leaves its input, and the old output or the whole new one."""
    path, output = desk.put("a.safetensors", desk.loras[0]), desk.room / "out.safetensors"
    command = draw.choice((
        ["metadata", path, "--title", "b"], ["convert", path, "--output", output, "--to", "diffusers"],
        ["merge", path, "--output", output, "--into", desk.base], ["resize", path, "--output", output, "--rank", "1"],
    ))  # fmt: skip
    command.append("--overwrite")
    target = path if command[0] == "metadata" else output
    earlier = path.read_bytes() if command[0] == "metadata" else draw.choice((None, desk.loras[1].read_bytes()))
    if earlier:
        target.write_bytes(earlier)
    started = time.monotonic()
    assert run(*command)[0] == 0
    duration, new = time.monotonic() - started, target.read_bytes()
    desk.fresh_room()
    desk.put("a.safetensors", desk.loras[0])
    if earlier:
        target.write_bytes(earlier)
    if draw.random() < 0.5:
        place, count = draw.choice((("data", draw.randrange(1, 9)), ("before", 1), ("after", 1)))
        status = child(lambda: (_die_at(count, place), run(*command)))
    else:
        status = child(lambda: run(*command), dies_after=draw.random() * 2 * duration)
    assert status in (0, -signal.SIGKILL), f"exit status {status}"
    desk.counts["kills"] += status != 0
    found = target.read_bytes() if target.exists() else None
    assert found in (earlier, new), "half of an output"
    if target != path:
        assert path.read_bytes() == desk.loras[0].read_bytes(), "the input is changed"
    assert run(*command)[0] == 0
    assert target.read_bytes() == new, "another output after a kill"


def killed_training(desk: Desk, draw: Random) -> None:
    """A training that is killed again and again comes to the same tensors, and leaves nothing else."""
    output = desk.room / "a.safetensors"
    arguments = desk.training(output, "--resume")
    assert desk.trained
    for number in range(draw.randrange(1, 4)):
        if number == 0 or draw.random() < 0.5:  # the first one always meets a save
            place, count = draw.choice(
                (("data", draw.randrange(1, 200 if number else 20)), ("before", draw.randrange(1, 4)), ("after", 2))
            )
            status = child(lambda place=place, count=count: (_die_at(count, place), run(*arguments)))
        else:
            status = child(lambda: run(*arguments), dies_after=draw.random())
        assert status in (0, -signal.SIGKILL), f"exit status {status}"
        desk.counts["kills"] += status != 0
        if status == 0:
            break
    if not output.exists():
        assert run(*arguments)[0] == 0
    assert same(tensors_of(output), desk.trained), "wrong tensors after a kill"


# --- disks, and two at once


def full_disk(desk: Desk, draw: Random) -> None:
    """No file can grow beyond some size, as on a disk that is full."""
    path, output = desk.put("a.safetensors", draw.choice(desk.loras)), desk.room / "out.safetensors"
    earlier = draw.choice((None, desk.loras[1].read_bytes()))
    if earlier:
        desk.put(output.name, earlier)
    command = draw.choice((
        ["convert", path, "--output", output, "--to", "kohya"], ["resize", path, "--output", output, "--rank", "1"],
        ["merge", path, "--output", output, "--into", desk.base], ["metadata", path, "--title", "b"],
        desk.training(output, "--restart"),
    ))  # fmt: skip
    if command[0] != "train":
        command.append("--overwrite")
    cache = draw.choice((desk.room / "cache", Path(os.environ["FACELORA_CACHE"])))  # an empty one, or one that has all
    if command[0] == "train":
        assert desk.trained
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(10 ** draw.uniform(0, 5)), limits[1]))
    try:
        with cache_in(cache):
            code, _ = run(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if command[0] != "metadata":
        assert path.read_bytes() == before
        _check_output(desk, output, code, earlier)
    elif code:
        assert path.read_bytes() == before, "the file is lost"


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Within it the permissions of files hold for root too, whom they do not stop else (capabilities(7))."""
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    before = sets[0]
    sets[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, sets)
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(header, sets)


def closed_folder(desk: Desk, draw: Random) -> None:
    """The folder of the output may not be written to, or one of what is read may not be looked into."""
    path, closed = desk.put("a.safetensors", draw.choice(desk.loras)), desk.room / "closed"
    closed.mkdir()
    output = closed / "out.safetensors"
    command = draw.choice((
        ["convert", path, "--output", output, "--to", "kohya"], ["merge", path, "--output", output, "--into", desk.base],
        ["extract", desk.base, desk.tuned, "--output", output, "--rank", "1"], desk.training(output),
    ))  # fmt: skip
    mode = 0o555
    if draw.random() < 0.5:
        mode, inside = 0, closed / "a.safetensors"
        shut_in, output = draw.choice((desk.base, desk.loras[0])), desk.room / "out.safetensors"
        command = draw.choice((
            ["convert", path, "--output", closed / "out.safetensors", "--to", "kohya"], ["inspect", inside], ["check", closed],
            ["convert", inside, "--output", output, "--to", "kohya"], ["verify", path, "--base", inside],
            ["train", desk.photos, "--base", inside, "--output", output],
            ["train", closed, "--base", desk.base, "--output", output],
            ["train", closed / "a", "--base", desk.base, "--output", output],
            ["train", desk.photos, "--base", desk.base, "--output", output, "--config", inside],
            ["train", desk.photos, "--base", desk.base, "--output", output, "--continue-from", inside],
            ["generate", "--base", desk.base, "--lora", inside, "--output", desk.room / "pictures"],
            ["generate", "--base", desk.base, "--style-pack", "corporate", "--style-folder", closed, "--output", closed / "b"],
            ["metadata", inside, "--title", "a"], ["merge", path, inside, "--output", output],
        ))  # fmt: skip
        inside.write_bytes(shut_in.read_bytes())
    cache = Path(os.environ["FACELORA_CACHE"])
    if draw.random() < 0.2:
        cache, command = closed, desk.training(desk.room / "out.safetensors")
    before = names_in(closed)
    closed.chmod(mode)
    try:
        with bound_by_permissions(), cache_in(cache):
            code, errors = run(*command)
    finally:
        closed.chmod(0o755)
    assert code == 1 and names_in(closed) == before, errors


def at_once(*functions: Callable[[], int]) -> list[int]:
    """The exit codes that functions give, each in a process of its own; 3 where one raises."""
    processes = []
    for function in functions:
        if (process := os.fork()) == 0:
            code = 3
            try:
                code = function()
            finally:
                os._exit(code)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def two_at_once(desk: Desk, draw: Random) -> None:
    """Two commands that write to one output leave the whole of one of them."""
    path, output = desk.put("a.safetensors", desk.loras[0]), desk.room / "out.safetensors"
    commands = [
        ["convert", path, "--output", output, "--to", "diffusers"], ["resize", path, "--output", output, "--rank", "1"],
        ["merge", path, desk.loras[1], "--output", output, "--to", "comfy"],
    ]  # fmt: skip
    results = []
    chosen = draw.sample(commands, 2)
    for command in chosen:
        if run(*command)[0] == 0:
            results.append(output.read_bytes())
            output.unlink()
    codes = at_once(*(partial(lambda command: run(*command)[0], command) for command in chosen))
    assert set(codes) <= {0, 1}, codes
    assert output.read_bytes() in results, "half of each"
    assert names_in(desk.room) == [path.name, output.name]


def two_trainings(desk: Desk, draw: Random) -> None:
    """Of two trainings with one output, at once, one comes to its tensors, and the other says that it is in use."""
    output = desk.room / "a.safetensors"
    assert desk.trained
    codes = at_once(*[lambda: run(*desk.training(output, "--restart"))[0]] * 2)
    assert set(codes) <= {0, 1} and 0 in codes, codes
    assert same(tensors_of(output), desk.trained), "wrong tensors of two at once"
    assert names_in(desk.room) == [output.name]


class Kind(NamedTuple):
    """A kind of trial."""

    trial: Trial
    weight: int
    """How often it is drawn. Those that train or draw pictures, which take longest, are drawn least."""
    damaged: int = 0
    """How many damaged inputs it gives to what it tries, at least."""


TRIALS: dict[str, Kind] = {
    "lora": Kind(lora, 400, 1), "applied_lora": Kind(applied_lora, 200, 1), "photo": Kind(photo, 200, 3),
    "style_pack": Kind(style_pack, 150, 1), "settings": Kind(settings, 200, 1), "run_folder": Kind(run_folder, 40, 3),
    "panel": Kind(panel, 20, 1), "checkpoint": Kind(checkpoint, 20, 1),
    "diffusers_folder": Kind(diffusers_folder, 10, 1), "cache_entry": Kind(cache_entry, 10, 1), "drawn": Kind(drawn, 2, 2),
    "people": Kind(people, 40, 1), "studio": Kind(studio, 1, 2),
    "state": Kind(state, 3, 1), "stored": Kind(stored, 2, 1), "continued": Kind(continued, 2, 1),
    "killed_command": Kind(killed_command, 15), "killed_training": Kind(killed_training, 3),
    "full_disk": Kind(full_disk, 20), "closed_folder": Kind(closed_folder, 10), "cleared_cache": Kind(cleared_cache, 10),
    "odd_option": Kind(odd_option, 150, 1), "odd_name": Kind(odd_name, 60, 1), "odd_toml": Kind(odd_toml, 60, 1),
    "long_text": Kind(long_text, 30, 1), "odd_size": Kind(odd_size, 10, 1), "many_people": Kind(many_people, 5, 1),
    "greedy_file": Kind(greedy_file, 60, 1), "long_parameters": Kind(long_parameters, 60, 1),
    "odd_recipe": Kind(odd_recipe, 20, 1), "odd_place": Kind(odd_place, 20, 1),
    "killed_forget": Kind(killed_forget, 20), "killed_report": Kind(killed_report, 10), "killed_studio": Kind(killed_studio, 2),
    "full_disk_forget": Kind(full_disk_forget, 10), "another_user": Kind(another_user, 15),
    "closed_streams": Kind(closed_streams, 10), "two_at_once": Kind(two_at_once, 8), "two_trainings": Kind(two_trainings, 2),
}  # fmt: skip
