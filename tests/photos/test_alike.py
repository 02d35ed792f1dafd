"""core/photos/alike.py: which drawn pictures show the person on real photos, and which of them differ most."""

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from core.cli import main
from core.errors import BadPhoto
from core.photos import choose_alike
from core.photos.report import PhotoReport
from tests.face_samples import orl
from tests.photos.test_report import SMALL, cartoon, photo, side_by_side

REAL = [photo(orl(5, 9), "real.png")]


class Doubtful:
    """A second network that takes everybody for someone else."""

    name = "doubtful"

    def __init__(self, network):
        self.detect = network.detect
        self._embed, self._calls = network.embed, 0

    def embed(self, images, faces):
        self._calls += 1
        return self._embed(images, faces) * (1 if self._calls == 1 else -1)


LEFT_OUT = {
    "another person": (lambda: orl(6, 1), "this seems to be someone else (likeness 0.2"),
    "a drawing": (cartoon, "this seems to be a drawing"),
    "no face": (lambda: Image.new("RGB", (99, 99), "teal"), "no face was found"),
    "two people": (lambda: side_by_side(orl(5, 3), orl(6, 1)), "2 people in the picture"),
    "the photo itself, brighter": (
        lambda: ImageEnhance.Brightness(orl(5, 9)).enhance(1.1),
        "almost the same picture as real.png",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_picture_is_left_out_for_a_reason(network, name):
    make, reason = LEFT_OUT[name]
    good, left = choose_alike([photo(orl(5, 1), "good.png"), photo(make(), "x.png")], REAL, network, thresholds=SMALL)
    assert good.reason == "" and str(good).endswith("good.png: chosen")
    assert left.reason.startswith(reason) and left.reason in str(left)


def test_edits_of_another_person_are_an_error_however_many_they_are(network):
    edits = [photo(orl(6, number), f"{number}.png") for number in range(1, 6)]
    with pytest.raises(BadPhoto, match=r"none of the 5 pictures can be used: 5 of someone else\. The best likeness is"):
        choose_alike(edits, REAL, network, thresholds=SMALL)


def test_pictures_that_fail_for_another_reason_are_not_said_to_be_too_little_alike(network):
    blurred = photo(orl(5, 1).filter(ImageFilter.GaussianBlur(1.7)), "blurred.png")
    with pytest.raises(BadPhoto, match=r"none of the 1 picture can be used: 1 blurred$"):
        choose_alike([blurred], REAL, network, thresholds=SMALL)


def test_photos_that_leave_open_who_is_meant_are_an_error(network):
    couple = [photo(side_by_side(orl(5, 9), orl(6, 1)))]
    with pytest.raises(BadPhoto, match=r"the photos to compare with: 0 of 1 usable: 2 people, .* crop it"):
        choose_alike([photo(orl(5, 1))], couple, network, thresholds=SMALL)


def test_both_networks_must_agree(network):
    with pytest.raises(BadPhoto, match="none of the 1 picture can be used: 1 of someone else"):
        choose_alike([photo(orl(5, 1))], REAL, network, Doubtful(network), thresholds=SMALL)  # pyright: ignore


def test_of_more_pictures_than_wanted_those_that_differ_most_are_chosen(network, monkeypatch):
    def report(name: str, view: str, light: float) -> PhotoReport:
        vector = np.eye(3, dtype=np.float32)[0]
        return PhotoReport(
            photo(orl(5, 1), name), (), 1, None, likeness=0.9, view=view, framing="close-up", vector=vector,
            light=np.full(3, light), background=np.zeros(4), hash=np.arange(64) % 7 == len(name),
        )  # fmt: skip

    pictures = [
        report("a", "front", 0.0),
        report("bb", "side", 0.0),
        report("ccc", "front", 9.0),
        report("dddd", "side", 9.0),
    ]
    reports = {"real": [report("real!", "front", 0.0)], "drawn": pictures}

    class Answer:
        enough, headline = True, ""

        def __init__(self, kind):
            self.usable = self.photos = reports[kind]

    monkeypatch.setattr(
        "core.photos.alike.check_photos",
        lambda _photos, _network, _limits=None, like=None, *_, **__: Answer("real" if like is None else "drawn"),
    )
    found = choose_alike([item.photo for item in pictures], REAL, network, count=2)
    assert [one.report.photo.name for one in found if not one.reason] == ["bb", "dddd"]
    assert {one.reason for one in found if one.reason} == {"2 pictures wanted, and others differ more"}


def test_the_command_copies_the_chosen_pictures_and_says_why_others_are_left_out(tmp_path, capsys):
    for name, people in (("drawn/good.png", 5), ("drawn/other.png", 6), ("real/1.png", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        orl(people, 9 if "real" in name else 1).save(tmp_path / name)
    command = ["check", str(tmp_path / "drawn"), "--like", str(tmp_path / "real"), "--base", "demo"]
    command += ["--output", str(tmp_path / "chosen")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "good.png: chosen" in said and "other.png: this seems to be someone else" in said
    assert "1 of 2 chosen by sface" in said
    assert [path.name for path in (tmp_path / "chosen").iterdir()] == ["good.png"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == 1
    assert main([*command[:4], "--base", "demo", "--threshold", "likeness_review=1"]) == 1
    told = capsys.readouterr()
    assert "good.png: not alike enough" in told.out and "none of the 2 pictures can be used" in told.err
    (tmp_path / "chosen" / "good.png").rename(tmp_path / "chosen" / "earlier.png")
    assert main(command) == 0 and "1 other picture in this folder" in capsys.readouterr().err
    orl(1, 1).save(tmp_path / "chosen" / "good.png")
    assert main(command) == 1 and "--overwrite" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "drawn"), "--count", "2"]) == 1
    assert "they require --like" in capsys.readouterr().err
