"""core/photos/agreement.py: a folder whose person.toml says no is used by no command that trains."""

import pytest

from core.cli import main
from core.errors import BadConfig
from core.photos import check_agreed
from core.studio import Person
from core.studio.result import check_person
from core.training import train
from tests.tooling import write_photos


@pytest.mark.parametrize("text", ["agreed = false", "agreed = 'no'", "agreed = 0", "agreed = 'perhaps'"])
@pytest.mark.parametrize("command", ["train", "headshots"])
def test_a_folder_of_a_person_who_has_not_agreed_is_refused(tmp_path, capsys, command, text):
    photos = write_photos(tmp_path / "photos", count=4)
    (photos / "person.toml").write_text(text)
    output = tmp_path / "out" / "a.safetensors"
    assert main([command, str(photos), "--base", "demo", "--output", str(output), "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert f"facelora: {photos / 'person.toml'}: the person has not agreed" in said and said.count("\n") == 1


def test_scripts_and_lists_of_people_obey_the_file_too(tmp_path, small_sd15):
    photos = write_photos(tmp_path / "photos", count=4)
    (photos / "person.toml").write_text("agreed = false")
    with pytest.raises(BadConfig, match=r"person\.toml: the person has not agreed"):
        train(photos, small_sd15)
    with pytest.raises(BadConfig, match=r"person\.toml: the person has not agreed"):
        check_person(Person("anna", photos, agreed=True), tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "person.toml").write_text("agreed = ")
    with pytest.raises(BadConfig, match=r"person\.toml: "):
        check_agreed(tmp_path)


@pytest.mark.parametrize("text", ["agreed = true", "agreed = 'Yes'", "class_word = 'woman'"])
def test_a_person_toml_without_a_refusal_is_accepted(tmp_path, text):
    (tmp_path / "person.toml").write_text(text)
    check_agreed(tmp_path)
