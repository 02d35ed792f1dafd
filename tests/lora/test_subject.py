"""A LoRA's metadata state that the person shown has agreed, and lose no such statement and gain none by being changed."""

import pytest
import torch

from core.lora import LoraFile, convert_lora, edit_metadata, inspect_header, merge_loras, resize_lora
from core.lora.metadata import shared_metadata
from core.lora.stated import AGREED, SUBJECT_KEY
from core.pictures.publication import publish
from core.storage.safetensors_file import SafetensorsFile

from .test_file import kohya_tensors, some

SAID = {SUBJECT_KEY: AGREED}


def lora(said) -> LoraFile:
    metadata = {"ss_base_model_version": "sd_v1", "modelspec.title": "A face", "modelspec.trigger_phrase": "sks person"}
    return LoraFile.from_tensors(kohya_tensors(some("sd15"), rank=2), metadata | said)


def test_the_key_and_its_value():
    assert SAID == {"facelora.subject": "real person, agreed"}


@pytest.mark.parametrize(
    "change",
    [
        lambda lora: convert_lora(lora, "diffusers")[0],
        lambda lora: resize_lora(lora, rank=1)[0],
        lambda lora: merge_loras([(lora, 0.5), (lora, 0.5)])[0],
    ],
    ids=["convert", "resize", "merge"],
)
def test_a_changed_lora_states_it_if_the_original_does(change):
    assert change(lora(SAID)).metadata[SUBJECT_KEY] == AGREED
    assert SUBJECT_KEY not in change(lora({})).metadata


def test_a_merged_lora_does_not_state_it_if_nothing_is_known_of_one_person():
    for both in ([lora(SAID), lora({})], [lora({}), lora(SAID)]):
        assert SUBJECT_KEY not in merge_loras([(one, 0.5) for one in both])[0].metadata


def test_published_and_edited_files_state_it_and_inspect_shows_it(tmp_path):
    path = tmp_path / "a.safetensors"
    lora(SAID).save(path, torch.float32)
    published = publish(path, tmp_path / "out", agreed=True).lora
    edit_metadata(path, tmp_path / "b.safetensors", title="Me")
    for file in (published, tmp_path / "b.safetensors"):
        assert SafetensorsFile.open(file).metadata[SUBJECT_KEY] == AGREED
        assert inspect_header(file)["about"]["subject"] == AGREED


def test_another_text_under_the_key_is_not_published():
    assert SUBJECT_KEY not in shared_metadata({SUBJECT_KEY: "jane"})
