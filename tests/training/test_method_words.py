"""Textual inversion and pivotal tuning: the trigger word's own vectors, from the first step to prompts and files."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from core.cli import main
from core.config import TrainConfig
from core.errors import BadConfig, BadFile, LoraMisfit
from core.lora.apply import apply
from core.lora.embeddings import WORD_KEY, embedding_files, embeddings_of, new_words
from core.lora.file import LoraFile
from core.models.clip import add_word, caption_tokens, remove_words, token_chunks, words_of
from core.pictures.sampling import encode_prompts
from core.training.inputs import TrainingInputs
from core.training.methods import files_beside
from core.training.step import Run
from core.training.store import train

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    method="textual-inversion", embedding_vectors=3, rank=4, min_snr_gamma=0.0, precision="fp32", steps=3
)
METHODS = ("textual-inversion", "pivotal")


def started_run(bases, caches, family, method="textual-inversion") -> Run:
    run = Run(TrainingInputs.on(CPU, caches[family], bases[family], replace(CONFIG, method=method)))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(run.parameters.items()):
        if name.endswith((".vectors", ".up")):
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return run


def test_a_word_stands_for_its_tokens_alone_or_after_embedding(bases):
    words = {"sks": range(49408, 49411)}
    expected = [*caption_tokens("a photo of"), 49408, 49409, 49410, *caption_tokens("person")]
    assert caption_tokens("a photo of SKS person", words) == expected
    assert caption_tokens("a photo of embedding:sks person", words) == expected
    assert caption_tokens("sksy, sks-like", {"sks": [7]})[-3:] == [7, *caption_tokens("-like")]
    assert token_chunks(["sks " * 30], 1, 0, words).shape == (1, 2, 77)  # 90 vectors need two chunks


def test_an_encoder_looks_new_words_up_behind_its_table_and_forgets_them_again(bases):
    encoder = bases["sd15"].load("text_encoder", CPU, torch.float32)
    plain = encode_prompts(bases["sd15"], {"text_encoder": encoder}, ["a sks b"])[0]["context"]
    table = encoder.get_submodule("text_model.embeddings.token_embedding").weight
    add_word(encoder, "sks", table[caption_tokens("cat")])
    found = encode_prompts(bases["sd15"], {"text_encoder": encoder}, ["a sks b"])[0]["context"]
    wanted = encode_prompts(bases["sd15"], {"text_encoder": encoder}, ["a cat b"])[0]["context"]
    assert torch.equal(found, wanted) and not torch.equal(found, plain)
    remove_words(encoder)
    assert words_of(encoder) == {}
    assert torch.equal(encode_prompts(bases["sd15"], {"text_encoder": encoder}, ["a sks b"])[0]["context"], plain)


@pytest.mark.parametrize("family", [pytest.param("sd15", marks=pytest.mark.slow), "sdxl"])
def test_the_gradient_of_a_step_is_that_of_vectors_put_into_the_table_itself(bases, caches, family):
    """Independently: the vectors overwrite rows of other words in transformers' own table, and captions name those."""
    base, run = bases[family], started_run(bases, caches, family)
    images = [run.examples.images[index] for index in run.examples.batches.at(0)]
    _, noise, noisy, timesteps = run.examples.noised(images, run.examples.generator("noise", 0))
    (loss,) = map(run.loss_of, run.examples.passes(0))
    loss.backward()
    encoders, rows = base.load_text_encoders(CPU, torch.float32), caption_tokens("apple river stone")
    leaves = {}
    for name, parameter in run.parameters.items():
        part = name.removesuffix(".vectors")
        leaves[name] = parameter.detach().clone().requires_grad_()
        table = encoders[part].get_submodule("text_model.embeddings.token_embedding")
        whole = table.weight.detach().clone().index_put((torch.tensor(rows),), leaves[name])
        del table.weight
        table.weight = whole
    text = base.family.encode_text(encoders, ["a photo of apple river stone person"], 1, 1)
    conditioning = text | images[0].conditioning
    prediction = base.family.predict(base.load("denoiser", CPU, torch.float32), noisy, timesteps, conditioning)
    expected = F.mse_loss(prediction, noise)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in run.parameters.items():
        assert leaves[name].grad.norm() > 0
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_vectors_start_from_the_words_of_the_class_on_every_encoder(bases, caches, family):
    base = bases[family]
    run = Run(TrainingInputs.on(CPU, caches[family], base, replace(CONFIG, class_word="old man", trigger_word="ohwx")))
    first, second = caption_tokens("old man")
    assert set(run.parameters) == {f"{part}.vectors" for part in base.family.text_encoders}
    for name, parameter in run.parameters.items():
        table = base.components[name.removesuffix(".vectors")].tensors["text_model.embeddings.token_embedding.weight"]
        assert torch.equal(parameter.data, table[[first, second, first]])


def test_a_vector_never_outgrows_the_longest_word(bases, caches):
    run = Run(TrainingInputs.on(CPU, caches["sd15"], bases["sd15"], replace(CONFIG, embedding_lr=1.0)))
    table = bases["sd15"].components["text_encoder"].tensors["text_model.embeddings.token_embedding.weight"]
    longest = table.norm(dim=1).max()
    for _ in range(2):
        run.train_step()
    assert run.parameters["text_encoder.vectors"].norm(dim=1).max() <= longest * 1.001


@pytest.mark.parametrize("method", METHODS)
def test_disabled_the_word_is_an_ordinary_one_again(bases, caches, method):
    base, run = bases["sd15"], started_run(bases, caches, "sd15", method)
    plain = run.examples.text["a photo of sks person"]["context"]
    with torch.no_grad():
        changed = run.examples.conditioning(run.examples.images[:1], ["a photo of sks person"])["context"]
        with run.model.adapter.disabled():
            disabled = run.examples.conditioning(run.examples.images[:1], ["a photo of sks person"])["context"]
    assert torch.equal(disabled, plain) and not torch.allclose(changed, plain)
    assert words_of(run.model.encoders["text_encoder"]).keys() == {"sks"}
    assert tuple(base.family.text_encoders) == tuple(run.model.encoders)


@pytest.mark.parametrize(("family", "keys"), [("sd15", {"emb_params"}), ("sdxl", {"clip_l", "clip_g"})])
def test_the_embedding_file_is_what_a1111_and_comfyui_read_and_prompts_name_its_word(
    bases, caches, family, keys, tmp_path
):
    base, run = bases[family], started_run(bases, caches, family)
    metadata = {"ss_base_model_version": base.family.base_model_version}
    run.model.adapter.export(run.parameters, base, metadata).save(tmp_path / "face.safetensors", torch.float32)
    file = LoraFile.read(tmp_path / "face.safetensors")
    assert (set(file.tensors), file.kind, file.family, file.unknown_keys) == (keys, "embedding", family, ())
    assert file.metadata[WORD_KEY] == "sks"
    encoders = base.load_text_encoders(CPU, torch.float32)
    with torch.no_grad():
        wanted = run.examples.conditioning(run.examples.images[:1], ["a photo of sks person"])["context"]
    with new_words(encoders, [file]):
        for word in ("sks", "embedding:sks", "face"):
            found = encode_prompts(base, encoders, [f"a photo of {word} person"])[0]["context"]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert all(words_of(encoder) == {} for encoder in encoders.values())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_pivotal_file_brings_its_word_along_and_beside(bases, caches, family, tmp_path):
    base, run = bases[family], started_run(bases, caches, family, "pivotal")
    metadata = {"ss_base_model_version": base.family.base_model_version}
    lora = run.model.adapter.export(run.parameters, base, metadata)
    lora.save(tmp_path / "face.safetensors", torch.float32)
    file = LoraFile.read(tmp_path / "face.safetensors")
    assert file.kind == "lora" and not file.unknown_keys
    # As kohya's and OneTrainer's bundles are named, which A1111's and ComfyUI's loaders know.
    expected = {
        "sd15": {"bundle_emb.sks.string_to_param.*"},
        "sdxl": {"bundle_emb.sks.clip_l", "bundle_emb.sks.clip_g"},
    }
    assert set(file.embedding_keys) == expected[family]
    beside = files_beside(lora, base, run.config)["embedding"]
    assert embedding_files(file)["sks"].tensors.keys() == beside.tensors.keys()
    for part, vectors in embeddings_of(beside)["sks"].items():
        assert torch.equal(vectors, run.parameters[f"{part}.vectors"].detach())
        assert torch.equal(embeddings_of(file)["sks"][part], vectors)
    trained = {name.rpartition(".")[0] for name in run.parameters if name.endswith(".up")}
    assert {".".join(module) for module in file.modules()} == trained


@pytest.mark.parametrize("method", METHODS)
def test_a_file_with_vectors_is_not_gone_on_from_without_them(bases, caches, photo_folder, method):
    run = started_run(bases, caches, "sd15", method)
    start, config = run.model.adapter.export(run.parameters, bases["sd15"], {}), replace(CONFIG, method="lora", steps=1)
    assert isinstance(start, LoraFile)
    with pytest.raises(LoraMisfit, match="LoRA: has vectors of sks, which training cannot continue and would lose"):
        train(photo_folder, bases["sd15"], replace(config, check_photos=False), device=CPU, continue_from=start)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_of_another_family_does_not_fit(bases, caches, method):
    run = started_run(bases, caches, "sd15", method)
    file = run.model.adapter.export(run.parameters, bases["sd15"], {"ss_base_model_version": "sd_v1"})
    sdxl = {"family": "sdxl", **bases["sdxl"].load_text_encoders(CPU, torch.float32)}
    with pytest.raises(LoraMisfit, match=r"it is for sd15, but the base model is sdxl; .*changes a sd15 model"):
        apply(file, sdxl)  # pyright: ignore


def test_vectors_of_another_width_are_refused(bases):
    encoder = bases["sd15"].load("text_encoder", CPU, torch.float32)
    with pytest.raises(LoraMisfit, match="'sks' have 100 numbers each, but the text encoder's words have 64"):
        add_word(encoder, "sks", torch.randn(2, 100))


def test_words_to_start_from_must_be_there(bases, caches):
    with pytest.raises(BadConfig, match="does not contain a word"):
        Run(TrainingInputs.on(CPU, caches["sd15"], bases["sd15"], replace(CONFIG, embedding_words=" ")))


def test_a_single_vector_may_have_one_axis_and_other_shapes_are_refused(bases):
    encoders = bases["sd15"].load_text_encoders(CPU, torch.float32)

    def encoded(*shape: int) -> torch.Tensor:
        tensors = {"emb_params": torch.linspace(-1, 1, math.prod(shape)).reshape(shape)}
        with new_words(encoders, [LoraFile.from_tensors(tensors, {}, name="face.safetensors")]):
            return encode_prompts(bases["sd15"], encoders, ["a photo of face"])[0]["context"]

    assert torch.equal(encoded(64), encoded(1, 64))
    for wrong in ((), (0, 64), (1, 1, 64)):
        with pytest.raises(BadFile, match=r"face\.safetensors: emb_params has the shape \["):
            encoded(*wrong)


def test_half_of_sdxls_embedding_is_no_sd15s():
    for key, width in (("clip_l", 768), ("clip_g", 1280)):
        half = LoraFile.from_tensors({key: torch.ones(2, width)}, {}, "face.safetensors")
        assert half.family == "sdxl" and len(embeddings_of(half)["face"]) == 1


def test_diffusers_reads_a_pivotal_file_that_is_converted_and_its_word_beside_it(bases, caches, tmp_path):
    base, run = bases["sd15"], started_run(bases, caches, "sd15", "pivotal")
    metadata = {"ss_base_model_version": "sd_v1"}
    run.model.adapter.export(run.parameters, base, metadata).save(tmp_path / "a.safetensors", torch.float32)
    arguments = ["convert", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "b.safetensors")]
    assert main([*arguments, "--to", "diffusers", "--precision", "fp32"]) == 0
    pipeline = base.pipeline()
    pipeline.load_lora_weights(str(tmp_path / "b.safetensors"))
    pipeline.load_textual_inversion(str(tmp_path / "b-sks.safetensors"), token="sks")
    text, _ = pipeline.encode_prompt("a photo of sks person", CPU, 1, False)
    noisy, timesteps = torch.randn(1, 4, 16, 16), torch.tensor([400])
    with torch.no_grad():
        ours = run.examples.conditioning(run.examples.images[:1], ["a photo of sks person"])
        wanted = base.family.predict(run.model.denoiser, noisy, timesteps, ours)
        found = pipeline.unet(noisy, timesteps, text).sample
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
