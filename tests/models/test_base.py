"""Base models from files, mappings and folders, and what they say of themselves."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from core.errors import BadConfig, BadFile, UnknownFamily
from core.models import Base, load_base
from core.storage.safetensors_file import SafetensorsFile
from tests.tooling import SMALL_SD15, UNETS, write_checkpoint

CPU = torch.device("cpu")


def weights(base: Base) -> dict[str, torch.Tensor]:
    parts = ("denoiser", "vae", *base.family.text_encoders)
    return {
        f"{part}.{name}": tensor
        for part in parts
        for name, tensor in base.load(part, CPU, torch.float32).state_dict().items()
    }


def assert_same_weights(ours: Base, theirs: Base) -> None:
    a, b = weights(ours), weights(theirs)
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_sd15, small_sdxl) -> dict[str, Path]:
    """What diffusers writes of the small bases, with its own save_pretrained."""
    result = {}
    for family, path in (("sd15", small_sd15), ("sdxl", small_sdxl)):
        result[family] = tmp_path_factory.mktemp("folder") / family
        load_base(path).pipeline().save_pretrained(result[family])
    return result


@pytest.fixture
def folder(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["sd15"], tmp_path / "model"))


@pytest.mark.parametrize("family", UNETS)
def test_a_mapping_of_tensors_is_the_same_base_as_the_file(small_sd15, small_sdxl, family):
    base = load_base({"sd15": small_sd15, "sdxl": small_sdxl}[family])
    assert isinstance(base.file, SafetensorsFile)
    mapped = load_base(dict(base.file))
    assert_same_weights(base, mapped)
    assert base.fingerprint("denoiser") == mapped.fingerprint("denoiser")
    assert mapped.sha256 is None


@pytest.mark.parametrize("family", UNETS)
def test_a_diffusers_folder_is_the_same_base_as_the_file(small_sd15, small_sdxl, folders, family):
    base = load_base({"sd15": small_sd15, "sdxl": small_sdxl}[family])
    from_folder = load_base(folders[family])
    assert from_folder.family is base.family
    scales = [one.components["vae"].config["scaling_factor"] for one in (from_folder, base)]
    assert scales[0] == scales[1]
    assert from_folder.size_multiple == base.size_multiple
    assert_same_weights(base, from_folder)


def test_a_folder_with_the_attention_names_of_old_diffusers_is_read(folder, small_sd15):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.") if ".attentions." in name else name
        renamed[name] = tensor
    assert any(".proj_attn." in name for name in renamed)
    save_file(renamed, path)
    assert_same_weights(load_base(folder), load_base(small_sd15))
    assert_same_weights(load_base(small_sd15, vae=path), load_base(small_sd15))


def test_a_vae_file_takes_the_place_of_the_one_in_the_checkpoint(folder, small_sd15):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    ours, other = (load_base(small_sd15, vae=vae).components["vae"].tensors for vae in (None, path))
    assert set(ours) == set(other)
    assert all(torch.equal(other[name], ours[name] + 1) for name in ours)


def test_a_part_beside_a_folder_that_has_it_is_refused_and_not_passed_over(folder):
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(BadConfig, match=r"already has all parts\. Leave out vae, tokenizer"):
        load_base(folder, vae=vae, tokenizer=folder / "tokenizer")


def test_an_fp16_copy_in_a_folder_is_read_when_it_is_alone(folder, small_sd15):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(path).items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert load_base(folder).components["denoiser"].tensors["conv_in.weight"].dtype == torch.float32
    path.unlink()
    assert load_base(folder).components["denoiser"].tensors["conv_in.weight"].dtype == torch.float16


def test_an_fp16_copy_on_the_hub_is_downloaded_when_it_is_alone(folder, tmp_path, monkeypatch):
    local = tmp_path / "cache"

    def download(hub_id: str, **patterns: Any) -> str:
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, **patterns):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, local / name)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(path, half)
    assert load_base("someone/model").components["denoiser"].tensors["conv_in.weight"].dtype == torch.float32
    assert not (local / "unet" / half.name).exists()
    shutil.rmtree(local)
    path.unlink()
    load_base("someone/model")
    assert (local / "unet" / half.name).exists()


def test_the_current_folder_has_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder.rename(folder.with_name("some-turbo")))
    base = load_base(".")
    assert base.name == "some-turbo"
    assert base.few_steps


def test_of_a_folder_with_an_index_only_the_files_in_it_are_read(folder):
    unet = folder / "unet"
    whole = load_file(unet / "diffusion_pytorch_model.safetensors")
    earlier = {name: tensor + 1 for name, tensor in whole.items()}
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00002-of-00003.safetensors"):
        save_file(earlier, unet / name)
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    files = {name: shards[number % 2] for number, name in enumerate(sorted(whole))}
    for shard in shards:
        save_file({name: tensor for name, tensor in whole.items() if files[name] == shard}, unet / shard)
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    read = load_base(folder).components["denoiser"].tensors
    assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())
    (unet / shards[1]).unlink()
    with pytest.raises(BadFile, match=rf"unet: {index.name} lists {shards[1]}, which is missing"):
        load_base(folder)
    (unet / shards[0]).unlink()
    assert torch.equal(load_base(folder).components["denoiser"].tensors["conv_in.bias"], earlier["conv_in.bias"])

    encoder, shard = folder / "text_encoder", "model-00001-of-00001.safetensors"
    whole = load_file(encoder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in whole.items()}, encoder / shard)
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(whole, shard)}))
    name = next(name for name in whole if name.endswith("final_layer_norm.bias"))
    read = load_base(folder).components["text_encoder"].tensors
    assert any(torch.equal(read[known], whole[name]) for known in read if known.endswith("final_layer_norm.bias")), (
        "transformers prefers a single file"
    )


def test_the_folders_scheduler_says_what_is_predicted(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    base = load_base(folder)
    assert (base.prediction_type, base.zero_terminal_snr) == ("v_prediction", True)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler with prediction_type 'epsilon'"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "EDMEulerScheduler"),
        ({"prediction_type": "sample"}, "DDIMScheduler with prediction_type 'sample'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
    ],
)  # fmt: skip
def test_folders_of_models_that_were_trained_in_another_way_are_refused(folder, scheduler, said):
    """The first two are Playground v2.5's and CosXL's."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    with pytest.raises(
        UnknownFamily, match=f"^model: its scheduler is .*{said}.* is not supported\\. Supported: epsilon"
    ):
        load_base(folder)


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"cross_attention_dim": 1024}, UnknownFamily, r"this is Stable Diffusion 2\.x.*, which is not supported yet"),
        ({"time_cond_proj_dim": 256}, UnknownFamily, r"this is a latent consistency model.*, which is not supported yet"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, BadFile,
         r"its unet is quantised .*bitsandbytes.*; use the model in bf16"),
    ],
)  # fmt: skip
def test_folders_of_other_or_quantised_models_are_refused_by_name(folder, config, error, said):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(error, match=rf"^model: {said}"):
        load_base(folder)


def test_folders_that_are_not_whole_or_not_supported_are_refused(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(BadFile, match=r"vae: has no \.safetensors files \(diffusion_pytorch_model\.bin\)\. Pickled"):
        load_base(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanPipeline"}))
    with pytest.raises(UnknownFamily, match=r"model_index\.json names the pipeline WanPipeline, .*Supported: Stable"):
        load_base(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(BadFile, match=r"is not a complete diffusers folder\. model_index\.json is missing"):
        load_base(folder)


@pytest.mark.parametrize(
    ("extra", "metadata", "options", "expected"),
    [
        ({}, {}, {}, ("epsilon", False)),
        ({"v_pred": torch.zeros(0)}, {}, {}, ("v_prediction", False)),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, {}, ("v_prediction", True)),
        ({}, {"modelspec.prediction_type": "v"}, {}, ("v_prediction", False)),
        ({}, {}, {"prediction_type": "v_prediction", "zero_terminal_snr": True}, ("v_prediction", True)),
        ({"v_pred": torch.zeros(0)}, {}, {"prediction_type": "epsilon"}, ("epsilon", False)),
    ],
)
def test_markers_metadata_and_options_say_what_is_predicted(tmp_path, extra, metadata, options, expected):
    path = write_checkpoint(tmp_path / "base.safetensors", SMALL_SD15, extra=extra, metadata=metadata)
    base = load_base(path, **options)
    assert (base.prediction_type, base.zero_terminal_snr) == expected


def test_the_resolution_of_the_metadata_is_believed_when_it_makes_sense(tmp_path):
    def resolution(text: str) -> int:
        metadata = {"modelspec.resolution": text}
        return load_base(write_checkpoint(tmp_path / "base.safetensors", SMALL_SD15, metadata=metadata)).resolution

    assert resolution("768x768") == 768
    assert resolution("832x1216") == 1006
    assert resolution("very large") == 512
    assert resolution("0x0") == 512


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_any_type_are_read_into_the_type_that_is_worked_in(tmp_path, dtype):
    base = load_base(write_checkpoint(tmp_path / "base.safetensors", SMALL_SD15, dtype))
    denoiser = base.load("denoiser", CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.bfloat16}
    assert isinstance(base.file, SafetensorsFile)
    stored = base.file["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(denoiser.conv_in.weight, stored.to(torch.bfloat16))  # pyright: ignore


def test_the_hashes_are_those_that_other_tools_show(small_sd15):
    content = small_sd15.read_bytes()
    base = load_base(small_sd15)
    assert base.sha256 == hashlib.sha256(content).hexdigest()
    assert base.legacy_hash == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def test_the_fingerprint_changes_with_a_single_weight(small_sd15):
    tensors = dict(SafetensorsFile.open(small_sd15))
    before = load_base(tensors).fingerprint("denoiser")
    name = "model.diffusion_model.out.2.bias"
    tensors[name] = tensors[name].clone()
    tensors[name][0] += 1e-3
    assert load_base(tensors).fingerprint("denoiser") != before


def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    def download(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        BadFile, match=r"someone/model: not found as a file or folder, and not available on the hub: no network"
    ):
        load_base("someone/model")
    for name in ("missing.safetensors", "missing.SAFETENSORS", "missing.sft", "missing.gguf"):
        with pytest.raises(BadFile, match=rf"{name}: cannot be read: No such file"):
            load_base(f"folder/{name}", vae=tmp_path)


def test_the_hashes_of_a_file_are_known_when_it_is_gone(small_sd15, tmp_path):
    """As when it is moved or replaced during a training run, whose metadata has them."""
    path = tmp_path / "base.safetensors"
    path.write_bytes(small_sd15.read_bytes())
    base, other = load_base(path), load_base(small_sd15)
    base.compute_hashes()
    path.unlink()
    assert (base.sha256, base.legacy_hash) == (other.sha256, other.legacy_hash)


def test_a_file_that_is_gone_before_its_hash_is_computed_is_named(small_sd15, tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(small_sd15.read_bytes())
    base = load_base(path)
    path.unlink()
    with pytest.raises(BadFile, match=r"base\.safetensors: cannot be read: No such file"):
        base.hash_files()


def test_hashes_are_computed_together_and_kept(small_sdxl: Path, tmp_path: Path, monkeypatch) -> None:
    vae = {name: tensor for name, tensor in load_file(small_sdxl).items() if name.startswith("first_stage_model.")}
    save_file(vae, tmp_path / "vae.safetensors")
    alone, together = (load_base(small_sdxl, vae=tmp_path / "vae.safetensors") for _ in range(2))
    expected = (alone.identity, alone.sha256, alone.vae_sha256)

    def cancel(done: int, total: int) -> None:
        if done >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together.compute_hashes(cancel)
    seen: list[tuple[int, int]] = []
    together.compute_hashes(lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (100, 100) and len(seen) > 10
    monkeypatch.setattr(SafetensorsFile, "sha256", None)
    monkeypatch.setattr(SafetensorsFile, "tensor", None)
    for base in (together, together.as_distilled()):
        base.compute_hashes()
        assert (base.identity, base.sha256, base.vae_sha256) == expected
