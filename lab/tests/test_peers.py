"""lab/peer_tables.py and its trainers: what is compared with other programs, and how."""

import numpy as np
import pytest
import torch

from core.lora.file import LoraFile
from lab.peer_tables import Cost, Row, Verdict, summary
from lab.peer_trainers import Diffusers, FaceLora
from lab.recipe_tables import copying
from tests.tooling import write_photos


def test_the_steps_of_a_budget_leave_time_for_what_every_run_takes():
    assert Cost(fixed=10, step=0.25).steps(minutes=1) == 200
    assert Cost(fixed=100, step=1).steps(minutes=1) == 1


@pytest.mark.parametrize("with_class", [False, True])
def test_the_loop_of_diffusers_saves_a_lora_after_each_number_of_steps(tmp_path, with_class):
    photos = write_photos(tmp_path / "photos", count=2)
    of_class = write_photos(tmp_path / "class", count=1, person=1) if with_class else None
    seconds = Diffusers(class_images=of_class).train(photos, 1, [1, 3], tmp_path)
    assert 0 < seconds[0] < seconds[1]
    early, late = (LoraFile.read(tmp_path / f"{steps}.safetensors") for steps in (1, 3))
    assert late.family == "sd15" and any(
        not torch.equal(early.tensors[name], late.tensors[name]) for name in late.tensors
    )


def test_our_own_command_runs_once_for_each_number_of_steps(tmp_path):
    photos = write_photos(tmp_path / "photos", count=4)
    assert len(FaceLora("--no-check-photos").train(photos, 1, [1, 2], tmp_path)) == 2
    assert [LoraFile.read(tmp_path / f"{n}.safetensors").metadata["ss_steps"] for n in (1, 2)] == ["1", "2"]


def test_a_row_of_the_table_is_the_mean_over_people_and_seeds():
    def row(person: int, seed: int, likeness: float) -> Row:
        verdict = Verdict(likeness, leakage=0.1, rank1=0.5, copying=0.2)
        return Row("ours", person, seed, 1.0, 100, 12.0, {"sface": verdict, "dlib": verdict, "third": verdict})

    ((name, minutes, steps, sface, *_),) = summary([row(35, 1, 0.2), row(35, 2, 0.4), row(36, 1, 0.5), row(36, 2, 0.7)])
    assert (name, minutes, steps) == ("ours", "1", "100")
    assert sface == "0.450 ± 0.150"  # of the people's 0.3 and 0.6


def test_copying_leaves_out_pictures_and_photos_without_a_face():
    used, test, missing = np.eye(3, dtype=np.float32)[:1], np.eye(3, dtype=np.float32)[1:2], np.full((1, 3), np.nan)
    assert copying(np.concatenate([used, missing]), np.concatenate([used, missing]), test) == 1
    assert copying(missing, used, test) == 0
