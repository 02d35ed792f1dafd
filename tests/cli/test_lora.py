"""The commands for LoRA files, run as a user runs them."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from core.cli import main
from core.cli.generate import trigger_phrase, unused_strengths, without_trigger
from core.demo import BASE_FILE
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models import load_base
from core.storage.safetensors_file import SafetensorsFile, save_safetensors

MODULE = ("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")


def write_lora(
    path: Path, seed: int, rank: int = 2, size: tuple[int, ...] = (32, 64), metadata: dict[str, str] | None = None
) -> LoraModule:
    """Writes a LoRA of one module, in float32, and returns the module."""
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=generator) for shape in ((rank, size[1]), (size[0], rank)))
    module = LoraModule(down, up, 1.0)
    lora = LoraFile.from_modules("sd15", {MODULE: module}, {"ss_base_model_version": "sd_v1", **(metadata or {})})
    lora.save(path, torch.float32)
    return module


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def inspected(path: Path, capsys) -> dict:
    capsys.readouterr()
    run("inspect", path, "--json")
    return json.loads(capsys.readouterr().out)


def test_metadata_are_edited_in_place_and_the_tensors_and_their_hash_stay(tmp_path, capsys):
    path, picture = tmp_path / "a.safetensors", tmp_path / "face.png"
    write_lora(path, 0, metadata={"ss_steps": "7", "note": "private"})
    Image.new("RGB", (800, 600), "red").save(picture)
    before, data = inspected(path, capsys), dict(SafetensorsFile.open(path))
    edits = [
        "--title",
        "A person",
        "--author",
        "Somebody",
        "--description",
        "made\nhere",
        "--trigger-phrase",
        "sks woman",
    ]
    run("metadata", path, *edits, "--tag", "woman", "--tag", "portrait", "--thumbnail", picture, "--remove", "note")
    after = inspected(path, capsys)
    assert after["about"] == {
        "title": "A person", "author": "Somebody", "description": "made\nhere", "trigger_phrase": "sks woman",
        "tags": "woman, portrait",
    }  # fmt: skip
    assert after["trigger_words"] == ["sks woman"] and after["thumbnail"] and after["training"] == {"steps": "7"}
    assert after["hashes"]["sshs_model_hash"] == before["hashes"]["sshs_model_hash"]
    assert after["hashes"]["sha256"] != before["hashes"]["sha256"]
    edited = SafetensorsFile.open(path)
    assert "note" not in edited.metadata
    assert {key: edited.metadata[key] for key in ("sshs_model_hash", "sshs_legacy_hash")} == {
        key: after["hashes"][key] for key in ("sshs_model_hash", "sshs_legacy_hash")
    }
    assert all(torch.equal(edited[name], tensor) for name, tensor in data.items())


def test_metadata_are_edited_into_another_file_and_an_empty_text_deletes(tmp_path, capsys):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_lora(path, 0, metadata={"modelspec.title": "old", "modelspec.author": "Somebody"})
    content = path.read_bytes()
    run("metadata", path, "--output", other, "--title", "new", "--author", "")
    assert path.read_bytes() == content
    assert inspected(other, capsys)["about"] == {"title": "new"}
    assert main(["metadata", str(path), "--thumbnail", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"facelora: {path}: this picture cannot be read\n") and path.read_bytes() == content


def test_a_metadata_key_that_is_not_there_is_not_removed_in_silence(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    write_lora(path, 0, metadata={"note": "x", "modelspec.title": "old"})
    content = path.read_bytes()
    assert main(["metadata", str(path), "--remove", "note", "--remove", "nokey"]) == 1
    said = capsys.readouterr().err
    assert (
        "remove = 'nokey': a.safetensors does not have this key; it has: modelspec.title, note" in said
        and said.count("\n") == 1
    )
    assert path.read_bytes() == content


def test_a_merge_is_exact_and_its_ranks_add_up(tmp_path, capsys):
    first = write_lora(tmp_path / "a.safetensors", 1, rank=2, metadata={"modelspec.title": "one"})
    second = write_lora(tmp_path / "b.safetensors", 2, rank=3, metadata={"modelspec.title": "two"})
    merged = tmp_path / "merged.safetensors"
    options = ["--output", merged, "--precision", "fp32"]
    run("merge", f"{tmp_path / 'a.safetensors'}:0.5", f"{tmp_path / 'b.safetensors'}:-2", *options)
    lora = LoraFile.read(merged)
    module = lora.modules()[MODULE]
    assert module.rank == 5 and lora.metadata["modelspec.merged_from"] == "one, two"
    torch.testing.assert_close(module.delta(), 0.5 * first.delta() - 2 * second.delta(), rtol=0, atol=1e-5)
    run("merge", tmp_path / "a.safetensors", tmp_path / "b.safetensors", *options, "--rank", 1, "--overwrite")
    error = float(capsys.readouterr().out.rpartition(": ")[2].rstrip(")\n"))
    whole, nearest = first.delta() + second.delta(), LoraFile.read(merged).modules()[MODULE].delta()
    assert error == pytest.approx(float((whole - nearest).norm() / whole.norm()), rel=0.01)


def test_what_is_merged_into_a_checkpoint_is_extracted_again(small_sd15, tmp_path, capsys):
    lora, tuned, back = (tmp_path / f"{name}.safetensors" for name in ("lora", "tuned", "back"))
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    outputs, inputs = SafetensorsFile.open(small_sd15).shapes[name]
    module = write_lora(lora, 3, size=(outputs, inputs))
    run("merge", lora, "--output", tuned, "--into", small_sd15)
    assert "(1 tensor of small.safetensors changed)" in capsys.readouterr().out
    run("extract", small_sd15, tuned, "--output", back, "--rank", 2, "--precision", "fp32")
    found = LoraFile.read(back).modules()
    assert set(found) == {MODULE}
    scale = (
        SafetensorsFile.open(small_sd15)[name].float().abs().max()
    )  # the tuned weights are rounded as the base's are
    torch.testing.assert_close(
        found[MODULE].delta(), module.delta(), rtol=0, atol=0.02 * float(scale + module.delta().abs().max())
    )
    run("verify", back, "--base", small_sd15)


def test_words_that_a_checkpoint_cannot_hold_are_named(small_sd15, tmp_path, capsys):
    lora = tmp_path / "lora.safetensors"
    word = {"bundle_emb.sks.string_to_param.*": torch.randn(2, 64)}
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    write_lora(lora, 3, size=SafetensorsFile.open(small_sd15).shapes[name])
    save_safetensors(lora, {key: t.clone() for key, t in SafetensorsFile.open(lora).items()} | word)
    run("merge", lora, "--output", tmp_path / "tuned.safetensors", "--into", small_sd15)
    assert "left out the embeddings of sks, because a checkpoint cannot hold them" in capsys.readouterr().err


def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, capsys):
    write_lora(tmp_path / "a.safetensors", 5)
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00.")
    output = tmp_path / "out.safetensors"
    (tmp_path / "empty").mkdir()
    good, pickle = tmp_path / "a.safetensors", tmp_path / "pickle.safetensors"
    for arguments, words in [
        (["convert", pickle, "--output", output, "--to", "comfy"], "pickle"),
        (["merge", good, pickle, "--output", output], "pickle"),
        (["merge", good, "--output", output, "--into", pickle], "pickle"),
        (["merge", f"{good}:nan", "--output", output], "the strength of a LoRA must be finite"),
        (["metadata", good], "nothing to change"),
        (["metadata", good, "--title", "a", "--output", tmp_path / "out.pt"], "must end in .safetensors"),
        (["metadata", BASE_FILE, "--title", "a", "--output", output], "not a LoRA"),
        (["inspect", tmp_path / "empty"], "no .safetensors file"),
        (["resize", good, "--output", output], "give either a rank or an energy"),
        (["resize", good, "--output", output, "--rank", 0], "a rank must be at least 1"),
        (["extract", good, good, "--output", output], "is not a base model"),
        (["inspect", tmp_path / "missing.safetensors"], "missing.safetensors"),
    ]:
        assert main([str(argument) for argument in arguments]) == 1
        error = capsys.readouterr().err
        assert words in error and error.startswith("facelora: ") and error.count("\n") == 1, error
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "pickle.safetensors", "empty"}


def test_the_small_base_is_called_demo_wherever_a_checkpoint_is_named(tmp_path, capsys):
    """A LoRA of the demo's base is for no published model, so that no other names would have ComfyUI load it."""
    adapted = ("denoiser", "up_blocks.0.attentions.0.proj_in")
    (out, width, *_) = load_base(BASE_FILE).module_shapes()[adapted]
    module = LoraModule(torch.ones(1, width, 1, 1), torch.ones(out, 1, 1, 1), 1.0)
    lora = tmp_path / "a.safetensors"
    LoraFile.from_modules("sd15", {adapted: module}, {}).save(lora, torch.float32)
    assert main(["verify", str(lora), "--base", "demo"]) == 0
    said = capsys.readouterr().out
    assert "ComfyUI would not load 1 module," in said and "convert it" not in said
    assert "(a module that no published sd15 model has)" in said
    run("merge", lora, "--into", "demo", "--output", tmp_path / "merged.safetensors")
    assert "1 tensor of base.safetensors changed" in capsys.readouterr().out


def test_a_word_of_a_family_without_embeddings_is_warned_of(tmp_path, capsys):
    path, name = tmp_path / "a.safetensors", "lora_unet_single_blocks_0_linear1"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 3072), f"{name}.lora_up.weight": torch.ones(7 * 3072, 1)}
    save_safetensors(path, tensors | {"bundle_emb.sks.t5": torch.ones(1, 4096)})
    run("convert", path, "--output", tmp_path / "b.safetensors", "--to", "diffusers")
    assert "warning: the vectors of 'sks' are left out" in capsys.readouterr().err


def test_modules_of_no_published_model_are_not_converted_silently(tmp_path, capsys):
    name = "transformer.double_blocks.0.img_attn.qkv.0"  # a name in OneTrainer's backups
    path = tmp_path / "backup.safetensors"
    save_safetensors(path, {f"{name}.lora_A.weight": torch.ones(4, 3072), f"{name}.lora_B.weight": torch.ones(3072, 4)})
    run("convert", path, "--output", tmp_path / "b.safetensors", "--to", "kohya", "--family", "flux1")
    assert "no published model has most of its modules; programs may not load the result" in capsys.readouterr().err
    command = ["convert", path, "--output", tmp_path / "c.safetensors", "--for", "diffusers", "--family", "flux1"]
    assert main([*map(str, command)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1  # the same is not said twice
    inpainting = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(4, 9, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(320, 4, 1, 1),
    }
    others = {"lora_down": torch.ones(4, 320), "lora_up": torch.ones(320, 4)}
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
    save_safetensors(path, inpainting | {f"{block}{x}.{side}.weight": others[side] for x in "qkv" for side in others})
    run("convert", path, "--output", tmp_path / "c.safetensors", "--to", "diffusers")
    assert "warning" not in capsys.readouterr().err


def test_a_prompt_without_the_trigger_phrase_is_warned_of(tmp_path):
    write_lora(tmp_path / "me.safetensors", 0, metadata={"modelspec.trigger_phrase": "sks Person"})
    write_lora(tmp_path / "style.safetensors", 1)
    write_lora(tmp_path / "both.safetensors", 1, metadata={"modelspec.trigger_phrase": "sks Person, ohwx woman"})
    both = [(LoraFile.read(tmp_path / "both.safetensors"), 1.0)]
    assert without_trigger(both, ["ohwx woman in a hat"]) == [] and trigger_phrase(both) == "sks Person"
    assert without_trigger(both, ["a woman"]) == [
        "no prompt contains the trigger phrase of both.safetensors, 'sks Person' or 'ohwx woman'"
    ]
    word = LoraFile(
        "sd15", {"modelspec.trigger_phrase": "sks woman"}, {"emb_params": torch.zeros(1, 64)}, name="me.safetensors"
    )
    assert without_trigger([(word, 1.0)], ["a photo of embedding:me"]) == []
    assert without_trigger([(word, 1.0)], ["a photo of a woman"])
    assert unused_strengths([(word, 0.2)]) == [
        "me.safetensors is an embedding, which has no strength: 0.2 has no effect"
    ]
    assert unused_strengths([(word, 1.0), (both[0][0], 0.2)]) == []
    loras = [(LoraFile.read(tmp_path / f"{name}.safetensors"), 1.0) for name in ("me", "style")]
    assert without_trigger(loras, ["a man in a hat", "SKS person in a hat"]) == []
    assert without_trigger(loras, ["a man in a hat"]) == [
        "no prompt contains the trigger phrase of me.safetensors, 'sks Person'"
    ]


def test_a_strength_that_is_no_number_is_said_to_be_none(tmp_path, capsys):
    write_lora(path := tmp_path / "me.safetensors", 0)
    for strength in ("abc", "0,9"):
        assert main(["merge", f"{path}:{strength}", "--output", str(tmp_path / "out.safetensors")]) == 1
        assert f"me.safetensors:{strength}: the strength '{strength}' is not a number" in capsys.readouterr().err


def test_nothing_in_a_file_gives_a_terminal_commands_or_a_message_lines(tmp_path, capsys):
    path, command = tmp_path / "a.safetensors", "\n\x1b[2J"
    write_lora(path, 0, metadata={"modelspec.trigger_phrase": f"{command}word", "modelspec.title": command})
    tensors = {key: tensor.clone() for key, tensor in SafetensorsFile.open(path).items()}
    save_safetensors(path, tensors | {command: torch.ones(2)}, SafetensorsFile.open(path).metadata)
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "word" in shown and "not recognised: 1, e.g." in shown and "\x1b" not in shown
    assert main(["verify", str(path)]) == 1
    assert main(["verify", str(path), "--base", str(path)]) == 1
    captured = capsys.readouterr()
    assert "1 tensor is not recognised" in captured.out and "\x1b" not in captured.out + captured.err
    assert captured.err.count("\n") == 1


def write_constant_weights(path: Path, layers: int, change: float) -> None:
    weights = {
        f"single_blocks.{n}.modulation.lin.weight": torch.full((640, 3072), 1.0 + change * n, dtype=torch.bfloat16)
        for n in range(1, layers + 1)
    }
    save_safetensors(path, weights)


@pytest.mark.clock
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory is anonymous")
def test_an_extraction_takes_no_more_memory_for_a_larger_checkpoint(tmp_path):
    peaks = []
    for layers in (7, 35):
        for index, name in enumerate(("base", "tuned")):
            write_constant_weights(tmp_path / f"{name}{layers}.safetensors", layers, index)
        files = [tmp_path / f"{name}{layers}.safetensors" for name in ("base", "tuned", "lora")]
        command = [sys.executable, "-m", "tests.peak_memory", "extract", *map(str, files[:2])]
        command += ["--output", str(files[2]), "--rank", "1"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        assert len(LoraFile.read(files[-1]).entries) == layers
        peaks.append(int(result.stdout.splitlines()[-1]))
    # The further 28 pairs of weights have 440 MB in float32, the LoRA's modules of them half a megabyte.
    assert peaks[1] - peaks[0] < 40e6, peaks


@pytest.mark.parametrize("what", ["a LoRA", "another word", "a text"])
def test_somebody_elses_file_in_the_place_of_a_words_stays(tmp_path, capsys, what):
    write_lora(tmp_path / "a.safetensors", 0)
    word = {"bundle_emb.sks.string_to_param.*": torch.randn(2, 768)}
    save_safetensors(tmp_path / "b.safetensors", dict(SafetensorsFile.open(tmp_path / "a.safetensors")) | word)
    beside, output = tmp_path / "out-sks.safetensors", tmp_path / "out.safetensors"
    if what == "another word":
        save_safetensors(beside, {"emb_params": torch.randn(2, 768)}, {"facelora.word": "anna"})
    else:
        beside.write_bytes((tmp_path / "a.safetensors").read_bytes() if what == "a LoRA" else b"a text")
    before = beside.read_bytes()
    arguments = ["convert", str(tmp_path / "b.safetensors"), "--output", str(output), "--to", "diffusers"]
    assert main(arguments) == 1
    assert "out-sks.safetensors: this file exists and is not an embedding of 'sks'" in capsys.readouterr().err
    assert beside.read_bytes() == before and not output.exists()
    beside.unlink()
    assert main(arguments) == main([*arguments, "--overwrite"]) == 0  # its own it may replace


def test_converted_for_diffusers_a_word_is_a_file_beside_it(tmp_path):
    write_lora(tmp_path / "a.safetensors", 0)
    word = {"bundle_emb.x/y.string_to_param.*": torch.randn(2, 768)}
    save_safetensors(tmp_path / "b.safetensors", dict(SafetensorsFile.open(tmp_path / "a.safetensors")) | word)
    (tmp_path / "out").mkdir()
    for command in ("convert", "merge"):
        output = tmp_path / "out" / f"{command}.safetensors"
        run(command, tmp_path / "b.safetensors", "--output", output, "--to", "diffusers")
        names = LoraFile.read(output).tensors
        assert all(name.startswith("unet.") and "lora" in name for name in names)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "convert-x_y.safetensors", "convert.safetensors", "merge-x_y.safetensors", "merge.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("words", [("x y", "x_y"), ("x" * 300,)])
def test_words_whose_files_cannot_be_written_are_refused_before_anything_is(tmp_path, capsys, words):
    write_lora(tmp_path / "a.safetensors", 0)
    more = {f"bundle_emb.{word}.string_to_param.*": torch.randn(2, 768) for word in words}
    save_safetensors(tmp_path / "b.safetensors", dict(SafetensorsFile.open(tmp_path / "a.safetensors")) | more)
    output = tmp_path / "c.safetensors"
    assert main(["convert", str(tmp_path / "b.safetensors"), "--output", str(output), "--to", "diffusers"]) == 1
    said = capsys.readouterr().err
    assert "would be the file of both 'x y' and 'x_y'" in said if len(words) == 2 else "File name too long" in said
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_a_folder_is_inspected_with_its_links_and_whatever_the_case_of_names(tmp_path, capsys):
    folder, elsewhere = tmp_path / "loras", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    write_lora(folder / "a.SAFETENSORS", 0)
    write_lora(elsewhere / "b.safetensors", 0)
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # Following this would never end.
    (folder / "c.safetensors").write_text("<html>")
    assert main(["inspect", str(folder), "--fast"]) == 1
    out, err = capsys.readouterr()
    first, bad, second = out.splitlines()
    assert bad.startswith("c.safetensors: ") and str(tmp_path) not in bad
    of_both = "named like sd15, lora of rank 2"
    assert (first, second) == (f"a.SAFETENSORS: {of_both}", f"linked/b.safetensors: {of_both}")
    assert "1 of 3 files were refused; the first: c.safetensors: " in err and err.count("\n") == 1


def test_python_collects_garbage_after_an_inspection_as_before(tmp_path, capsys):
    before = gc.get_threshold()
    assert main(["inspect", str(tmp_path), "--fast"]) == 1
    assert "this folder has no .safetensors file" in capsys.readouterr().err and gc.get_threshold() == before


def test_a_folder_that_cannot_be_read_is_named_among_the_inspected(tmp_path, capsys, monkeypatch):
    write_lora(tmp_path / "a.safetensors", 0)
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "closed: this folder cannot be read" in capsys.readouterr().err


def test_a_checkpoint_is_not_merged_into_with_settings_for_a_lora(tmp_path, capsys):
    write_lora(path := tmp_path / "me.safetensors", 0)
    command = ["merge", str(path), "--into", str(path), "--output", str(tmp_path / "out.safetensors")]
    for option, value in (("--rank", "4"), ("--to", "kohya")):
        assert main([*command, option, value]) == 1
        assert f"{option} and --into are both given" in capsys.readouterr().err


def test_no_name_of_a_file_gives_a_terminal_commands(tmp_path, capsys):
    write_lora(tmp_path / "a.safetensors", 0)
    run("convert", tmp_path / "a.safetensors", "--to", "comfy", "--output", tmp_path / "b\x1b[2J\x9b.safetensors")
    shown = capsys.readouterr().out
    assert "b\ufffd[2J\ufffd.safetensors" in shown and "\x1b" not in shown
